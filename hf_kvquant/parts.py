"""Attention in two parts: over tokens as the model made them, and over the pages for all others.

Each part gives the logarithm of its sum of exponentials, by which both outputs are weighed, as in splits of one long
sequence (Flash-Decoding).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from .exact import ExactStep, Length
from .ops import PagedTensor, paged_attention
from .stores import mutable_everywhere


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
    length: Length
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


@functools.lru_cache(maxsize=64)
def _one_page_each(batch_size: int, device: torch.device) -> torch.Tensor:
    """A page table: page b for sequence b. Every layer of a step wants the same."""
    return torch.arange(batch_size, dtype=torch.int32, device=device)[:, None]


@functools.lru_cache(maxsize=64)
def _equal_lengths(batch_size: int, length: int, device: torch.device) -> torch.Tensor:
    return torch.full((batch_size,), length, dtype=torch.int32, device=device)


def _made_once(make: Any, *arguments: Any) -> torch.Tensor:
    """`make(*arguments)`, whose results are kept; a graph makes its own."""
    with mutable_everywhere():
        return make.__wrapped__(*arguments) if torch.compiler.is_compiling() else make(*arguments)


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
    length: Length,
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
        length: what `seq_lens` says of all sequences, on the CPU if it is known there.
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
    key, value = (step.tokens(index, split.num_newest, behind) for index in (0, 1))
    num_exact = key.shape[2]
    if num_queries > 1 and not torch.compiler.is_compiling():
        key, value = _in_few_sizes(key), _in_few_sizes(value)
    lse, exact_lse = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
    first_column = step.num_first // k.pages.shape[2]
    has_others = page_table.shape[1] > first_column
    exact_output = paged_attention(
        query, PagedTensor(key, "model"), PagedTensor(value, "model"),
        _made_once(_one_page_each, batch_size, query.device),
        _made_once(_equal_lengths, batch_size, num_exact, query.device),
        softmax_scale=softmax_scale, attn_mask=mask, sinks=None if has_others else sinks, softcap=softcap, causal=False,
        lse=exact_lse,
    )  # fmt: skip
    if not has_others:
        return exact_output

    # The pages: what a query sees there ends `num_recent` tokens before it, as if it and they came that much earlier.
    shift = step.num_recent
    if split.by_query and attn_mask is not None:
        shift, attn_mask = 0, split.older(attn_mask, mask_start)
    hidden = step.num_first + shift
    if isinstance(length, int):
        shortened = _made_once(_equal_lengths, batch_size, length - hidden, query.device)
    else:
        shortened = seq_lens - hidden
    output = paged_attention(
        rounded, k, v, page_table[:, first_column:], shortened,
        softmax_scale=softmax_scale, attn_mask=attn_mask, mask_start=mask_start - step.num_first, sinks=sinks,
        softcap=softcap, window=None if window is None else max(window - shift, 0), causal=causal, lse=lse,
    )  # fmt: skip
    return _merged(output, lse, exact_output, exact_lse)


def _in_few_sizes(page: torch.Tensor) -> torch.Tensor:
    """`[B, H, N, D]` with room behind it: turns have any length, and every page size is a GPU kernel to compile."""
    num_tokens = page.shape[2]
    return torch.nn.functional.pad(page, (0, 0, 0, (1 << (num_tokens - 1).bit_length()) - num_tokens))


def _merged(one: torch.Tensor, one_lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Two outputs of one softmax over what both have seen; zeros where neither has seen anything."""
    share = torch.sigmoid(other_lse - one_lse)[..., None]
    share = torch.where(other_lse[..., None] == float("-inf"), 0.0, share)
    return torch.lerp(one.to(torch.float32), other.to(torch.float32), share).to(one.dtype)


def overlay(dense: torch.Tensor, index: int, step: ExactStep, start: int, end: Length, num_new: int) -> torch.Tensor:
    """`dense` `[B, H, L, D]`, tokens from `start` on, with those of `step` as the model made them.

    Sequences have `end` tokens; each of the `num_new` newest gets all that it attends to exactly.
    """
    num_newest = step.num_recent + max(num_new - 1, 0) if step.num_recent else 0
    exact = step.tokens(index, num_newest)
    positions = start + torch.arange(dense.shape[2], device=dense.device)
    is_first, is_newest = positions < step.num_first, positions >= end - num_newest
    source = torch.where(is_first, positions, positions - end + num_newest + step.num_first)
    chosen = exact.index_select(2, source.clamp(0, exact.shape[2] - 1))
    return torch.where(((is_first | is_newest) & (positions < end))[:, None], chosen, dense)
