"""The largest batch and the longest context before memory runs out, by bisection."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_kvquant.evaluation.capacity import largest_fitting
from hf_kvquant.evaluation.memory import free, synchronize
from hf_kvquant.hosts.conventions import with_cache

from .models import CAPACITY_WAYS, Way, build_model, cache_bytes, fill
from .results import Results

_SECONDS_A_ROW = 60.0


@torch.no_grad()
def fits(model: PreTrainedModel, way: Way, batch: int, context: int) -> bool:
    """Whether a full cache and two decode steps over it find room."""
    device = model.device
    free(device)
    try:
        cache = way.make(model, context + 2)
        fill(cache, model, batch, context)
        ids = torch.ones(batch, 1, dtype=torch.int64, device=device)
        for _ in range(2):
            model(ids, **with_cache(cache))
        synchronize(device)
        return True
    except torch.OutOfMemoryError:
        return False


def largest(model: PreTrainedModel, way: Way, batch: int | None, context: int | None, precision: int) -> dict[str, Any]:
    """The largest value of whichever of `batch` and `context` is None, to one part in `precision`.

    Stops with what is known after a minute; `exact` says whether it did not have to.
    """
    device, end = model.device, time.perf_counter() + _SECONDS_A_ROW
    unit = 1 if batch is None else 1024
    free(device)
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 20

    def sizes(value: int) -> tuple[int, int]:
        return (value, context or 0) if batch is None else (batch, value)

    def fits_in_time(value: int) -> bool:
        return time.perf_counter() < end and fits(model, way, *sizes(value))

    units = memory / cache_bytes(model, *sizes(unit), way.kv_cache_dtype)  # that fill the memory
    most, first = (max(1, int(units * share)) * unit for share in (1.02, 0.9))
    found = largest_fitting(fits_in_time, unit, most, first, precision)
    return {"largest": found, "exact": time.perf_counter() < end, "share_of_memory": found / unit / units}


def measure(results: Results, quick: bool = False, tiny: bool = False) -> None:
    """Both questions for each cache."""
    name = "tiny" if tiny else "8B"
    results.part("capacity", f"{name} shape: largest batch at 8k, longest context of one sequence")
    model = build_model(name, results.device)
    questions: list[tuple[int | None, int | None]] = [(None, 64 if tiny else 8192), (1, None)]
    for batch, context in questions:
        known: list[int] = []
        for way in CAPACITY_WAYS[:3] if quick else CAPACITY_WAYS:

            def measured(
                way: Way = way, batch: int | None = batch, context: int | None = context, known: list[int] = known
            ) -> dict[str, Any]:
                model.set_attn_implementation(way.attention)
                values = largest(model, way, batch, context, 2 if tiny else 100)
                known.append(values["largest"])
                return {**values, "vs_dynamic": values["largest"] / max(known[0], 1)}

            asked = f"batch at {context}" if batch is None else "context at batch 1"
            results.row({"what": asked, "cache": way.name}, measured)
