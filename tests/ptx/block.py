"""A program of a grid, whose threads share memory: what they hold, and what is under way for them."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import numpy as np

from .memory import Fault, GlobalMemory, SharedMemory
from .program import Operand, Program

Array = np.ndarray[Any, Any]
_WIDTHS = {"%p": 1, "%rs": 16, "%r": 32, "%rd": 64}


class Block:
    """Arguments: `parameters` by name, the `place` of the block in its `grid`."""

    def __init__(
        self, program: Program, parameters: dict[str, Array], memory: GlobalMemory, num_threads: int,
        shared_size: int, place: tuple[int, int, int], grid: tuple[int, int, int],
    ) -> None:  # fmt: skip
        self.program = program
        self.parameters = parameters
        self.memory = memory
        self.num_threads = num_threads
        self.threads = np.arange(num_threads)
        self.shared = SharedMemory(shared_size, num_threads)
        # Bits of all threads, unsigned; of predicates bool.
        self.registers: dict[str, Array] = {"%tid.x": self.threads.astype(np.uint32), "%ntid.x": self.all(num_threads)}
        for axis, index, size in zip("xyz", place, grid, strict=True):
            self.registers |= {f"%ctaid.{axis}": self.all(index), f"%nctaid.{axis}": self.all(size)}
        # Groups of copies under way, as (addresses, bytes, threads), and of products, as what finishes them; the last
        # group is still open.
        self.copies: collections.deque[list[tuple[Array, Array, Array]]] = collections.deque([[]])
        self.products: collections.deque[list[Callable[[], None]]] = collections.deque([[]])
        self.sums: dict[str, Array] = {}  # registers of products under way

    def all(self, value: int) -> Array:
        return np.full(self.num_threads, value, dtype=np.uint32)

    def get(self, operand: Operand, dtype: Any) -> Array:
        """What an operand is for every thread, the low bits of a wider register."""
        assert isinstance(operand, str), operand
        dtype = np.dtype(dtype)
        value = self.registers.get(operand.removeprefix("!"))
        if value is None:
            value = self._constant(operand, dtype)
        if dtype.kind == "b":
            return ~value if operand.startswith("!") else value
        if value.itemsize > dtype.itemsize:
            value = value.astype(f"u{dtype.itemsize}")
        if value.itemsize < dtype.itemsize:
            raise TypeError(f"{operand} has {8 * value.itemsize} bits, not {8 * dtype.itemsize}")
        return value.view(dtype)

    def _constant(self, operand: str, dtype: np.dtype[Any]) -> Array:
        if operand == "global_smem":
            bits = SharedMemory.BASE
        elif operand.startswith("0f"):
            bits = int(operand[2:], 16)
        elif operand.lstrip("-")[:1].isdigit():
            bits = int(operand.removesuffix("U"), 0)
        elif self._width(operand):  # never written: Triton fills up what inline assembly takes at once with such ones
            bits = -1
        else:
            raise NotImplementedError(operand)
        if dtype.kind == "b":
            return np.full(self.num_threads, bool(bits))
        return np.full(self.num_threads, bits % (1 << 8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")

    def _width(self, register: str) -> int:
        """In bits; 0 if that is none that a kernel declares."""
        return self.program.widths.get(register) or _WIDTHS.get(register.rstrip("0123456789"), 0)

    def put(self, register: Operand, value: Array, active: Array) -> None:
        """Numbers into a register of the active threads, extended by their sign if it is wider."""
        assert isinstance(register, str), register
        width = self._width(register)
        if not width:
            raise NotImplementedError(register)
        if width > 1:
            value = np.ascontiguousarray(value)
            if value.dtype.kind == "i":
                value = value.astype(f"i{width // 8}", copy=False)
            value = value.view(f"u{value.itemsize}").astype(f"u{width // 8}", copy=False)
        if not active.all():
            poison = np.full(self.num_threads, ~np.uint64(0)).astype(value.dtype)
            value = np.where(active, value, self.registers.get(register, poison))
        self.registers[register] = value

    def address(self, operand: Operand, dtype: str) -> Array:
        """Of `[register + offset]`."""
        assert isinstance(operand, str), operand
        base, plus, offset = operand[1:-1].partition("+")
        return self.get(base, dtype) + np.array(int(offset, 0) if plus else 0).astype(dtype)

    def whole_warps(self, active: Array) -> Array:
        """Which warps are active; those have to be with all their threads."""
        num_active = active.reshape(-1, 32).sum(axis=1)
        if not np.isin(num_active, (0, 32)).all():
            raise Fault("some threads of a warp are elsewhere")
        return num_active == 32
