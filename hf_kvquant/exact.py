"""The first and the newest tokens of a layer in the model's dtype, beside its 8-bit pages.

The pages hold all tokens, these among them, so whatever happens to pages need not know of this. Attention reads them
from here instead: a token attends to the first `num_first` tokens, to itself and to the `num_recent - 1` before it as
the model made them, to all others in 8 bits, and both parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .ops import PagedTensor, paged_attention
from .stores import mutable_everywhere

# How many tokens may be taken back and be followed by others without asking the pages for older ones.
SLACK = 64

_Pair = tuple[torch.Tensor, torch.Tensor]
_Length = int | torch.Tensor  # of the sequences; on the device where the host does not know it


@dataclass(frozen=True)
class ExactStep:
    """What one step sees of these tokens.

    Attributes:
        num_first, num_recent: as of `ExactTokens`.
        held: K and V `[B, H, num_first + n, D]` after the step.
        before, new: K and V of before the step, and those of the step `[B, H, T, D]`; None if it adds none.
    """

    num_first: int
    num_recent: int
    held: _Pair
    before: _Pair | None = None
    new: _Pair | None = None

    def tokens(self, side: int, num_newest: int, behind: int = 0) -> torch.Tensor:
        """K (0) or V (1) `[B, H, num_first + num_newest, D]`, the newest but for the last `behind`."""
        held = self.held[side]
        if num_newest + self.num_first == held.shape[2] and not behind:
            return held
        newest = held[:, :, self.num_first :]
        if num_newest + behind > newest.shape[2] and self.before is not None and self.new is not None:
            newest = torch.cat([self.before[side][:, :, self.num_first :], self.new[side]], dim=2)
        end = newest.shape[2] - behind
        return torch.cat([held[:, :, : self.num_first], newest[:, :, end - num_newest : end]], dim=2)


class ExactTokens:
    """The tokens of one layer that are kept as the model made them.

    Args:
        num_recent: newest tokens, itself among them, that a token attends to.
        in_place: whether the memory stays where it is from step to step; else every step makes it anew, so that
            copies of a layer can share it.
    """

    def __init__(self, num_recent: int, in_place: bool) -> None:
        self.num_first = 0
        self.num_recent = num_recent
        self.in_place = in_place
        self.held: _Pair | None = None  # [B, H, num_first + n, D]: the first ones, and the newest at the end

    @property
    def nbytes(self) -> int:
        return 0 if self.held is None else sum(tensor.nbytes for tensor in self.held)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExactTokens:
        other = copy.copy(self)
        if self.in_place and self.held is not None:
            other.held = (self.held[0].clone(), self.held[1].clone())
        return other

    def reserve(self, key: torch.Tensor, value: torch.Tensor, num_first: int) -> None:
        """Begin anew, for sequences like `key` and `value` and `num_first` tokens from their start."""
        self.num_first = num_first
        shapes = [
            (*x.shape[:2], self.num_first + self.num_recent + self.in_place * SLACK, x.shape[3]) for x in (key, value)
        ]
        if self.held is not None and self.in_place and [tuple(x.shape) for x in self.held] == shapes:
            for tensor in self.held:
                tensor.zero_()
            return
        with mutable_everywhere():
            self.held = (key.new_zeros(shapes[0]), value.new_zeros(shapes[1]))
        self.mark_addresses()

    def restore(self, key: torch.Tensor, value: torch.Tensor, num_first: int) -> None:
        """Hold what a layer of the same kind has held."""
        self.num_first = num_first
        with mutable_everywhere():
            self.held = (key.clone(), value.clone())
        self.mark_addresses()

    def mark_addresses(self) -> None:
        """Tell the compiler that memory stays where it is, if it does."""
        if self.in_place and self.held is not None and not torch.compiler.is_compiling():
            for tensor in self.held:
                torch._dynamo.mark_static_address(tensor)

    def clear(self) -> None:
        """Forget the tokens."""
        if not self.in_place:
            self.held = None

    def append(self, key: torch.Tensor, value: torch.Tensor, length: _Length, keeps_past: bool = False) -> ExactStep:
        """Take new tokens `[B, H, T, D]` of sequences that had `length`; returns what their attention sees.

        With `keeps_past` some more of the newest are held, so that those that are taken back leave enough.
        """
        assert self.held is not None  # noqa: S101 - reserved at the first update
        new, before = (key.detach(), value.detach()), self.held
        num_held = self.num_recent + (SLACK if keeps_past or self.in_place else 0)
        after = tuple(self._appended(old, x, length, num_held) for old, x in zip(before, new, strict=True))
        if self.in_place:
            if key.shape[2] - 1 + self.num_recent > num_held:  # the step sees more than is held
                before = (before[0].clone(), before[1].clone())
            for old, x in zip(self.held, after, strict=True):
                old.copy_(x)
        else:
            self.held = (after[0], after[1])
        return ExactStep(self.num_first, self.num_recent, self.held, before, new)

    def _appended(self, old: torch.Tensor, new: torch.Tensor, length: _Length, num_held: int) -> torch.Tensor:
        first, newest = old[:, :, : self.num_first], old[:, :, self.num_first :]
        if self.num_first and not (isinstance(length, int) and length >= self.num_first):
            source = torch.arange(self.num_first, device=new.device) - length
            arrives = (source >= 0) & (source < new.shape[2])
            first = torch.where(arrives[:, None], new.index_select(2, source.clamp(0, new.shape[2] - 1)), first)
        num_kept = max(num_held - new.shape[2], 0)
        kept = newest[:, :, max(newest.shape[2] - num_kept, 0) :]
        return torch.cat([first, kept, new[:, :, max(new.shape[2] - num_held, 0) :]], dim=2)

    def now(self) -> ExactStep:
        """What attention sees that adds no tokens."""
        assert self.held is not None  # noqa: S101 - reserved at the first update
        return ExactStep(self.num_first, self.num_recent, self.held)

    # -- operations ------------------------------------------------------------------------------------------------

    def crop(self, num_tokens: int, read: Callable[[int, int, int], torch.Tensor]) -> None:
        """Forget the last `num_tokens`; what is to be held instead comes from the pages.

        `read(side, end, count)` gives K (0) or V (1) `[B, H, count, D]` of the tokens before the last `end` ones.
        """
        if self.held is None or not num_tokens:
            return

        def cropped(old: torch.Tensor, side: int) -> torch.Tensor:
            num_held = old.shape[2] - self.num_first
            num_kept = max(num_held - num_tokens, 0)
            num_wanted = num_held if self.in_place else max(num_kept, self.num_recent)
            parts = [old[:, :, : self.num_first], old[:, :, self.num_first : self.num_first + num_kept]]
            if num_wanted > num_kept:
                parts.insert(1, read(side, num_kept, num_wanted - num_kept).to(old.dtype))
            return torch.cat(parts, dim=2)

        self._replace(cropped(self.held[0], 0), cropped(self.held[1], 1))

    def select(self, indices: Sequence[int]) -> None:
        """Sequence i becomes a copy of sequence `indices[i]`."""
        if self.held is not None:
            order = torch.tensor(list(indices), dtype=torch.int64).to(self.held[0].device, non_blocking=True)
            self._replace(self.held[0].index_select(0, order), self.held[1].index_select(0, order))

    def _replace(self, key: torch.Tensor, value: torch.Tensor) -> None:
        if self.in_place and self.held is not None:
            with mutable_everywhere():
                self.held[0].copy_(key)
                self.held[1].copy_(value)
        else:
            self.held = (key, value)


# -- attention ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """Which tokens are read from pages and which as the model made them.

    Attributes:
        step: the latter.
        length: of the sequences, up to the newest query.
        num_queries: T.
        by_query: whether every query has recent tokens of its own; else all have those of the newest.
    """

    step: ExactStep
    length: _Length
    num_queries: int
    by_query: bool
    device: torch.device

    @property
    def num_newest(self) -> int:
        return self.step.num_recent - 1 + (self.num_queries if self.by_query else 1)

    @property
    def queries(self) -> torch.Tensor:
        """Positions `[T, 1]`, or `[1, 1]` of the newest."""
        num = self.num_queries if self.by_query else 1
        return (torch.arange(num, device=self.device) - num + self.length)[:, None]

    @property
    def positions(self) -> torch.Tensor:
        """Of the tokens of the step, `[num_first + num_newest]`; before the first token where there are fewer."""
        first = torch.arange(self.step.num_first, device=self.device)
        newest = torch.arange(self.num_newest, device=self.device) - self.num_newest + self.length
        # Those that are among the first ones as well are taken from there.
        return torch.cat([first, torch.where(newest < self.step.num_first, -1, newest)])

    def visible(self, causal: bool, window: int | None) -> torch.Tensor | None:
        """bool `[T | 1, num_first + num_newest]`, None if all are."""
        step = self.step
        if (
            isinstance(self.length, int)
            and self.num_newest == step.num_recent
            and self.length >= step.num_first + step.num_recent
            and (window is None or window >= step.num_recent and not step.num_first)
        ):
            return None
        age = self.queries - self.positions
        seen = (self.positions >= 0) & ((age < step.num_recent) | (self.positions < step.num_first))
        seen = seen & (self.positions < self.length)
        if causal:
            seen = seen & (age >= 0)
        return seen if window is None else seen & (age < window)

    def older(self, mask: torch.Tensor, mask_start: int) -> torch.Tensor:
        """`mask` `[..., T, M]` without what a query sees of the newest tokens."""
        columns = mask_start + torch.arange(mask.shape[3], device=mask.device)
        return _hide(mask, self.queries - columns >= self.step.num_recent)

    def columns(self, mask: torch.Tensor, mask_start: int) -> torch.Tensor:
        """The part of `mask` `[..., T, M]` that is about the tokens of the step."""
        columns = self.positions - mask_start
        inside = (columns >= 0) & (columns < mask.shape[3])
        return _hide(mask.index_select(3, columns.clamp(0, mask.shape[3] - 1)), inside)


def _hide(mask: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))


def attend_in_parts(
    query: torch.Tensor,
    rounded: torch.Tensor,
    k: PagedTensor,
    v: PagedTensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    step: ExactStep,
    *,
    length: _Length,
    behind: int,
    adds_tokens: bool,
    softmax_scale: float,
    attn_mask: torch.Tensor | None = None,
    mask_start: int = 0,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """`ops.paged_attention` with the tokens of `step` in place of what pages hold of them.

    Args:
        query: `[B, Hq, T, D]`; `rounded` is what meets the keys in pages.
        length: what `seq_lens` says of all sequences, on the host if it is known there.
        behind: how many tokens of the step come after these queries.
        adds_tokens: whether the queries are the newest tokens.
        others: of `ops.paged_attention`.
    """
    batch_size, _, num_queries, _ = query.shape
    split = _Split(
        step, length, num_queries, adds_tokens and num_queries > 1 and (causal or attn_mask is not None), query.device
    )
    seen = split.visible(causal, window)
    mask = None if seen is None else seen[None, None].expand(1, 1, num_queries, -1)
    if attn_mask is not None:
        part = split.columns(attn_mask, mask_start)
        mask = part if seen is None else _hide(part, seen)
    key, value = (step.tokens(side, split.num_newest, behind) for side in (0, 1))
    lse, exact_lse = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
    first_column = step.num_first // k.pages.shape[2]
    has_others = page_table.shape[1] > first_column
    exact_output = paged_attention(
        query, PagedTensor(key, "model"), PagedTensor(value, "model"),
        torch.arange(batch_size, dtype=torch.int32, device=query.device)[:, None],
        torch.full((batch_size,), key.shape[2], dtype=torch.int32, device=query.device),
        softmax_scale=softmax_scale, attn_mask=mask, sinks=None if has_others else sinks, softcap=softcap, causal=False,
        lse=exact_lse,
    )  # fmt: skip
    if not has_others:
        return exact_output

    # The pages: what a query sees there ends `num_recent` tokens before it, as if it and they came that much earlier.
    shift = step.num_recent
    if split.by_query and attn_mask is not None:
        shift, attn_mask = 0, split.older(attn_mask, mask_start)
    output = paged_attention(
        rounded, k, v, page_table[:, first_column:], seq_lens - (step.num_first + shift),
        softmax_scale=softmax_scale, attn_mask=attn_mask, mask_start=mask_start - step.num_first, sinks=sinks,
        softcap=softcap, window=None if window is None else max(window - shift, 0), causal=causal, lse=lse,
    )  # fmt: skip
    return _merged(output, lse, exact_output, exact_lse)


def _merged(one: torch.Tensor, one_lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Two outputs of one softmax over what both have seen; zeros where neither has seen anything."""
    share = torch.sigmoid(other_lse - one_lse)[..., None]
    share = torch.where(other_lse[..., None] == float("-inf"), 0.0, share)
    return torch.lerp(one.to(torch.float32), other.to(torch.float32), share).to(one.dtype)


def overlay(dense: torch.Tensor, side: int, step: ExactStep, start: int, end: _Length, num_new: int) -> torch.Tensor:
    """`dense` `[B, H, L, D]`, tokens from `start` on, with those of `step` as the model made them.

    Sequences have `end` tokens; each of the `num_new` newest gets all that it attends to exactly.
    """
    num_newest = step.num_recent + max(num_new - 1, 0)
    exact = step.tokens(side, num_newest)
    positions = start + torch.arange(dense.shape[2], device=dense.device)
    is_first, is_newest = positions < step.num_first, positions >= end - num_newest
    source = torch.where(is_first, positions, positions - end + num_newest + step.num_first)
    chosen = exact.index_select(2, source.clamp(0, exact.shape[2] - 1))
    return torch.where(((is_first | is_newest) & (positions < end))[:, None], chosen, dense)
