"""Pages copied by torch operators into memory that is kept from call to call: much fresh memory costs more than that.

Operators take two threads from 32,768 elements on, and waking a thread costs more than most of them do. So bytes are
copied and changed as words of eight.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch

from ....formats import get_format

# Tokens at once: int32 holds the sum of so many products of bytes.
_TOKENS = 1 << 16
# Fewer elements than these are as quick to allocate.
_FEW = 1 << 15
_HIGHEST_BITS = -0x7F7F7F7F7F7F7F80  # of eight bytes


class _Memory(threading.local):
    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], torch.Tensor] = {}


_memory = _Memory()


def workspace(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Uninitialized memory of this thread, until it is asked for by that name again."""
    size = math.prod(shape)
    if size < _FEW:
        return torch.empty(shape, dtype=dtype)
    kept = _memory.kept
    if (name, dtype) not in kept or kept[name, dtype].numel() < size:
        with torch.inference_mode(False):
            kept[name, dtype] = torch.empty(size, dtype=dtype)
    return kept[name, dtype][:size].view(shape)


Block = tuple[slice, slice, slice]  # sequences, heads, pages


class Gathering:
    """Copies of stores' `[P, H, S, ...]` pages `[B, N]`, oldest first, in blocks of sequences, heads and pages."""

    def __init__(self, pages: torch.Tensor, num_heads: int) -> None:
        self.shape = (pages.shape[0], num_heads, pages.shape[1])
        # Rows of a store whose pages and heads are one dimension.
        self.rows = (pages.long() * num_heads)[:, None] + torch.arange(num_heads)[:, None]
        # The first page of each sequence, if the others follow it in the store: pages of who grows alone do.
        self.first_pages: list[int] | None = None
        if torch.equal(pages, pages[:, :1] + torch.arange(self.shape[2])):
            self.first_pages = pages[:, 0].tolist()

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
        sequences, heads, pages = block or tuple(slice(0, size) for size in self.shape)
        rows = self.rows[sequences, heads, pages]
        words = store.flatten(2)
        size = words.element_size()
        bits = 0x80
        if words.shape[2] * size % 8 == 0 and words.storage_offset() * size % 8 == 0:
            words, bits = words.view(torch.int64), _HIGHEST_BITS
        copy = workspace("codes", words.dtype, (*rows.shape, words.shape[2]))
        first = -1 if self.first_pages is None or rows.shape[0] > 1 else self.first_pages[sequences.start] + pages.start
        if 0 <= first <= store.shape[0] - rows.shape[2]:
            source = words[first : first + rows.shape[2], heads].transpose(0, 1)
            torch.bitwise_xor(source, bits, out=copy[0]) if flip else copy[0].copy_(source)
        else:
            try:
                torch.index_select(words.flatten(0, 1), 0, rows.flatten(), out=copy.flatten(0, 2))
            except IndexError:
                page_ids = torch.div(self.rows[:, 0], self.shape[1], rounding_mode="floor").tolist()
                raise ValueError(f"page_table names a page outside 0 ... {store.shape[0] - 1}: {page_ids}") from None
            if flip:
                copy.bitwise_xor_(bits)
        return copy.view(store.dtype).view(*rows.shape[:2], rows.shape[2] * store.shape[2], *store.shape[3:])

    def codes(self, store: torch.Tensor, name: str, block: Block) -> torch.Tensor:
        """A block of pages of the format `name`, int8 in two's complement."""
        if get_format(name).name == "int8":
            return self.copy(store, block, flip=True).view(torch.int8)
        return self.copy(store, block)


def numbers(name: str, codes: torch.Tensor) -> torch.Tensor:
    """Codes of a block as fp32 in code units, but for `factor(name)`."""
    if get_format(name).name in ("fp8_e4m3", "fp8_e5m2"):
        codes = _as_half(name, codes)
    return workspace("numbers", torch.float32, tuple(codes.shape)).copy_(codes)


def factor(name: str) -> float:
    """What the results of `numbers` are to be multiplied by."""
    return 256.0 if get_format(name).name == "fp8_e4m3" else 1.0


def _as_half(name: str, codes: torch.Tensor) -> torch.Tensor:
    """fp8 codes as half precision; e4m3 as a 256th of its numbers. Several times faster than torch's own conversion."""
    bits = workspace("half", torch.int16, tuple(codes.shape)).copy_(codes.view(torch.int8))
    if get_format(name).name == "fp8_e5m2":
        return bits.bitwise_left_shift_(8).view(torch.float16)
    bits.bitwise_left_shift_(7).bitwise_and_(~0x4000)
    # A NaN, and nothing else, carries into the exponent's first bit.
    carry = torch.add(bits, 0x80, out=workspace("carry", torch.int16, tuple(bits.shape)))
    bits.bitwise_or_(carry.bitwise_and_(0x4000))
    return bits.view(torch.float16)
