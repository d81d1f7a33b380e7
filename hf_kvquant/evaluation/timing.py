"""One `generate`, timed token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache

from ..generation import compiles_unasked
from ..hosts.conventions import with_cache
from ..hosts.devices import input_device
from .caches import held_bytes
from .memory import free, peak_bytes, reset_peak, synchronize

# Steps after the first token that do not count: where `generate` compiles, they warm up and record a graph.
SETTLING = 4


class Clock(StoppingCriteria):
    """Notes when each step was done; never stops."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        synchronize(self.device)  # the CPU would wait for the token in any case
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Run:
    """The numbers of one `generate`.

    Attributes:
        first_token_s: seconds from the call, the making of the cache included, to the first new token.
        inter_token_ms: milliseconds between later tokens, the first few of which are left out.
        cache_bytes: what the cache held in the end.
        peak_bytes: the most memory since the call, see `memory.peak_kind`; None where the system does not tell.
        compiled: whether `generate` compiled its steps.
    """

    first_token_s: float
    inter_token_ms: list[float]
    cache_bytes: int
    peak_bytes: int | None
    compiled: bool


def generate_once(model: PreTrainedModel, make: Callable[[int], Cache], ids: torch.Tensor, new_tokens: int) -> Run:
    """Generate `new_tokens` greedily after `ids` `[B, T]` over a cache that `make` makes, and time it.

    `make` is given the tokens that a sequence reaches. The end of a text does not end it.
    """
    device = input_device(model)
    free(device)
    reset_peak(device)
    clock = Clock(device)
    synchronize(device)
    start = time.perf_counter()
    cache = make(ids.shape[1] + new_tokens)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **with_cache(cache),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=model.config.get_text_config(decoder=True).vocab_size,  # an id that no token has
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    counted = clock.times[SETTLING:]
    return Run(
        first_token_s=clock.times[0] - start,
        inter_token_ms=[round((after - before) * 1e3, 4) for before, after in zip(counted, counted[1:], strict=False)],
        cache_bytes=held_bytes(cache),
        peak_bytes=peak_bytes(device),
        # transformers' own condition.
        compiled=compiles_unasked(device) and cache.is_compileable and type(cache) is not DynamicCache,
    )
