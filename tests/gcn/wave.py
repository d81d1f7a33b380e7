"""What a wave of 64 lanes holds: its registers, which lanes are active, and what it has not waited for."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx.memory import Fault, GlobalMemory

from .memory import LocalMemory
from .program import EXEC, SCALARS, registers

Array = np.ndarray[Any, Any]
LANES = 64


class Wave:
    """Registers are all ones until something is written. `vectors` holds bits `[register, lane]`."""

    def __init__(self, index: int, memory: GlobalMemory, shared: LocalMemory) -> None:
        self.index, self.memory, self.shared = index, memory, shared
        self.at = 0  # the next instruction
        self.vectors = np.full((SCALARS, LANES), 0xFFFFFFFF, dtype=np.uint32)
        self.views = {kind: self.vectors.view(kind) for kind in ("u4", "i4", "f4", "u2", "f2", "i2")}
        self.scalars = [0xFFFFFFFF] * 128
        self.scc = False
        self.set_scalar(EXEC, 2, (1 << LANES) - 1)
        # Loads and stores under way: the registers that they fill, whether others may overtake them, and whether they
        # are of shared memory.
        self.under_way: dict[str, list[tuple[frozenset[int], bool, bool]]] = {"vmcnt": [], "lgkmcnt": []}
        self.awaited: frozenset[int] = frozenset()

    # -- scalars -------------------------------------------------------------------------------------------------------

    def scalar(self, first: int, count: int) -> int:
        return sum(self.scalars[first - SCALARS + i] << 32 * i for i in range(count))

    def set_scalar(self, first: int, count: int, value: int) -> None:
        for i in range(count):
            self.scalars[first - SCALARS + i] = value >> 32 * i & 0xFFFFFFFF
        if first >= EXEC:
            self.active = lanes_of(self.scalar(EXEC, 2))
            self.all_active = bool(self.active.all())

    # -- vectors -------------------------------------------------------------------------------------------------------

    def put(self, first: int, values: Array, active: Array | None = None) -> None:
        """Bits of 32 or 64 into registers of the active lanes."""
        if values.itemsize == 8:
            values = values.view(np.uint64)
            self.put(first, (values & np.uint64(0xFFFFFFFF)).astype(np.uint32), active)
            self.put(first + 1, (values >> np.uint64(32)).astype(np.uint32), active)
        elif self.all_active and active is None:
            self.vectors[first] = values.view(np.uint32)
        else:
            where = self.active if active is None else self.active & active
            np.copyto(self.vectors[first], values.view(np.uint32), where=where)

    # -- waiting -------------------------------------------------------------------------------------------------------

    def begin(
        self, counter: str, filled: frozenset[int] = frozenset(), unordered: bool = False, is_shared: bool = False
    ) -> None:
        self.under_way[counter].append((filled, unordered, is_shared))
        self.awaited |= filled

    def wait(self, counter: str, most: int) -> None:
        """Until at most so many are under way."""
        waiting = self.under_way[counter]
        if most and any(unordered for _, unordered, _ in waiting):
            return
        del waiting[: max(len(waiting) - most, 0)]
        left = (filled for each in self.under_way.values() for filled, *_ in each)
        self.awaited = frozenset().union(*left)

    @property
    def accesses_shared(self) -> bool:
        return any(is_shared for *_, is_shared in self.under_way["lgkmcnt"])

    def check(self, used: frozenset[int]) -> None:
        if not used.isdisjoint(self.awaited):
            raise Fault("a register is used before what is loaded into it was waited for")


def lanes_of(mask: int) -> Array:
    return np.unpackbits(np.array([mask], dtype=np.uint64).view(np.uint8), bitorder="little").view(bool)


def mask_of(lanes: Array) -> int:
    return int.from_bytes(np.packbits(lanes, bitorder="little").tobytes(), "little")


# -- operands ----------------------------------------------------------------------------------------------------------


def constant(text: str, size: int = 4) -> int:
    """The bits of a constant as an operand of `size` bytes."""
    if "." in text:
        return int.from_bytes(struct.pack("<e" if size == 2 else "<f", float(text)), "little")
    return int(text, 0) % (1 << 8 * size)


def scalar_reader(operand: str, words: int) -> Callable[[Wave], int]:
    if found := registers(operand):
        first, count = found
        if count != words:
            raise NotImplementedError(f"{operand} as {words} registers")
        if words == 1:
            return lambda wave: wave.scalars[first - SCALARS]
        return lambda wave: wave.scalar(first, words)
    value = constant(operand, 4 * words)
    return lambda wave: value


def reader(operand: str, kind: str) -> Callable[[Wave], Array]:
    """What an operand is for every lane, `[64]` or `[1]`: `kind` is a type of numpy, or `mask`."""
    if operand.startswith(("-", "|", "neg(", "abs(")) and (kind[0] == "f"):
        return _signed(operand, kind)
    found = registers(operand)
    if kind == "mask":
        first = registers(operand)[0]  # type: ignore[index]
        return lambda wave: lanes_of(wave.scalar(first, 2))
    size = int(kind[1])
    if not found:
        value = np.array([constant(operand, size)], dtype=f"u{size}").view(kind)
        return lambda wave: value
    first, count = found
    if count != max(size // 4, 1):
        raise NotImplementedError(f"{operand} as {kind}")
    if first >= SCALARS:
        of_scalar = lambda wave: wave.scalar(first, count) % (1 << 8 * size)  # noqa: E731
        return lambda wave: np.array([of_scalar(wave)], dtype=f"u{size}").view(kind)
    if size == 8:
        return lambda wave: _pair(wave, first).view(kind)
    if size == 2:
        return lambda wave: wave.views[kind][first, ::2]
    return lambda wave: wave.views[kind][first]


def _pair(wave: Wave, first: int) -> Array:
    return wave.vectors[first] | wave.vectors[first + 1].astype(np.uint64) << np.uint64(32)


def _signed(operand: str, kind: str) -> Callable[[Wave], Array]:
    """An operand of floats with its sign changed or taken away."""
    if operand.startswith(("-", "neg(")):
        inner = operand[1:] if operand.startswith("-") else operand[4:-1]
        of = reader(inner, kind)
        return lambda wave: -of(wave)
    of = reader(operand[1:-1] if operand.startswith("|") else operand[4:-1], kind)
    return lambda wave: np.abs(of(wave))
