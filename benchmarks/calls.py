"""Calls of `generate` one after the other, each with a prompt of another length, as an evaluation makes them.

What steps cost is measured elsewhere. Here a call is timed from its start to its end, with all that it has to make
anew: the cache, and, where its addresses or sizes are others than before, recordings of CUDA graphs. The longest prompt
comes first.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_kvquant.evaluation.memory import free, synchronize

from .models import build_model
from .results import Results

LENGTHS = (1024, 640, 961, 512, 1000, 768, 895, 701, 577, 990)
TINY_LENGTHS = (33, 17, 30)


@dataclass(frozen=True)
class Caller:
    """How `generate` is asked for its cache."""

    name: str
    attention: str
    options: dict[str, Any]


CALLERS = (
    Caller("kvquant fp8", "kvquant_fp8", {}),
    Caller("kvquant fp8 eager", "kvquant_fp8", {"disable_compile": True}),
    Caller("DynamicCache", "sdpa", {}),
    Caller("StaticCache", "sdpa", {"cache_implementation": "static"}),
)


def run(model: PreTrainedModel, caller: Caller, lengths: tuple[int, ...], new_tokens: int) -> dict[str, Any]:
    """Seconds of the first call and of those after it, and what the memory holds when all are done."""
    device = model.device
    torch._dynamo.reset()
    model.set_attn_implementation(caller.attention)
    free(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    seconds = []
    for length in lengths:
        ids = torch.randint(3, model.config.vocab_size, (1, length), device=device)
        synchronize(device)
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, **caller.options
        )
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    left = torch.cuda.memory_allocated(device) - before if device.type == "cuda" else None
    return {
        "first_s": seconds[0],
        "later_s": statistics.median(seconds[1:]),
        "slowest_later_s": max(seconds[1:]),
        "tok_s": new_tokens / statistics.median(seconds[1:]),
        "left_GB": left and left / 1e9,
    }


def measure(results: Results, quick: bool = False, tiny: bool = False) -> None:
    """A row for each way to ask."""
    name = "tiny" if tiny else "1B"
    lengths, new_tokens = (TINY_LENGTHS, 4) if tiny else (LENGTHS[: 5 if quick else len(LENGTHS)], 64)
    results.part("calls", f"{name} shape, random bf16 weights; calls with prompts of {min(lengths)} to {max(lengths)}")
    model = build_model(name, results.device)
    for caller in CALLERS:
        results.row(
            {"model": name, "cache": caller.name},
            lambda caller=caller: run(model, caller, lengths, new_tokens),
        )
    torch._dynamo.reset()
