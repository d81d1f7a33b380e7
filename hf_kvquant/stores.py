"""The bytes: K or V of one layer, its pages and its scales."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from . import huge_pages
from .formats import get_format
from .ops import PagedTensor, channel_absmax, read_pages
from .policy import SidePlan
from .rotary import RotaryLayout
from .scales import as_head_channel

# How small a channel may look in a short first prompt, in which some happen to be quiet, beside its head's median
# channel; and how small that may be beside the largest, where most hold nothing.
_QUIETEST = 1 / 16
_SMALLEST_MEDIAN = 2**-13
# A single token says little of the channels, so factors are not below this to the power of the number of tokens.
_PER_TOKEN = 1 / 4
# Where keys are turned in an unknown way only channels so far above the median stand out.
_FAR_ABOVE_MEDIAN = 4.0
# How small a channel may be beside its head's largest, and a head beside the layer's, under static scales, which cannot
# be widened later by a token's own scale.
_STATIC_SHARE = 1 / 16


class PageStore:
    """Pages and scales of K or of V.

    Args:
        plan: format and kind of scales.
        num_heads, head_dim, page_size: H, D and S.
        dtype: the model's, for unquantized pages and for what `read` returns.
        where: layer and side, for errors.
        rotary: how the model turns keys; None for values.

    Raises ValueError if the plan's static scales do not fit the shape.
    """

    def __init__(
        self,
        plan: SidePlan,
        num_heads: int,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        where: str,
        rotary: RotaryLayout | None = None,
    ) -> None:
        self.plan = plan
        self.device = device
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.rotary = rotary
        self.source = plan.source
        self.dtype = dtype
        row = get_format(plan.format)

        def place(tensor: torch.Tensor | None, field: str) -> torch.Tensor | None:
            return (
                None if tensor is None else as_head_channel(tensor, num_heads, head_dim, f"{where}_{field}").to(device)
            )

        storage_dtype = row.storage_dtype or dtype
        dynamic = plan.kind == "dynamic"
        self.paged = PagedTensor(
            pages=torch.zeros(0, num_heads, page_size, head_dim, dtype=storage_dtype, device=device),
            format=plan.format,
            scale=place(plan.scale, "scale"),
            zero=place(plan.zero, "zero"),
            token_scale=torch.zeros(0, num_heads, page_size, dtype=torch.bfloat16, device=device) if dynamic else None,
        )
        self.needs_tokens = plan.kind == "first_batch" or plan.equalize

    # -- pages -----------------------------------------------------------------------------------------------------

    @property
    def at_rest(self) -> PagedTensor:
        """The pages where they stay between steps."""
        return self.paged

    @property
    def index_device(self) -> torch.device:
        return self.at_rest.pages.device

    def resize(self, num_pages: int) -> None:
        if num_pages == len(self.at_rest.pages):
            return

        def resized(store: torch.Tensor) -> torch.Tensor:
            num_kept = min(num_pages, len(store))
            try:
                other = _zeros(store, num_pages)
            except torch.OutOfMemoryError:
                if num_kept < num_pages:
                    raise
                return store[:num_kept]  # there is no room to move to: nothing is given back yet
            other[:num_kept] = store[:num_kept]
            return other

        self._each(resized)

    def clear(self, pages: torch.Tensor) -> None:
        self._each(lambda store: store.index_fill_(0, pages, 0))

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        self._each(lambda store: store.index_copy_(0, targets, store[sources]))

    def with_pages(self, pages: torch.Tensor) -> PageStore:
        """A store of its own with copies of these pages, numbered anew, and the same scales."""

        def copied(store: torch.Tensor) -> torch.Tensor:
            other = _zeros(store, len(pages))
            other[:] = store[pages]
            return other

        other = copy.copy(self)
        other.paged = replace(self.at_rest)
        other._each(copied)
        return other

    def select_rows(self, indices: torch.Tensor, batch_size: int) -> None:
        """Reorder whole sequences, for tables in which every sequence has its own run of pages."""
        self._each(
            lambda store: store.copy_(store.unflatten(0, (batch_size, -1))[indices.to(store.device)].flatten(0, 1))
        )

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with mutable_everywhere():
            paged = self.at_rest
            pages, token_scale = change(paged.pages), paged.token_scale
            if token_scale is not None:
                token_scale = change(token_scale)
            paged.pages, paged.token_scale = pages, token_scale

    # -- scales ----------------------------------------------------------------------------------------------------

    def observe(self, x: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Take what the plan needs from the first real tokens `[B, H, T, D]`; `valid` `[B, T]` is False for padding."""
        largest = channel_absmax(x, valid)
        partners = None if self.rotary is None else self.rotary.partners(largest.shape[1])
        partner = largest if partners is None else largest[:, partners]
        if self.plan.kind == "first_batch":
            num_tokens = x.shape[0] * x.shape[2] if valid is None else int(valid.sum())
            self._freeze(torch.maximum(largest, partner), num_tokens)
        else:
            # Half way to the partner, in logarithms: slow pairs turn little in most contexts.
            equalizer = self._equalizer(torch.maximum(largest, largest.sqrt() * partner.sqrt()))
            # Of the longest sequence: others often begin with the same tokens.
            longest = x.shape[2] if valid is None else valid.sum(dim=1).amax()
            self.set_scale(equalizer.clamp(min=_PER_TOKEN**longest))
            self.needs_tokens = False

    def set_scale(self, scale: torch.Tensor) -> None:
        """Take `scale` `[1 | H, 1 | D]` for everything that is written from now on."""
        self.paged.scale = scale

    def _equalizer(self, largest: torch.Tensor) -> torch.Tensor:
        """`[H, D]`, 1 for the largest channel of a head.

        Evened out altogether, ordinary channels would set most tokens' scales, each by a number that is large by
        chance, and large ones, which many models' queries read with large numbers, would be coarser than without. So
        ratios to the median become their square roots, and those of outliers half of themselves.
        """
        highest = largest.amax(dim=1, keepdim=True)
        relative = (largest / highest).nan_to_num(nan=1.0)  # of a head without numbers
        median = relative.median(dim=1, keepdim=True).values.clamp(min=_SMALLEST_MEDIAN)
        above = (relative / median).clamp(min=_QUIETEST)
        if self.rotary is not None and self.rotary.kind == "unknown":
            factor = (above / _FAR_ABOVE_MEDIAN).clamp(min=1.0)
        else:
            factor = torch.maximum(above.sqrt(), above / 2)
        return factor / factor.amax(dim=1, keepdim=True)

    def _freeze(self, largest: torch.Tensor, num_tokens: int) -> None:
        granularity, margin = self.plan.granularity, self.plan.margin
        whole = largest.amax()
        if whole == 0:  # a warm-up batch; the real tokens are still to come
            return
        if granularity == "tensor":
            largest = whole.reshape(1, 1)
        else:
            per_head = largest.amax(dim=1, keepdim=True).clamp(min=whole * _STATIC_SHARE)
            largest = per_head if granularity == "head" else largest.clamp(min=per_head * _STATIC_SHARE)
        self.set_scale(largest * (margin / get_format(self.plan.format).qmax))
        self.source = f"first batch ({num_tokens} tokens, per {granularity}, margin {margin:g})"
        self.needs_tokens = False

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, pages: torch.Tensor) -> torch.Tensor:
        """The pages `[B, N]` as `[B, H, N * S, D]` in the model's dtype."""
        return read_pages(self.paged, pages, self.dtype)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page with its token scales."""
        tensors = (self.at_rest.pages, self.at_rest.token_scale)
        return sum(t.element_size() * t.shape[1:].numel() for t in tensors if t is not None)

    @property
    def nbytes_allocated(self) -> int:
        return sum(t.nbytes for t in (self.at_rest.pages, self.at_rest.token_scale) if t is not None)

    @property
    def scale_nbytes(self) -> int:
        return sum(t.nbytes for t in (self.at_rest.scale, self.at_rest.zero) if t is not None)


def _zeros(store: torch.Tensor, num_pages: int) -> torch.Tensor:
    """Zeroed pages like those of `store`."""
    return huge_pages.empty((num_pages, *store.shape[1:]), store.dtype, store.device).zero_()


def mutable_everywhere() -> AbstractContextManager[Any]:
    """Tensors made here can be written to later, even if this is inference mode and that is not.

    A graph has one mode.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def keep_in_place(tensor: torch.Tensor) -> None:
    """Tell the compiler that a tensor stays where it is; a graph may be run for another cache's all the same."""
    torch._dynamo.mark_static_address(tensor, guard=False)  # older compilers guard by default
