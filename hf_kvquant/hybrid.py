"""Layers with both attention and a linear-attention state: paged keys and values, transformers' own state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from .fixed import FixedLayer
from .growing import GrowingLayer
from .layers import PagedLayer


class _Hybrid(PagedLayer):
    """Every operation on both states; stands before the paged layer among the bases."""

    def __init__(self, *args: Any, number_of_states: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # transformers calls it with two positional arguments for attention, by keyword for the linear state.
        if args:
            super().lazy_initialization(*args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return LinearAttentionCacheLayerMixin.is_croppable.fget(self)

    def check_crop(self, num_tokens: int) -> None:
        super().check_crop(num_tokens)
        if not self.record_past:
            raise RuntimeError(
                f"layer {self.index}: a linear-attention state cannot be taken back unless it was recorded; call "
                "activate_past_recording() before the tokens are added"
            )

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        LinearAttentionLayer.activate_past_recording(self)

    def follow_reset(self) -> None:
        LinearAttentionLayer.reset(self)
        super().follow_reset()

    def follow_crop(self, num_tokens: int) -> None:
        LinearAttentionLayer.crop(self, -num_tokens)
        super().follow_crop(num_tokens)

    def follow_select(self, indices: Sequence[int]) -> None:
        LinearAttentionLayer.reorder_cache(self, torch.tensor(list(indices), dtype=torch.int64, device="cpu"))
        super().follow_select(indices)

    @property
    def state_nbytes(self) -> int:
        states = (*self.conv_states.values(), *self.recurrent_states.values())
        return sum(state.nbytes for state in states if state is not None)


class HybridGrowingLayer(_Hybrid, GrowingLayer, LinearAttentionAndFullAttentionLayer):
    """With pages that grow."""


class HybridFixedLayer(_Hybrid, FixedLayer, LinearAttentionAndFullAttentionLayer):
    """With pages at fixed addresses."""
