"""Steps that broke off in the middle of a model (an error, an interrupt): its first layers have the tokens, others lack
them. They are found when the cache is used again, and taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .growing import GrowingLayer
from .hosts.attention_modules import attention_paths
from .hybrid import HybridFixedLayer, HybridGrowingLayer
from .layers import PagedLayer

if TYPE_CHECKING:
    from .cache import QuantizedPagedCache

logger = logging.get_logger(__name__)


def take_back_broken_step(cache: QuantizedPagedCache, is_between_calls: bool = True) -> int:
    """Take back the tokens of a step that has not come to all layers of `cache`; returns how many.

    Args:
        is_between_calls: whether the cache is a whole model's, which a last layer without tokens may lack them in, and
            there is time to ask a device for lengths.

    Raises RuntimeError if they cannot be taken back.
    """
    layers = cache._paged_layers
    filled = [layer for layer in layers if not layer.is_empty]
    if not filled:
        for table in cache._tables:  # a first step may have come no further
            if table.length:
                table.clear()
    if not filled or cache.shared.part != (0, 1):  # the other layers are other processes'
        return 0
    growing = [layer for layer in filled if isinstance(layer, GrowingLayer)]
    lengths: set[int] = set()
    if growing:
        lengths = _lengths_of_growing(growing)
    elif is_between_calls:
        lengths = _lengths_of_fixed(filled)
    if is_between_calls and layers[-1].is_empty and _is_first_step(cache, filled[0], layers[-1]):
        lengths |= {0, *(int(layer.get_seq_length()) for layer in filled)}
    if len(lengths) < 2:
        return 0
    before, after = min(lengths), max(lengths)
    note = f"a step broke off before it came to all layers; its {after - before} token(s) are taken back"
    if before <= cache.shared.num_virtual:  # what an adapter has put there belongs to the first step
        cache.reset()
    else:
        _check(cache, lengths)
        _crop(cache, filled, before)
    cache.notes.append(note)
    logger.warning(f"{note}.")
    return after - before


def _lengths_of_growing(layers: Sequence[GrowingLayer]) -> set[int]:
    """How many tokens layers and their tables have, if one lacks what others of its table or cache have."""
    tables = {id(layer.table): layer.table for layer in layers}
    lengths = {length for layer in layers for length in (layer.length, layer.table.length)}
    lags = any(layer.length != layer.table.length for layer in layers) or any(
        id(other) in tables and other.length != table.length for table in tables.values() for other in table.siblings
    )
    return lengths if lags else set()


def _lengths_of_fixed(layers: Sequence[PagedLayer]) -> set[int]:
    """How many tokens layers have, if the first have one step more than the others."""
    lengths = torch.stack([layer.get_seq_length().cpu() for layer in layers]).tolist()
    is_a_step = lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] == layers[0].num_prompt
    return set(lengths) if is_a_step else set()


def _is_first_step(cache: QuantizedPagedCache, first: PagedLayer, last: PagedLayer) -> bool:
    """Whether `last`, which is empty, may only lack the step that has come to the first layer.

    Some models have no such layer (cut short), and in some it attends to something else that is not there (images).
    """
    if int(first.get_seq_length()) != first.num_prompt + cache.shared.num_virtual:
        return False
    model = cache.shared.model() if cache.shared.model is not None else None
    if not isinstance(model, PreTrainedModel):
        return False
    path = attention_paths(model, len(cache.layers))[last.index]
    return path is not None and "Cross" not in type(model.get_submodule(path)).__name__


def _check(cache: QuantizedPagedCache, lengths: set[int]) -> None:
    """Raise RuntimeError if what the step has changed is not known, or cannot be changed back."""
    before, after = min(lengths), max(lengths)
    reason = None
    if len(lengths) > 2:
        reason = f"layers hold {sorted(lengths)} tokens"
    elif any(_has_own_state(cache, layer) for layer in cache.layers):
        reason = "layers of transformers have a state of their own, which may have moved on"
    else:
        try:
            for layer in cache._paged_layers:
                layer.check_crop(after - before)
                if isinstance(layer, GrowingLayer):
                    layer.table.check_crop(layer.table.length - before)
        except RuntimeError as error:
            reason = str(error)
    if reason is not None:
        raise RuntimeError(
            f"a step broke off in this cache before it came to all layers, and its {after - before} token(s) cannot be "
            f"taken back: {reason}; reset() the cache and compute the text again"
        )


def _has_own_state(cache: QuantizedPagedCache, layer: Any) -> bool:
    if isinstance(layer, (HybridGrowingLayer, HybridFixedLayer)):
        return True
    return not isinstance(layer, PagedLayer) and cache._stored_nbytes(layer) > 0


def _crop(cache: QuantizedPagedCache, layers: Sequence[PagedLayer], length: int) -> None:
    for layer in layers:
        layer.settle()
    for table in cache._tables:
        if table.length > length:
            table.crop(table.length - length)
    for layer in layers:
        too_many = int(layer.get_seq_length()) - length
        if isinstance(layer, GrowingLayer):
            layer.follow_crop(too_many)
        elif too_many:
            layer.crop(-too_many)
