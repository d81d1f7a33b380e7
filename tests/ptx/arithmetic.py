"""Instructions that make numbers of numbers, each for all threads at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .numbers import FLOAT8, flushed, from_bfloat16, to_bfloat16

Array = np.ndarray[Any, Any]

DTYPES: dict[str, Any] = {
    **{f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
       for kind, letter in (("s", "i"), ("u", "u"), ("b", "u")) for bits in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64), "bf16": np.dtype(np.uint16),
    "f32x2": np.dtype(np.uint64), "f16x2": np.dtype(np.uint32), "bf16x2": np.dtype(np.uint32),
    "e4m3x2": np.dtype(np.uint16), "e5m2x2": np.dtype(np.uint16), "pred": np.dtype(bool),
}  # fmt: skip


def _divide(a: Array, b: Array) -> Array:
    """Rounded towards zero, as the hardware does."""
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
    return (quotient * np.sign(a.astype(np.int64)) * np.sign(b.astype(np.int64))).astype(a.dtype)


def _shift_left(a: Array, b: Array) -> Array:
    bits = 8 * a.itemsize
    return np.where(b < bits, a << np.minimum(b, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def _shift_right(a: Array, b: Array) -> Array:
    bits = 8 * a.itemsize
    if a.dtype.kind == "i":
        return a >> np.minimum(b, bits - 1).astype(a.dtype)
    return np.where(b < bits, a >> np.minimum(b, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def _fma(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "min": lambda a, b: np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b),
    "max": lambda a, b: np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b),
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": _shift_left,
    "shr": _shift_right,
}
_UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": lambda a: -a,
    "abs": np.abs,
    "not": lambda a: ~a,
    "ex2": lambda a: np.exp2(a.astype(np.float64)).astype(np.float32),
    "lg2": lambda a: np.log2(a.astype(np.float64)).astype(np.float32),
    "rcp": lambda a: np.float32(1) / a,
    "sqrt": np.sqrt,
    "popc": lambda a: sum((a >> bit & 1 for bit in range(8 * a.itemsize)), np.zeros_like(a)),
}
_ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lo": lambda a, b: a < b,
    "ls": lambda a, b: a <= b,
    "hi": lambda a, b: a > b,
    "hs": lambda a, b: a >= b,
}


def compare(name: str, a: Array, b: Array, kind: str) -> list[Array]:
    """Both results of `setp`: of two numbers in a register one each, else one and its opposite."""
    if kind in ("f16x2", "bf16x2"):
        pairs = [_halves(x, kind.removesuffix("x2")) for x in (a, b)]
        return [_compare(name, *(pair[:, i] for pair in pairs)) for i in (0, 1)]
    if kind == "bf16":
        a, b = from_bfloat16(a), from_bfloat16(b)
    result = _compare(name, a, b)
    return [result, ~result]


def _halves(x: Array, kind: str) -> Array:
    """The two numbers in each register, `[N, 2]`."""
    bits = np.ascontiguousarray(x).view(DTYPES[kind]).reshape(-1, 2)
    return from_bfloat16(bits) if kind == "bf16" else bits


def _compare(name: str, a: Array, b: Array) -> Array:
    """By its name; of floats, one ending in u holds for NaN too."""
    either = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(a.shape, dtype=bool)
    if name in ("num", "nan"):
        return either == (name == "nan")
    if name in _ORDERED:
        return _ORDERED[name](a, b) & ~either
    return _ORDERED[name.removesuffix("u")](a, b) | either


def permuted_bytes(a: Array, b: Array, selectors: Array) -> Array:
    """`prmt`: each nibble of the selector names one of eight bytes, or repeats its sign."""
    both = np.concatenate([a[:, None].view(np.uint8), b[:, None].view(np.uint8)], axis=1)
    nibbles = selectors[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 0xF
    chosen = np.take_along_axis(both, (nibbles & 7).astype(np.int64), axis=1)
    signs = np.where(chosen & 0x80, 0xFF, 0)
    return np.where(nibbles & 8, signs, chosen).astype(np.uint8).view(np.uint32)[:, 0]


def by_table(a: Array, b: Array, c: Array, table: int) -> Array:
    """`lop3`: a bit of `table` for each of the eight combinations of three bits."""
    result = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def bit_field(a: Array, start: Array, length: Array) -> Array:
    """`bfe`: `length` bits from `start` on, their highest repeated if `a` is signed."""
    bits = 8 * a.itemsize
    start, length = (x.astype(np.int64) & 0xFF for x in (start, length))
    if (length == 0).any() or (start + length > bits).any():
        raise NotImplementedError("a bit field that is empty or reaches beyond its number")
    return _shift_right(_shift_left(a, bits - start - length), bits - length)


def funnel(direction: str, low: Array, high: Array, by: Array) -> Array:
    """`shf.wrap`: two registers shifted as one, of which a left shift leaves the high and a right one the low half."""
    both = high.astype(np.uint64) << np.uint64(32) | low
    by = (by & 31).astype(np.uint64)
    shifted = both << by >> np.uint64(32) if direction == "l" else both >> by
    return shifted.astype(np.uint32)


def convert(parts: list[str], *inputs: Array) -> Array:
    """`cvt` by the parts of its name: the last two are the types of the result and of what is converted."""
    to, source = parts[-2:]
    x = [flushed(a) if "ftz" in parts and a.dtype == np.float32 else a for a in inputs]
    if source in FLOAT8:
        halves = [FLOAT8[source].decode(x[0] >> shift & 0xFF).astype(np.float16).view(np.uint16) for shift in (0, 8)]
        return _joined(*halves)
    if to in FLOAT8:
        high, low = (FLOAT8[to].encode(a) for a in x)
        return high << np.uint16(8) | low
    if to in ("f16x2", "bf16x2"):
        high, low = (_half_bits(a, to.removesuffix("x2")) for a in x)
        return _joined(low, high)
    value = from_bfloat16(x[0]) if source == "bf16" else x[0]
    if to in ("f16", "bf16"):
        return _half_bits(value, to)
    if value.dtype.kind == "f" and DTYPES[to].kind != "f":
        mode = parts[1]
        if mode not in ("rni", "rzi"):
            raise NotImplementedError(".".join(parts))
        rounded = np.nan_to_num((np.rint if mode == "rni" else np.trunc)(value.astype(np.float64)))
        limits = np.iinfo(DTYPES[to])
        return np.clip(rounded, limits.min, limits.max).astype(DTYPES[to])
    return value.astype(DTYPES[to])


def _half_bits(x: Array, name: str) -> Array:
    return to_bfloat16(x.astype(np.float32)) if name == "bf16" else x.astype(np.float16).view(np.uint16)


def _joined(low: Array, high: Array) -> Array:
    return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)


# What may stand in the name of an instruction behind the first part, beside types: another would mean something.
_KNOWN = {"rn", "rni", "rzi", "lo", "hi", "wide", "ftz", "approx", "full", "relu", "NaN", "satfinite", "l", "r", "wrap"}


def compute(parts: list[str], inputs: list[Array]) -> Array:
    """The result of an instruction of numbers, whose `inputs` are of `input_types`."""
    name = parts[0]
    if _is_mixed(parts):
        narrow = [from_bfloat16(x) if parts[-1] == "bf16" else x.astype(np.float32) for x in inputs[:-1]]
        return compute(parts[:-1], [*narrow, inputs[-1]])
    types = [part for part in parts[1:] if part in DTYPES]
    is_unknown = name != "cvt" and (len(types) > 1 or types[-1].startswith("bf16"))
    if is_unknown or not _KNOWN.union(DTYPES).issuperset(parts[1:]):
        raise NotImplementedError(".".join(parts))
    if "ftz" in parts and name != "cvt":
        inputs = [flushed(x) if x.dtype == np.float32 else x for x in inputs]
    result = _compute(name, parts, inputs)
    if "relu" in parts:
        result = np.maximum(result, 0)
    return flushed(result) if "ftz" in parts and result.dtype == np.float32 else result


def _compute(name: str, parts: list[str], inputs: list[Array]) -> Array:
    if parts[-1] in ("f16x2", "f32x2"):  # two numbers in a register
        kind = parts[-1].removesuffix("x2")
        both = _compute(name, [*parts[:-1], kind], [_halves(x, kind) for x in inputs])
        return np.ascontiguousarray(both).view(DTYPES[parts[-1]])[:, 0]
    if "NaN" in parts:
        return (np.minimum if name == "min" else np.maximum)(*inputs)
    if name in ("fma", "mad") and parts[-1].startswith("f"):
        return _fma(*inputs)
    if name in ("mul", "mad"):
        a, b = inputs[:2]
        if "wide" in parts:
            a, b = (x.astype(np.dtype(f"{x.dtype.kind}{2 * x.itemsize}")) for x in (a, b))
        if "hi" in parts:
            return (a.astype(object) * b.astype(object) >> 8 * a.itemsize).astype(a.dtype)
        return a * b + inputs[2].view(a.dtype) if name == "mad" else a * b
    if name in _BINARY:
        return functools.reduce(_BINARY[name], inputs)  # of some newer devices with three operands
    if name in _UNARY:
        return _UNARY[name](*inputs)
    if name == "selp":
        return np.where(inputs[2], inputs[0], inputs[1])
    if name == "prmt":
        return permuted_bytes(*inputs)
    if name == "lop3":
        return by_table(inputs[0], inputs[1], inputs[2], int(inputs[3][0]))
    if name == "bfe":
        return bit_field(*inputs)
    if name == "shf":
        return funnel(parts[1], *inputs)
    if name == "cvt":
        return convert(parts, *inputs)
    raise NotImplementedError(".".join(parts))


def _is_mixed(parts: list[str]) -> bool:
    """Whether all operands but the last are of 16 bits, where the result is fp32."""
    return parts[0] in ("add", "sub", "fma") and parts[-2] == "f32"


def input_types(parts: list[str]) -> list[Any]:
    """The types that an instruction reads its operands as, the last for all that follow."""
    if _is_mixed(parts):
        narrow = DTYPES[parts[-1]]
        return [narrow] * (2 if parts[0] == "fma" else 1) + [DTYPES["f32"]]
    name, own = parts[0], DTYPES[parts[-1]]
    if name in ("shl", "shr", "bfe"):
        return [own, DTYPES["u32"]]
    if name == "selp":
        return [own, own, DTYPES["pred"]]
    if name == "mad" and "wide" in parts:
        return [own, own, np.dtype(f"{own.kind}{2 * own.itemsize}")]
    return [own]
