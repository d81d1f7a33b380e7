"""What a cache costs in quality: its numbers, and measuring them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from ..cache import QuantizedPagedCache
from ..hosts.conventions import with_cache
from .agreement import Agreement, AgreementSums
from .caches import held_bytes
from .errors import layer_errors
from .windows import chunk_sizes


@dataclass(frozen=True)
class Quality:
    """The numbers of one cache.

    Attributes:
        steps: the ends of windows token by token, as in generation.
        chunks: over whole windows in growing chunks.
        greedy_match: share of equal tokens, place by place, in greedy continuations of the prompts.
        first_divergence: for each window the first place where the continuations differ; None where they never do.
        k_error: for each layer the relative RMS error of the keys that the cache gives back, in the last window; None
            for layers that keep none (see `errors.layer_errors`).
        v_error: the same of V.
        attention_error: the same of what attention makes of them, every layer by itself.
        clipped: for each layer how many numbers of K and V were beyond their static scales, in all windows in chunks;
            None for transformers' caches.
        bytes_held: with one window in it, memory that is held but not used included.
        scales: where the scales of ours come from, every source once; None for transformers' caches.
    """

    steps: Agreement
    chunks: Agreement
    greedy_match: float
    first_divergence: list[int | None]
    k_error: list[float | None]
    v_error: list[float | None]
    attention_error: list[float | None]
    clipped: list[int] | None
    bytes_held: int
    scales: list[str] | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Quality:
        """From what `dataclasses.asdict` made of one."""
        return cls(**{**data, "steps": Agreement(**data["steps"]), "chunks": Agreement(**data["chunks"])})


class QualityRun:
    """Measures one cache after the other on the same windows.

    Args:
        model: in evaluation mode.
        windows: token ids `[T]` each, all of the same length.
        new_tokens: length of the greedy continuations.
        steps: tokens at the end of each window that are read one by one.
        on_window: called whenever a cache has read a window.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Sequence[torch.Tensor],
        new_tokens: int,
        steps: int,
        on_window: Callable[[], object],
    ) -> None:
        self._model = model
        self._on_window = on_window
        self._windows = windows
        self._new_tokens = new_tokens
        self._steps = steps
        self._text_config = model.config.get_text_config(decoder=True)
        self._expected: list[torch.Tensor] = []  # greedy continuations over the unquantized cache

    @torch.no_grad()
    def measure(self, make: Callable[[], Cache]) -> Quality:
        """The numbers of the caches that `make` makes. Raises ArithmeticError where predictions are no numbers."""
        steps, chunks = AgreementSums(), AgreementSums()
        clipped: list[int] | None = None
        scales: list[str] | None = None
        for window in self._windows:
            prompt = len(window) - self._steps
            following = [prompt] + [1] * (len(window) - 1 - prompt)
            for prediction in self._predictions(window, following, make()):
                steps.add(*(each[-1:] for each in prediction))  # a fresh prompt does not read what is stored
            cache = make()
            for prediction in self._predictions(window, chunk_sizes(len(window) - 1), cache):
                chunks.add(*prediction)
            if isinstance(cache, QuantizedPagedCache):
                clipped = clipped or [0] * len(cache.layers)
                layers = cache.report().layers
                for layer in layers:
                    clipped[layer.layer] += sum(layer.clipped)
                # Without the tensor's name, which is each layer's own.
                scales = list(dict.fromkeys(source.split(":")[0] for layer in layers for source in layer.scales))
            self._on_window()
        bytes_held = held_bytes(cache)
        last = self._windows[-1][:-1]
        errors = layer_errors(self._model, last.split(chunk_sizes(len(last))), make())
        match, places = self._continuations(make)
        return Quality(
            steps.agreement(), chunks.agreement(), match, places, errors.key, errors.value, errors.attention, clipped,
            bytes_held, scales,
        )  # fmt: skip

    def _dense(self) -> Cache:
        return DynamicCache(config=self._text_config)

    def _predictions(
        self, window: torch.Tensor, sizes: list[int], cache: Cache
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each piece of a window what follows `[T]`, the logits `[T, vocabulary]` of a dense cache and of this."""
        dense = self._dense()
        for tokens, following in zip(window[:-1].split(sizes), window[1:].split(sizes), strict=True):
            expected, seen = self._logits(tokens, dense), self._logits(tokens, cache)
            yield following.to(seen.device), expected, seen

    def _logits(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        logits: torch.Tensor = self._model(input_ids=tokens[None], **with_cache(cache)).logits
        return logits[0].float()

    def _greedy(self, prompt: torch.Tensor, cache: Cache) -> torch.Tensor:
        """`new_tokens` token ids; the end of a text does not end it."""
        tokens = [prompt]
        for _ in range(self._new_tokens):
            tokens.append(self._logits(tokens[-1], cache)[-1:].argmax(dim=-1).to(prompt.device))
        return torch.cat(tokens[1:])

    def _continuations(self, make: Callable[[], Cache]) -> tuple[float, list[int | None]]:
        prompts = [window[: len(window) // 2] for window in self._windows]
        if not self._expected:
            self._expected = [self._greedy(prompt, self._dense()) for prompt in prompts]
        differs = torch.stack([
            self._greedy(prompt, make()) != expected for prompt, expected in zip(prompts, self._expected, strict=True)
        ])  # fmt: skip
        places = [int(row.int().argmax()) if row.any() else None for row in differs]
        return 1 - differs.float().mean().item(), places
