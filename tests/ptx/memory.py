"""Memory of the machine: tensors, and what the threads of a program share. Every access is checked."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


class Fault(Exception):
    """What a kernel may not do."""


class GlobalMemory:
    """The memory of some tensors, at their own addresses."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
        self.starts = np.array(sorted(storages), dtype=np.uint64)
        self.sizes = np.array([storages[int(start)] for start in self.starts], dtype=np.uint64)
        self.bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * int(size)).from_address(int(start)))
            for start, size in zip(self.starts, self.sizes, strict=True)
        ]

    def _find(self, addresses: Array, size: int, unit: int | None = None) -> list[tuple[Array, Array, Array]]:
        """Which of `addresses` are in which tensor: places among them, its bytes, offsets there."""
        unit = unit or size
        if (addresses % np.uint64(unit)).any():
            raise Fault(f"{size} bytes at {_hex(addresses)}, which is not a multiple of {unit}")
        tensors = np.searchsorted(self.starts, addresses, side="right") - 1
        offsets = addresses - self.starts[tensors]
        outside = (tensors < 0) | (offsets + np.uint64(size) > self.sizes[tensors])
        if outside.any():
            raise Fault(f"{size} bytes at {_hex(addresses[outside])}, outside of every tensor")
        result = []
        for tensor in np.unique(tensors):
            at = np.flatnonzero(tensors == tensor)
            result.append((at, self.bytes[tensor], offsets[at].astype(np.int64)[:, None] + np.arange(size)))
        return result

    def read(self, addresses: Array, size: int, unit: int | None = None) -> Array:
        """`[N, size]` bytes; addresses have to be multiples of `unit`, or else of `size`."""
        result = np.empty((len(addresses), size), dtype=np.uint8)
        for at, memory, offsets in self._find(addresses, size, unit):
            result[at] = memory[offsets]
        return result

    def write(self, addresses: Array, values: Array, unit: int | None = None) -> None:
        for at, memory, offsets in self._find(addresses, values.shape[1], unit):
            memory[offsets] = values[at]

    def add(self, addresses: Array, values: Array) -> Array:
        """Integers, one after the other; returns what was there before each."""
        size, result = values.itemsize, np.zeros_like(values)
        for i, value in enumerate(values):
            at = addresses[i : i + 1]
            result[i : i + 1] = before = self.read(at, size).view(values.dtype)[:, 0]
            self.write(at, (before + value).view(np.uint8).reshape(1, size))
        return result


class SharedMemory:
    """What the threads of a program share.

    Of every byte it remembers who has touched it since the last barrier. A barrier of all threads ends an era, one of a
    warp a turn of that warp.
    """

    BASE = 1024  # as on devices; swizzles go by addresses
    _NOBODY, _SEVERAL = -1, -2

    def __init__(self, size: int, num_threads: int) -> None:
        self.bytes = np.full(size, 0xFF, dtype=np.uint8)  # NaN, until something is written
        self.era = 0
        self.turns = np.zeros(-(-num_threads // 32), dtype=np.int64)
        who = lambda: np.full(size, self._NOBODY, dtype=np.int32)  # noqa: E731
        self.writer, self.write_era, self.write_turn = who(), np.zeros(size, dtype=np.int64), np.zeros(size, np.int64)
        self.reader, self.read_era = who(), np.zeros(size, dtype=np.int64)
        self.read_warp, self.read_turn = who(), np.zeros(size, dtype=np.int64)
        self._last = who()
        self.is_fenced = np.ones(size, dtype=bool)  # whether asynchronous products see what was written

    def barrier(self) -> None:
        self.era += 1

    def warp_barrier(self, warps: Array) -> None:
        self.turns[warps] += 1

    def _places(self, addresses: Array, size: int) -> Array:
        if (addresses % size).any():
            raise Fault(f"{size} shared bytes at {_hex(addresses)}, which is not a multiple of {size}")
        start = addresses.astype(np.int64) - self.BASE
        outside = (start < 0) | (start + size > len(self.bytes))
        if outside.any():
            raise Fault(f"{size} bytes at {_hex(addresses[outside])}, outside of {len(self.bytes)} that are shared")
        return start[:, None] + np.arange(size)

    def read(self, addresses: Array, size: int, threads: Array) -> Array:
        """`[N, size]` bytes, each row by its thread of `threads`."""
        places = self._places(addresses, size)
        self._note_read(places, np.broadcast_to(threads[:, None], places.shape))
        return self.bytes[places]

    def _note_read(self, places: Array, threads: Array) -> None:
        warps = threads // 32
        fresh = (self.write_era[places] == self.era) & (self.writer[places] != threads)
        if fresh.any():
            writers = self.writer[places]
            same_warp = (writers >= 0) & (writers // 32 == warps)
            ordered = same_warp & (self.write_turn[places] < self.turns[warps])
            if (fresh & (writers != self._NOBODY) & ~ordered).any():
                raise Fault("a thread reads shared memory that another has written since the last barrier")
        known = self.read_era[places] == self.era
        last = self._last
        for of_byte, who in ((self.reader, threads), (self.read_warp, warps)):
            before = np.where(known, of_byte[places], self._NOBODY)
            last[places] = who  # of several in this access
            mixed = (last[places] != who) | ((before != self._NOBODY) & (before != who))
            of_byte[places] = who
            of_byte[places[mixed]] = self._SEVERAL
        self.read_era[places] = self.era
        self.read_turn[places] = self.turns[warps]

    def write(self, addresses: Array, values: Array, threads: Array) -> None:
        """Rows of `values` by their threads."""
        places = self._places(addresses, values.shape[1])
        threads = np.broadcast_to(threads[:, None], places.shape)
        warps = threads // 32
        writers = self.writer[places]
        changed = self.bytes[places] != values
        written = (self.write_era[places] == self.era) & (writers != threads) & (writers != self._NOBODY) & changed
        if written.any():
            ordered = (writers >= 0) & (writers // 32 == warps) & (self.write_turn[places] < self.turns[warps])
            if (written & ~ordered).any():
                raise Fault("two threads write different numbers to the same shared memory without a barrier between")
        read = (self.read_era[places] == self.era) & (self.reader[places] != threads)
        read &= self.reader[places] != self._NOBODY
        if read.any():
            ordered = (self.read_warp[places] == warps) & (self.read_turn[places] < self.turns[warps])
            if (read & ~ordered).any():
                raise Fault("a thread writes shared memory that another has read since the last barrier")
        self.bytes[places] = values  # of several at once one is the last, as on a device
        self.writer[places], self.write_era[places], self.write_turn[places] = threads, self.era, self.turns[warps]
        self.is_fenced[places] = False

    def read_by_product(self, addresses: Array) -> Array:
        """Two bytes at each address, by an asynchronous product of all threads."""
        places = self._places(addresses.ravel(), 2)
        if not self.is_fenced[places].all():
            raise Fault("an asynchronous product reads shared memory that was written without a proxy fence since")
        if ((self.write_era[places] == self.era) & (self.writer[places] != self._NOBODY)).any():
            raise Fault("an asynchronous product reads shared memory that was written since the last barrier")
        self.reader[places], self.read_era[places] = self._SEVERAL, self.era
        self.read_warp[places] = self._SEVERAL
        return self.at(addresses)

    def at(self, addresses: Array) -> Array:
        """As `read_by_product`, of addresses that have passed it."""
        places = addresses.astype(np.int64).ravel()[:, None] - self.BASE + np.arange(2)
        return self.bytes[places].view(np.uint16).reshape(addresses.shape)

    def fence(self) -> None:
        self.is_fenced[:] = True


def _hex(addresses: Array) -> str:
    return ", ".join(f"{int(address):#x}" for address in np.atleast_1d(addresses)[:4])
