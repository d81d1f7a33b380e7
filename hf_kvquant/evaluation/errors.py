"""How far what a cache gives back, and attention over it, are from what they were given, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from ..cache import QuantizedPagedCache
from ..hosts import attention_paths, without_wrapper


@dataclass(frozen=True)
class LayerErrors:
    """Relative RMS errors, a number a layer; None for layers that keep no keys and values of their own.

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
    sums = [_Squares() for _ in dense.layers]
    counts = False

    def run_beside(squares: _Squares) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # Models differ in what they call the argument.
            instead = [cache if argument is dense else argument for argument in args]
            named = {name: cache if argument is dense else argument for name, argument in kwargs.items()}
            if any(argument is cache for argument in (*instead, *named.values())):
                beside = module.forward(*instead, **named)
                if counts:
                    squares.add(_first(output), _first(beside))

        return hook

    core = without_wrapper(model)
    modules = dict(core.named_modules())
    # Where an attention module lies within another, the outer one.
    hooks = [
        modules[path].register_forward_hook(run_beside(squares), with_kwargs=True)
        for squares, paths in zip(sums, attention_paths(core, len(sums)), strict=True)
        for path in paths[:1]
    ]
    try:
        for piece in pieces:
            model(input_ids=piece[None], past_key_values=dense, use_cache=True)
            counts = True
    finally:
        for handle in hooks:
            handle.remove()
        del cache.update, dense.update  # type: ignore[method-assign]
    # Under our attention `update` does not return dense tensors, but iterating does.
    contents = dict(enumerate(cache)) if isinstance(cache, QuantizedPagedCache) else held
    sides = [
        [
            _stored_error(put[layer][side], contents[layer][side]) if layer in held else None
            for layer in range(len(sums))
        ]
        for side in (0, 1)
    ]
    attention = [squares.relative_error() if index in held else None for index, squares in enumerate(sums)]
    return LayerErrors(sides[0], sides[1], attention)


class _Squares:
    """Sums of squares, of numbers and of their errors."""

    def __init__(self) -> None:
        self._numbers = self._errors = 0.0

    def add(self, expected: torch.Tensor, got: torch.Tensor) -> None:
        self._numbers += expected.double().square().sum().item()
        self._errors += (got.double() - expected.double()).square().sum().item()

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


def _stored_error(put: torch.Tensor, got: torch.Tensor) -> float | None:
    """Of the newest tokens that both have (a window forgets), `[B, H, T, D]`."""
    num_tokens = min(put.shape[-2], got.shape[-2])
    squares = _Squares()
    squares.add(put[..., -num_tokens:, :], got[..., -num_tokens:, :])
    return squares.relative_error()


def _first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return tensor
