"""How far what a cache gives back is from what was put into it, layer by layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..cache import QuantizedPagedCache


class Watched:
    """A cache, of which is kept what is put into it and what it gave back last."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._put: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._returned: dict[int, Any] = {}
        update = cache.update

        def watched(key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
            self._put.setdefault(layer, []).append((key, value))
            self._returned[layer] = update(key, value, layer, *args, **kwargs)
            return self._returned[layer]

        cache.update = watched  # type: ignore[method-assign]

    def errors(self) -> tuple[list[float | None], list[float | None]]:
        """Relative RMS errors of K and of V, a number a layer; the watching ends."""
        del self._cache.update  # type: ignore[method-assign]
        # Under our attention `update` does not return dense tensors, but iterating does.
        held = list(self._cache) if isinstance(self._cache, QuantizedPagedCache) else self._returned
        layers = range(len(self._cache.layers))
        sides: list[list[float | None]] = [
            [_relative_error([put[side] for put in self._put[layer]], held[layer][side]) if layer in self._put else None
             for layer in layers]
            for side in (0, 1)
        ]  # fmt: skip
        return sides[0], sides[1]


def _relative_error(put: list[torch.Tensor], got: torch.Tensor) -> float | None:
    """Of the newest tokens that both have (a window forgets), `[B, H, T, D]`; None where all is zero."""
    expected = torch.cat(put, dim=-2)
    num_tokens = min(expected.shape[-2], got.shape[-2])
    expected, got = (x[..., -num_tokens:, :].float() for x in (expected, got))
    scale = expected.square().mean().item()
    return math.sqrt((got - expected).square().mean().item() / scale) if scale else None
