"""What one step of continuous batching computes: some new tokens of each request, one after the other in one sequence.

A group of layers that see the same tokens (full attention, sliding attention) has blocks of its own, and so does every
request in each of them. Where the tokens of a step lie in a group's pages is worked out once, for all its layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch


@dataclass(frozen=True)
class Group:
    """The layers of one kind of attention.

    Attributes:
        name: transformers' name for it.
        page_size: tokens per page.
        stride: from the page of a layer in one block to that in the next, in pages.
        window: of sliding attention; its tokens lie in a ring of `num_columns` pages.
    """

    name: str
    page_size: int
    stride: int
    window: int | None = None

    @property
    def num_columns(self) -> int | None:
        """Pages that a request has at most: of a window those that its tokens may touch; None for no bound."""
        return None if self.window is None else columns_of(self.window, self.page_size)


def columns_of(window: int, page_size: int) -> int:
    """Pages that the last `window` tokens may touch."""
    return -(-(window - 1) // page_size) + 1


class Request(NamedTuple):
    """The share of one request in a step."""

    past: int  # tokens before the new ones
    new: int
    blocks: dict[str, list[int]]  # of each group, in order


class Part(NamedTuple):
    """New tokens that attend in one call: those of one request, or of all that have a single one."""

    tokens: slice | torch.Tensor  # which of the step's
    past: int
    new: int
    page_table: torch.Tensor  # int32 [n, N]
    seq_lens: torch.Tensor  # int32 [n]
    mask: torch.Tensor | None = None  # bool [1, 1, T, L], where attention is over dense tensors that a window cuts
    past_slots: torch.Tensor | None = None  # where what the window holds of the past lies in the pages, in order


class Places(NamedTuple):
    """Where a group has a step's tokens."""

    parts: list[Part]
    kept: torch.Tensor | None  # which of the step's tokens are written; None for all
    pages: torch.Tensor  # int32 [T, 1]: the page of each of them
    lengths: torch.Tensor  # int32 [T]: its position + 1
    is_padding: torch.Tensor | None = None  # int32 [T, 1]: not 0 for tokens of no request; None if there are none


class Step:
    """The requests of a step, in the order of their tokens."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._places: dict[str, Places] = {}

    @cached_property
    def num_tokens(self) -> int:
        return sum(request.new for request in self.requests)

    def lies_in(self, places: dict[str, Places], num_tokens: int) -> None:
        """Where each group has the tokens is known; `num_tokens` counts those of padding, too."""
        self._places, self.num_tokens = places, num_tokens

    def places(self, group: Group, device: torch.device) -> Places:
        if group.name not in self._places:
            self._places[group.name] = _places(self.requests, group, device)
        return self._places[group.name]


def _places(requests: Sequence[Request], group: Group, device: torch.device) -> Places:
    def numbers(x: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.from_numpy(np.asarray(x)).to(device, dtype)

    rows = [_row(request.blocks[group.name], group) for request in requests]
    starts = np.cumsum([0, *(request.new for request in requests)])

    def part_of(index: int) -> Part:
        past, new, _ = requests[index]
        tokens = slice(int(starts[index]), int(starts[index + 1]))
        part = Part(tokens, past, new, numbers(rows[index][None]), numbers([past + new]))
        if group.window is None:
            return part
        num_past = min(past, group.window - 1)
        slots = slots_of(np.arange(past - num_past, past), group)
        return part._replace(mask=_mask(new, num_past, group.window, device), past_slots=numbers(slots, torch.int64))

    def part_of_all(singles: list[int]) -> Part:
        table = np.zeros((len(singles), max(len(rows[index]) for index in singles)), dtype=np.int64)
        for row, index in zip(table, singles, strict=True):
            row[: len(rows[index])] = rows[index]
        tokens = slice(None) if len(singles) == len(requests) else numbers(starts[singles], torch.int64)
        return Part(tokens, 1, 1, numbers(table), numbers([requests[index].past + 1 for index in singles]))

    singles = [index for index, request in enumerate(requests) if request.new == 1 and request.past]
    parts = [part_of(index) for index in range(len(requests)) if index not in set(singles)]
    if singles:
        parts.append(part_of_all(singles))

    # Of more tokens than a window has only the newest are written.
    kept, pages, lengths = [], [], []
    for (past, new, _), row, start in zip(requests, rows, starts[:-1], strict=True):
        num_kept = new if group.window is None else min(new, group.window)
        order = np.arange(new - num_kept, new)
        kept.append(start + order)
        pages.append(row[slots_of(past + order, group) // group.page_size])
        lengths.append(past + order + 1)
    is_all = sum(map(len, kept)) == starts[-1]
    return Places(
        parts,
        None if is_all else numbers(np.concatenate(kept), torch.int64),
        numbers(np.concatenate(pages)[:, None]),
        numbers(np.concatenate(lengths)),
    )


def _row(blocks: Sequence[int], group: Group) -> np.ndarray:
    """A request's row of the page table: a ring has all its columns, though a young request has few pages."""
    pages = np.array(blocks, dtype=np.int64) * group.stride
    return pages if group.num_columns is None else np.pad(pages, (0, group.num_columns - len(pages)))


def slots_of(positions: np.ndarray, group: Group) -> np.ndarray:
    """Where tokens lie in the pages of a request, counted in tokens."""
    return positions if group.num_columns is None else positions % (group.num_columns * group.page_size)


def _mask(num_new: int, num_past: int, window: int, device: torch.device) -> torch.Tensor | None:
    """For queries that are the last of the tokens; None where causality says it all."""
    length = num_past + num_new
    if length <= window:
        return None
    query = torch.arange(num_past, length, device=device)[:, None]
    key = torch.arange(length, device=device)
    return ((key <= query) & (key > query - window))[None, None]
