"""`generate` end to end over a long past: seconds of a decode step, of the first calls, and memory.

The past is random and put into the cache directly. `generate` then gets its ids and the cache, as in a further turn of
a chat, so everything that a user's step does is in the time. Steps are timed by a stopping criterion; the first ones,
which compile and capture, are left out of the median.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteriaList

from hf_kvquant.evaluation.memory import free, synchronize
from hf_kvquant.evaluation.timing import Clock
from hf_kvquant.hosts.conventions import with_cache

from .bandwidth import ceilings
from .models import WAYS, Way, build_model, cache_bytes, fill, weight_bytes
from .results import Results

# (batch, context) and how many of the ways, in the order of importance: compiling takes time.
CELLS = [(8, 32768, len(WAYS)), (1, 1024, len(WAYS)), (32, 8192, 5)]
_WARMUP = 8


def run(model: PreTrainedModel, way: Way, batch: int, context: int, new_tokens: int) -> dict[str, Any]:
    """One `generate` over a past of `context` tokens."""
    device = model.device
    torch._dynamo.reset()
    model.set_attn_implementation(way.attention)
    free(device)
    cache = way.make(model, context + new_tokens + 1)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    fill(cache, model, batch, context)
    free(device)
    held = None
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
    ids = torch.randint(3, model.config.vocab_size, (batch, context + 1), device=device)
    clock = Clock(device)
    synchronize(device)
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **with_cache(cache),
        max_new_tokens=new_tokens,
        do_sample=False,
        disable_compile=not way.compiled,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    times = [start, *clock.times]
    steps = [after - before for before, after in zip(times, times[1:], strict=False)]
    steady = statistics.median(steps[_WARMUP:])
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "tok_s": batch / steady,
        "step_ms": steady * 1e3,
        # What compiling and capturing took beside the steps themselves.
        "first_steps_s": sum(steps[:_WARMUP]) - _WARMUP * steady,
        "cache_GB": held and held / 1e9,
        "peak_GB": peak and peak / 1e9,
    }


def measure(results: Results, model_name: str, quick: bool = False, tiny: bool = False) -> None:
    """The grid for one model."""
    read, _ = ceilings(results)
    part = "generate" if model_name in ("8B", "tiny") else f"generate-{model_name}"
    results.part(part, f"{model_name} shape, random bf16 weights; floor: (weights + KV) / {read / 1e9:.0f} GB/s")
    model = build_model("tiny" if tiny else model_name, results.device)
    new_tokens = 12 if tiny else 24 if quick else 40
    cells = [(2, 65, len(WAYS))] if tiny else CELLS[:2] if quick else CELLS
    for batch, context, num_ways in cells:
        for way in WAYS[: 4 if quick else num_ways]:

            def measured(way: Way = way, batch: int = batch, context: int = context) -> dict[str, Any]:
                values = run(model, way, batch, context, new_tokens)
                floor = (weight_bytes(model) + cache_bytes(model, batch, context, way.kv_cache_dtype)) / read
                return {**values, "share_of_floor": floor / (values["step_ms"] / 1e3)}

            results.row({"model": model_name, "batch": batch, "context": context, "cache": way.name}, measured)
    torch._dynamo.reset()
