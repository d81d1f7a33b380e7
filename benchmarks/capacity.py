"""The largest batch and the longest context before memory runs out, by bisection."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_kvquant.evaluation.memory import free, synchronize
from hf_kvquant.hosts import with_cache

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


def largest(
    model: PreTrainedModel, way: Way, batch: int | None, context: int | None, tolerance: float
) -> dict[str, Any]:
    """The largest value of whichever of `batch` and `context` is None, to within `tolerance` of it.

    Stops with what is known after a minute; `exact` says whether it did not have to.
    """
    device, start = model.device, time.perf_counter()
    unit = 1 if batch is None else 1024
    free(device)
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 20

    def sizes(value: int) -> tuple[int, int]:
        return (value, context or 0) if batch is None else (batch, value * unit)

    a_unit = cache_bytes(model, *sizes(1), way.kv_cache_dtype)
    below, above = 0, max(2, int(memory / a_unit * 1.02) + 1)  # what does not fit for sure
    trial = max(1, int(above * 0.9))
    while above - below > max(1, tolerance * below) and time.perf_counter() - start < _SECONDS_A_ROW:
        if fits(model, way, *sizes(trial)):
            below = trial
        else:
            above = trial
        trial = (below + above) // 2
    return {
        "largest": below * unit,
        "exact": above - below <= max(1, tolerance * below),
        "share_of_memory": below * a_unit / memory,
    }


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
                values = largest(model, way, batch, context, 0.5 if tiny else 0.01)
                known.append(values["largest"])
                return {**values, "vs_dynamic": values["largest"] / max(known[0], 1)}

            asked = f"batch at {context}" if batch is None else "context at batch 1"
            results.row({"what": asked, "cache": way.name}, measured)
