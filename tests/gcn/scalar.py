"""Instructions of scalar registers, of which a wave has one set."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .program import EXEC, Instruction, registers
from .wave import Wave, scalar_reader

_BITS = {"i32": 32, "u32": 32, "b32": 32, "i64": 64, "u64": 64, "b64": 64}
_LOGICAL: dict[str, Callable[[int, int], int]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
}
_ORDERED: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "lg": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 else value


def _field(packed: int, bits: int) -> tuple[int, int]:
    """Start and length of a bit field."""
    return packed & bits - 1, packed >> 16 & 0x7F


def _calculate(name: str, kind: str, bits: int, scc: bool, x: list[int]) -> tuple[int, bool | None]:
    """The result and the condition code, None where it stays."""
    a, b = x[0], x[-1]
    if kind.startswith("i") and name != "bcnt1":
        a, b = signed(a, bits), signed(b, bits)
    if name in ("add", "sub", "addk"):
        total = a - b if name == "sub" else a + b
        bounds = (-(1 << bits - 1), 1 << bits - 1) if kind.startswith("i") else (0, 1 << bits)
        return total, not bounds[0] <= total < bounds[1]
    if name in ("addc", "subb"):
        total = a - b - scc if name == "subb" else a + b + scc
        return total, not 0 <= total < 1 << bits
    if name in ("mul", "mulk"):
        return a * b, None
    if name == "mul_hi":
        return a * b >> bits, None
    if name in ("min", "max"):
        return (min if name == "min" else max)(a, b), a < b if name == "min" else a > b
    if shifted := re.match(r"lshl(\d)_add$", name):
        total = (a << int(shifted[1])) + b
        return total, total >> bits > 0
    if name in ("mov", "movk"):
        return a, None
    if name == "cselect":
        return x[0] if scc else x[1], None
    if name == "ff1":
        return (x[0] & -x[0]).bit_length() - 1, None
    if name == "bfm":
        return ((1 << (a & bits - 1)) - 1) << (b & bits - 1), None
    result = _with_condition(name, kind, bits, a, b) % (1 << bits)
    return result, result != 0


def _with_condition(name: str, kind: str, bits: int, a: int, b: int) -> int:
    """Those that say whether the result is not zero."""
    if name in _LOGICAL:
        return _LOGICAL[name](a, b)
    if name == "bcnt1":
        return a.bit_count()
    if name == "not":
        return ~a
    if name == "abs":
        return abs(a)
    if name == "lshl":
        return a << (b & bits - 1)
    if name in ("lshr", "ashr"):
        return a >> (b & bits - 1)
    if name == "bfe":
        start, length = _field(b, bits)
        field = (a >> start) & (1 << length) - 1
        return signed(field, length) if kind.startswith("i") and length else field
    raise NotImplementedError(f"s_{name}_{kind}")


def compile_scalar(instruction: Instruction) -> Callable[[Wave], None]:
    """Of all that calculate, compare, or copy."""
    instruction.only()
    base = instruction.base.removeprefix("s_")
    if saved := re.match(r"(\w+)_saveexec_b64$", base):
        return _save_active(saved[1], instruction)
    if base.startswith(("cmp_", "bitcmp")):
        return _compare(base, instruction)
    name, _, kind = base.rpartition("_")
    if name in ("ff1_i32", "bcnt1_i32"):
        inputs = [_BITS[kind] // 32]
        name, kind = name.removesuffix("_i32"), "i32"
    else:
        inputs = [_BITS[kind] // 32] * (len(instruction.operands) - 1)
        if name in ("lshl", "lshr", "ashr", "bfe"):
            inputs[1] = 1
    target, *sources = instruction.operands
    if name in ("movk", "addk", "mulk"):
        sources = [str(signed(int(sources[0], 0) & 0xFFFF, 16))]
        if name != "movk":
            sources, inputs = [target, *sources], [1, 1]
    readers = [scalar_reader(operand, words) for operand, words in zip(sources, inputs, strict=True)]
    bits = _BITS[kind]
    first, count = _target(target)
    assert count == bits // 32, instruction.text

    def do(wave: Wave) -> None:
        value, scc = _calculate(name, kind, bits, wave.scc, [read(wave) for read in readers])
        wave.set_scalar(first, count, value)
        if scc is not None:
            wave.scc = scc

    return do


def _target(operand: str) -> tuple[int, int]:
    found = registers(operand)
    assert found is not None, operand
    return found


def _save_active(name: str, instruction: Instruction) -> Callable[[Wave], None]:
    """The active lanes are kept in a register and changed."""
    target, source = instruction.operands
    first, _ = _target(target)
    read = scalar_reader(source, 2)

    def do(wave: Wave) -> None:
        value, before = read(wave), wave.scalar(EXEC, 2)
        wave.set_scalar(first, 2, before)
        wave.set_scalar(EXEC, 2, _LOGICAL[name](value, before))
        wave.scc = wave.scalar(EXEC, 2) != 0

    return do


def _compare(base: str, instruction: Instruction) -> Callable[[Wave], None]:
    name, _, kind = base.rpartition("_")
    bits = _BITS[kind]
    words = [bits // 32, 1 if name.startswith("bitcmp") else bits // 32]
    first, second = (scalar_reader(*each) for each in zip(instruction.operands, words, strict=True))

    def do(wave: Wave) -> None:
        a, b = first(wave), second(wave)
        if name.startswith("bitcmp"):
            wave.scc = a >> (b & bits - 1) & 1 == int(name[-1])
        else:
            if kind.startswith("i"):
                a, b = signed(a, bits), signed(b, bits)
            wave.scc = _ORDERED[name.removeprefix("cmp_")](a, b)

    return do


CONDITIONS: dict[str, Callable[[Wave], Any]] = {
    "s_branch": lambda wave: True,
    "s_cbranch_scc0": lambda wave: not wave.scc,
    "s_cbranch_scc1": lambda wave: wave.scc,
    "s_cbranch_execz": lambda wave: not wave.active.any(),
    "s_cbranch_execnz": lambda wave: wave.active.any(),
    "s_cbranch_vccz": lambda wave: not (wave.scalars[106] | wave.scalars[107]),
    "s_cbranch_vccnz": lambda wave: wave.scalars[106] | wave.scalars[107],
}
