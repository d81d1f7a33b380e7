"""Instructions of two numbers at once, and those that take halves of registers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .program import SCALARS, Instruction, registers
from .vector import TABLE
from .wave import Wave, constant, reader

Array = np.ndarray[Any, Any]
Read = Callable[[Wave], Array]
_KINDS = {"f32": "f4", "b32": "u4", "f16": "f2", "u16": "u2", "i16": "i2", "b16": "u2"}
_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "mul_lo": operator.mul,
    "fma": TABLE["v_fma_f32"][2],
    "max": TABLE["v_max_f32"][2],
    "min": TABLE["v_min_f32"][2],
    "lshlrev": lambda a, b: b << (a & np.uint16(15)),
    "lshrrev": lambda a, b: b >> (a & np.uint16(15)),
    "ashrrev": lambda a, b: b >> (a & np.int16(15)),
}


def _half(operand: str, kind: str, high: int) -> Read:
    """One of two numbers in an operand: of two registers, or of one."""
    found, size = registers(operand), int(kind[1])
    if not found:
        if high and size == 4:
            raise NotImplementedError(f"the second number of {operand}")
        bits = constant(operand) if size == 4 or "." not in operand else constant(operand, 2)
        value = np.array([bits >> 8 * size * high & (1 << 8 * size) - 1], dtype=f"u{size}").view(kind)
        return lambda wave: value
    first, count = found
    if count != size // 2:
        raise NotImplementedError(f"two numbers in {operand}")
    if size == 4:
        return reader(f"{'va'[first // 256]}{(first + high) % 256}" if first < SCALARS else _scalar(first + high), kind)
    if first >= SCALARS:
        bits_of = reader(operand, "u4")
        return lambda wave: (bits_of(wave) >> np.uint32(16 * high)).astype("u2").view(kind)
    return lambda wave: wave.views[kind][first, high::2]


def _scalar(number: int) -> str:
    return {SCALARS + 106: "vcc_lo", SCALARS + 107: "vcc_hi"}.get(number, f"s{number - SCALARS}")


def _negated(read: Read) -> Read:
    return lambda wave: -read(wave)


def compile_packed(instruction: Instruction) -> Callable[[Wave], None]:
    """`v_pk_*`: `op_sel` says which number of each operand makes the first result, `op_sel_hi` the second."""
    instruction.only("op_sel", "op_sel_hi", "neg_lo", "neg_hi")
    name, _, kind = instruction.base.removeprefix("v_pk_").rpartition("_")
    dtype, size = _KINDS[kind], int(_KINDS[kind][1])
    if name == "mov":
        return _compile_move(instruction)
    if name not in _FUNCTIONS or (name in ("max", "min") and dtype[0] != "f"):
        raise NotImplementedError(instruction.text)
    function = _FUNCTIONS[name]
    target, *sources = instruction.operands
    first, _ = registers(target)  # type: ignore[misc]
    none, both = (0,) * len(sources), (1,) * len(sources)
    halves = []
    for which, sign, default in (("op_sel", "neg_lo", none), ("op_sel_hi", "neg_hi", both)):
        chosen, negated = instruction.numbers(which, default), instruction.numbers(sign, none)
        reads = [_half(operand, dtype, high) for operand, high in zip(sources, chosen, strict=True)]
        halves.append([_negated(read) if minus else read for read, minus in zip(reads, negated, strict=True)])
    low, high = halves

    def do(wave: Wave) -> None:
        one, other = (function(*[read(wave) for read in reads]) for reads in (low, high))
        if size == 4:
            wave.put(first, one)
            wave.put(first + 1, other)
        else:
            wave.put(first, _joined(one, other))

    return do


def _compile_move(instruction: Instruction) -> Callable[[Wave], None]:
    """`v_pk_mov_b32`: a number of each of two operands."""
    target, *sources = instruction.operands
    first, _ = registers(target)  # type: ignore[misc]
    chosen = instruction.numbers("op_sel", (0, 0))
    one, other = (_half(operand, "u4", high) for operand, high in zip(sources, chosen, strict=True))

    def do(wave: Wave) -> None:
        values = one(wave).copy(), other(wave).copy()
        for i, value in enumerate(values):
            wave.put(first + i, value)

    return do


def _joined(low: Array, high: Array) -> Array:
    one, other = (np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) for x in (low, high))
    return one | other << np.uint32(16)


def compile_pack(instruction: Instruction) -> Callable[[Wave], None]:
    """`v_pack_b32_f16`: a half of each of two registers."""
    instruction.only("op_sel")
    target, *sources = instruction.operands
    first, _ = registers(target)  # type: ignore[misc]
    chosen = instruction.numbers("op_sel", (0, 0, 0))
    low, high = (_half(operand, "u2", half) for operand, half in zip(sources, chosen, strict=False))
    return lambda wave: wave.put(first, _joined(low(wave), high(wave)))


def compile_mixed(instruction: Instruction) -> Callable[[Wave], None]:
    """`v_fma_mix`: of operands of fp32, or halves where `op_sel_hi` says so; fp16 results keep the other half."""
    instruction.only("op_sel", "op_sel_hi")
    target, *sources = instruction.operands
    first, _ = registers(target)  # type: ignore[misc]
    halves, is_half = (instruction.numbers(which, (0, 0, 0)) for which in ("op_sel", "op_sel_hi"))
    reads = [
        _mixed(operand, half) if short else reader(operand, "f4")
        for operand, half, short in zip(sources, halves, is_half, strict=True)
    ]
    name = instruction.base

    def do(wave: Wave) -> None:
        a, b, c = (np.broadcast_to(read(wave), 64).astype(np.float64) for read in reads)
        if name == "v_fma_mix_f32":
            wave.put(first, (a * b + c).astype(np.float32))
            return
        bits = (a * b + c).astype(np.float32).astype(np.float16).view(np.uint16)
        before = wave.views["u2"][first]
        low, high = (bits, before[1::2]) if name == "v_fma_mixlo_f16" else (before[::2], bits)
        wave.put(first, _joined(low, high))

    return do


def _mixed(operand: str, half: int) -> Read:
    if operand.startswith("-"):
        return _negated(_mixed(operand[1:], half))
    return _half(operand, "f2", half)
