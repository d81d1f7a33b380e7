"""Instructions that move data between registers and memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .program import Instruction, registers
from .wave import LANES, Wave, reader, scalar_reader

Array = np.ndarray[Any, Any]
_SIZES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ubyte": 1, "ushort": 2, "byte": 1, "short": 2}
_SIZES |= {"u8": 1, "u16": 2, "b8": 1, "b16": 2, "b32": 4, "b64": 8, "b96": 12, "b128": 16, "x2": 8}
_CACHES = ("sc0", "sc1", "nt")  # where data may be kept on its way


def _target(operand: str, size: int) -> int:
    first, count = registers(operand)  # type: ignore[misc]
    if count != -(-size // 4):
        raise NotImplementedError(f"{size} bytes in {operand}")
    return first


def _filled(first: int, size: int) -> frozenset[int]:
    return frozenset(range(first, first + -(-size // 4)))


def _put(wave: Wave, first: int, data: Array, taken: Array) -> None:
    """Bytes `[N, size]` into registers of the lanes that are `taken`; zeros into the other active ones."""
    size = data.shape[1]
    words = np.zeros((LANES, max(size, 4)), dtype=np.uint8)
    words[taken, :size] = data
    for i, word in enumerate(words.view(np.uint32).T):
        wave.put(first + i, word)


def _get(wave: Wave, first: int, size: int, lanes: Array, high: bool = False) -> Array:
    """Bytes `[N, size]` of registers of the `lanes`."""
    words = wave.vectors[first : first + -(-size // 4), lanes].T
    return np.ascontiguousarray(words).view(np.uint8)[:, 2 * high : 2 * high + size]


# -- global memory -----------------------------------------------------------------------------------------------------


def compile_scalar_load(instruction: Instruction) -> Callable[[Wave], None]:
    """`s_load`, which others may overtake."""
    instruction.only()
    size = _SIZES[instruction.name.removeprefix("s_load_")] if "x8" not in instruction.name else 32
    target, base, offset = instruction.operands
    first, count = registers(target)  # type: ignore[misc]
    assert 4 * count == size, instruction.text
    at, add = scalar_reader(base, 2), scalar_reader(offset, 1)

    def do(wave: Wave) -> None:
        addresses = np.array([at(wave) + add(wave)], dtype=np.uint64) + np.arange(0, size, 4, dtype=np.uint64)
        words = wave.memory.read(addresses, 4).view(np.uint32)[:, 0]
        wave.set_scalar(first, count, sum(int(word) << 32 * i for i, word in enumerate(words)))
        wave.begin("lgkmcnt", frozenset(range(first, first + count)), unordered=True)

    return do


def _places(instruction: Instruction) -> Callable[[Wave], tuple[Array, Array]]:
    """For each lane an address of global memory and whether it is to be accessed."""
    offset = instruction.number("offset")
    if instruction.name.startswith("buffer_"):
        return _places_in_buffer(instruction, offset)
    is_store = instruction.name.startswith(("global_store", "global_atomic"))
    where, base = instruction.operands[0 if is_store else 1], instruction.operands[2]
    instruction.only("offset", *_CACHES)
    if base == "off":
        address = reader(where, "u8")
        return lambda wave: (np.broadcast_to(address(wave) + np.int64(offset).astype("u8"), LANES), wave.active)
    low, start = reader(where, "u4"), scalar_reader(base, 2)

    def find(wave: Wave) -> tuple[Array, Array]:
        return np.uint64(start(wave) + offset) + low(wave).astype(np.uint64), wave.active

    return find


def _places_in_buffer(instruction: Instruction, offset: int) -> Callable[[Wave], tuple[Array, Array]]:
    """What lies outside of the buffer is left out."""
    instruction.only("offen", "offset", *_CACHES)
    _, where, resource, start = instruction.operands
    described, add = scalar_reader(resource, 4), scalar_reader(start, 1)
    index = reader(where, "u4") if "offen" in instruction.modifiers else None
    size = _size(instruction)

    def find(wave: Wave) -> tuple[Array, Array]:
        bits = described(wave)
        if bits >> 48 & 0xFFFF or bits >> 96 != 0x27000:
            raise NotImplementedError("a buffer that is more than a range of bytes")
        offsets = np.full(LANES, offset, dtype=np.int64)
        if index is not None:
            offsets += index(wave)
        is_inside = offsets + (add(wave) + size) <= bits >> 64 & 0xFFFFFFFF
        return (offsets + ((bits & (1 << 48) - 1) + add(wave))).astype(np.uint64), wave.active & is_inside

    return find


def _size(instruction: Instruction) -> int:
    return _SIZES[re.sub(r"_d16_hi$", "", instruction.name).rpartition("_")[2]]


def compile_load(instruction: Instruction) -> Callable[[Wave], None]:
    size, find = _size(instruction), _places(instruction)
    first = _target(instruction.operands[0], size)
    filled = _filled(first, size)

    def do(wave: Wave) -> None:
        addresses, taken = find(wave)
        data = wave.memory.read(addresses[taken], size, min(size, 4)) if taken.any() else _nothing(size)
        _put(wave, first, data, taken)
        wave.begin("vmcnt", filled)

    return do


def _nothing(size: int) -> Array:
    return np.zeros((0, size), dtype=np.uint8)


def compile_store(instruction: Instruction) -> Callable[[Wave], None]:
    """Stores, and sums of integers in memory."""
    size, find = _size(instruction), _places(instruction)
    adds = "atomic" in instruction.name
    if adds and (not instruction.name.startswith("global_atomic_add") or "sc0" in instruction.modifiers):
        raise NotImplementedError(instruction.text)
    first = _target(instruction.operands[0 if instruction.name.startswith("buffer_") else 1], size)
    high = instruction.name.endswith("_d16_hi")

    def do(wave: Wave) -> None:
        addresses, taken = find(wave)
        data = _get(wave, first, size, taken, high)
        if taken.any() and adds:
            wave.memory.add(addresses[taken], data.view(f"u{size}")[:, 0])
        elif taken.any():
            wave.memory.write(addresses[taken], data, min(size, 4))
        wave.begin("vmcnt")

    return do


# -- shared memory -----------------------------------------------------------------------------------------------------


def _offsets(instruction: Instruction, size: int) -> list[int]:
    """Of the one or two places that an instruction accesses."""
    if "2" not in instruction.name.split("_")[1]:
        instruction.only("offset")
        return [instruction.number("offset")]
    instruction.only("offset0", "offset1")
    unit = 64 * size if "st64" in instruction.name else size
    return [unit * instruction.number(each) for each in ("offset0", "offset1")]


def compile_shared_load(instruction: Instruction) -> Callable[[Wave], None]:
    size = _size(instruction)
    offsets = _offsets(instruction, size)
    target, where = instruction.operands
    first, address = _target(target, size * len(offsets)), reader(where, "u4")

    def do(wave: Wave) -> None:
        start = address(wave)[wave.active]
        data = [wave.shared.read(start + np.uint32(offset), size, wave.index) for offset in offsets]
        _put(wave, first, np.concatenate(data, axis=1), wave.active)
        wave.begin("lgkmcnt", _filled(first, size * len(offsets)), is_shared=True)

    return do


def compile_shared_store(instruction: Instruction) -> Callable[[Wave], None]:
    size = _size(instruction)
    offsets = _offsets(instruction, size)
    where, *sources = instruction.operands
    address, firsts = reader(where, "u4"), [_target(source, size) for source in sources]
    high = instruction.name.endswith("_d16_hi")

    def do(wave: Wave) -> None:
        start = address(wave)[wave.active]
        for offset, first in zip(offsets, firsts, strict=True):
            wave.shared.write(start + np.uint32(offset), _get(wave, first, size, wave.active, high), wave.index)
        wave.begin("lgkmcnt", is_shared=True)

    return do
