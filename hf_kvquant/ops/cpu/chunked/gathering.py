"""Pages copied out of their stores by torch operators, block by block.

Operators take two threads from 32,768 elements on, and waking a thread costs more than most of them do. So bytes are
copied and changed as words of eight.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ....formats import get_format
from .workspace import workspace

# Tokens at once: int32 holds the sum of so many products of bytes.
_TOKENS = 1 << 16
_HIGHEST_BITS = -0x7F7F7F7F7F7F7F80  # of eight bytes

Block = tuple[slice, slice, slice]  # sequences, heads, pages


class Gathering:
    """Copies of stores' `[P, H, S, ...]` pages `[B, N]`, oldest first, in blocks of sequences, heads and pages."""

    def __init__(self, pages: torch.Tensor, num_heads: int) -> None:
        self.pages = pages
        self.shape = (pages.shape[0], num_heads, pages.shape[1])
        self.whole: Block = (slice(0, self.shape[0]), slice(0, num_heads), slice(0, self.shape[2]))
        # The first page of each sequence, if the others follow it in the store: pages of who grows alone do.
        self.first_pages: list[int] | None = None
        if torch.equal(pages, pages[:, :1] + torch.arange(self.shape[2], device=pages.device)):
            self.first_pages = pages[:, 0].tolist()

    @functools.cached_property
    def rows(self) -> torch.Tensor:
        """Of a store whose pages and heads are one dimension: which hold the pages, `[B, H, N]`."""
        num_heads = self.shape[1]
        return (self.pages.long() * num_heads)[:, None] + torch.arange(num_heads, device=self.pages.device)[:, None]

    def blocks(
        self, store: torch.Tensor, size: int, start_slot: int, length: int
    ) -> Iterator[tuple[Block, slice, slice]]:
        """Blocks of `size` numbers or less, each with the slots of its pages that are columns, and with these columns.

        Columns are the `length` slots from `start_slot` of the first page on. A block has as many pages as fit, then
        as many heads, then as many sequences.
        """
        page_size = store.shape[2]
        room, steps = max(min(size // store.shape[3], _TOKENS) // page_size, 1), []
        for count in reversed(self.shape):
            steps.append(max(min(count, room), 1))
            room //= count
        starts = [range(0, count, step) for count, step in zip(self.shape, reversed(steps), strict=True)]
        for b in starts[0]:
            for h in starts[1]:
                for p in starts[2]:
                    sequences, heads, pages = (
                        slice(i, min(i + r.step, r.stop)) for i, r in zip((b, h, p), starts, strict=True)
                    )
                    first = start_slot if p == 0 else 0
                    column = p * page_size + first - start_slot
                    count = min(pages.stop * page_size - start_slot, length) - column
                    yield (sequences, heads, pages), slice(first, first + count), slice(column, column + count)

    def copy(self, store: torch.Tensor, block: Block | None = None, flip: bool = False) -> torch.Tensor:
        """A block as `[B', H', N' * S, ...]`; with `flip`, the highest bit of each byte is the other one."""
        block = block or self.whole
        words = store.flatten(2)
        size = words.element_size()
        bits = 0x80
        places = (words.shape[2], words.storage_offset(), *words.stride()[:2])
        if words.stride(2) == 1 and all(place * size % 8 == 0 for place in places):
            words, bits = words.view(torch.int64), _HIGHEST_BITS
        shape = tuple(part.stop - part.start for part in block)
        copy = workspace("codes", words.dtype, (*shape, words.shape[2]))
        source = self.in_one_piece(words, block)
        if source is not None:
            torch.bitwise_xor(source, bits, out=copy[0]) if flip else copy[0].copy_(source)
        else:
            try:
                torch.index_select(words.flatten(0, 1), 0, self.rows[block].flatten(), out=copy.flatten(0, 2))
            except IndexError:
                raise ValueError(
                    f"page_table names a page outside 0 ... {store.shape[0] - 1}: {self.pages.tolist()}"
                ) from None
            if flip:
                copy.bitwise_xor_(bits)
        return copy.view(store.dtype).view(*shape[:2], shape[2] * store.shape[2], *store.shape[3:])

    def in_one_piece(self, store: torch.Tensor, block: Block) -> torch.Tensor | None:
        """The pages `[H', N', ...]` of a block of one sequence where they lie, if they lie one after the other."""
        sequences, heads, pages = block
        if self.first_pages is None or sequences.stop - sequences.start > 1:
            return None
        first, count = self.first_pages[sequences.start] + pages.start, pages.stop - pages.start
        if not 0 <= first <= store.shape[0] - count:
            return None
        return store[first : first + count, heads].transpose(0, 1)

    def scales(self, store: torch.Tensor, start_slot: int, length: int) -> torch.Tensor:
        """Token scales of `[P, H, S]` as fp32 `[B, H, length]`, from a slot of the first page on."""
        source = self.in_one_piece(store, self.whole)
        if source is None:
            return self.copy(store)[..., start_slot : start_slot + length].to(torch.float32)
        scales = source.to(torch.float32, memory_format=torch.contiguous_format)
        return scales.view(1, self.shape[1], -1)[..., start_slot : start_slot + length]

    def codes(self, store: torch.Tensor, name: str, block: Block) -> torch.Tensor:
        """A block of pages of the format `name`, int8 in two's complement."""
        if get_format(name).name == "int8":
            return self.copy(store, block, flip=True).view(torch.int8)
        return self.copy(store, block)
