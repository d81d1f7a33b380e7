"""How far what a cache gives back, and attention over it, are from what they were given, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from ..cache import QuantizedPagedCache
from ..dtypes import to_float64
from ..hosts.attention_modules import attention_paths
from ..hosts.conventions import with_cache
from ..hosts.wrappers import without_wrapper


@dataclass(frozen=True)
class LayerErrors:
    """Relative RMS errors, one per layer; None for layers that keep no keys and values of their own.

    Also None where no attention module carries the layer's index, as in models that use one module for several layers.

    Attributes:
        key: of the keys that the cache gives back, against those that were put in.
        value: the same of the values.
        attention: of the output of the attention module over the cache, against over the unquantized one.
    """

    key: list[float | None]
    value: list[float | None]
    attention: list[float | None]


@torch.no_grad()
def layer_errors(model: PreTrainedModel, pieces: Sequence[torch.Tensor], cache: Cache) -> LayerErrors:
    """What `cache` does to each layer by itself: every layer is given what it gets with the unquantized cache.

    The model reads the text over an unquantized cache; beside it each attention module is run once more, with the same
    input and so the same queries, over `cache`. Errors therefore do not add up from layer to layer. The first piece
    does not count for attention: a fresh prompt attends to itself, not to what is stored.

    Args:
        model: in evaluation mode.
        pieces: token ids `[T]` of consecutive pieces of a text, two at least.
        cache: an empty cache for the model; it holds the text afterwards.
    """
    dense = DynamicCache(config=model.config.get_text_config(decoder=True))
    put, held = _returned_last(dense), _returned_last(cache)
    core = without_wrapper(model)
    modules = dict(core.named_modules())
    paths = attention_paths(core, len(dense.layers))
    watched = {index: _Beside(modules[path], dense, cache) for index, path in enumerate(paths) if path is not None}
    try:
        for piece in pieces:
            model(input_ids=piece[None], **with_cache(dense))
            for beside in watched.values():
                beside.counts = True
    finally:
        for beside in watched.values():
            beside.remove()
        del cache.update, dense.update  # type: ignore[method-assign]
    # What the next token would get. Under our attention `update` does not return dense tensors, but iterating does.
    contents: dict[int, Any] = (
        dict(enumerate(cache)) if isinstance(cache, QuantizedPagedCache) else {i: _read(cache, i, put[i]) for i in held}
    )
    layers = [index if index in held else None for index in range(len(dense.layers))]
    sides = [[None if i is None else _stored_error(put[i][side], contents[i][side]) for i in layers] for side in (0, 1)]
    attention = [watched[i].squares.relative_error() if i in watched else None for i in layers]
    return LayerErrors(sides[0], sides[1], attention)


class _Beside:
    """Runs a module once more, whenever it is given one cache, over another, and compares what comes out."""

    def __init__(self, module: torch.nn.Module, cache: Cache, other: Cache) -> None:
        self.squares = _Squares()
        self.counts = False  # whether outputs are compared
        self._cache, self._other = cache, other
        self._instead: tuple[list[Any], dict[str, Any]] | None = None
        self._hooks = [
            # First of all: other hooks (compressed-tensors has one) may put a wrapper around the cache.
            module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            module.register_forward_hook(self._after),
        ]

    def _before(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Models differ in what they call the argument.
        has_cache = any(value is self._cache for value in (*args, *kwargs.values()))
        named = {name: self._other if value is self._cache else value for name, value in kwargs.items()}
        self._instead = (
            ([self._other if value is self._cache else value for value in args], named) if has_cache else None
        )

    def _after(self, module: torch.nn.Module, _: tuple[Any, ...], output: Any) -> None:
        if self._instead is None:
            return
        args, kwargs = self._instead
        beside = module(*args, **kwargs)  # comes through these hooks again, without the first cache
        if self.counts:
            self.squares.add(_first(output), _first(beside))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


class _Squares:
    """Sums of squares, of numbers and of their errors."""

    def __init__(self) -> None:
        self._numbers = self._errors = 0.0

    def add(self, expected: torch.Tensor, got: torch.Tensor) -> None:
        self._numbers += to_float64(expected).square().sum().item()
        self._errors += (to_float64(got) - to_float64(expected)).square().sum().item()

    def relative_error(self) -> float | None:
        """None where there is nothing to be relative to."""
        return math.sqrt(self._errors / self._numbers) if self._numbers else None


def _returned_last(cache: Cache) -> dict[int, Any]:
    """What `update` of each layer has returned last; kept up to date until `update` is deleted from the cache."""
    returned: dict[int, Any] = {}
    update = cache.update

    def watched(key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        returned[layer] = update(key, value, layer, *args, **kwargs)
        return returned[layer]

    cache.update = watched  # type: ignore[method-assign]
    return returned


def _read(cache: Cache, layer: int, put: Sequence[torch.Tensor]) -> Any:
    """Keys and values `[B, H, T, D]` of a cache of transformers, all of them from where they are stored."""
    return cache.update(put[0][..., :0, :], put[1][..., :0, :], layer)


def _stored_error(put: torch.Tensor, got: torch.Tensor) -> float | None:
    """Of the newest tokens that both have (a window forgets), `[B, H, T, D]`."""
    num_tokens = min(put.shape[-2], got.shape[-2])
    squares = _Squares()
    squares.add(put[..., -num_tokens:, :], got[..., -num_tokens:, :])
    return squares.relative_error()


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return tensor
