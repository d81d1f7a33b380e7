"""Instructions that make numbers of numbers, each for all lanes at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .lanes import moved_lanes
from .program import Instruction, registers
from .wave import Wave, mask_of, reader

Array = np.ndarray[Any, Any]
Read = Callable[[Wave], Array]


def _wide(a: Array) -> Array:
    return a.astype("i8" if a.dtype.kind == "i" else "u8")


def _high(a: Array, b: Array) -> Array:
    return (_wide(a) * _wide(b) >> _wide(a).dtype.type(32)).astype(a.dtype)


def _24_bits(a: Array) -> Array:
    return a << a.dtype.type(8) >> a.dtype.type(8)


def _fma(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)


def _largest(*numbers: Array) -> Array:
    """The number if one of two is NaN, unless that one signals."""
    return _extreme(np.fmax, *numbers)


def _smallest(*numbers: Array) -> Array:
    return _extreme(np.fmin, *numbers)


def _extreme(choose: Any, first: Array, *others: Array) -> Array:
    result: Array = first
    for other in others:
        a, b = np.broadcast_arrays(result, other)
        result = choose(a, b)
        if np.isnan(a + b).any():
            for x in (b, a):
                result = np.where(_signals(x), _quiet(x), result)
    return result


_QUIET = {4: np.uint32(1 << 22), 2: np.uint16(1 << 9)}


def _signals(x: Array) -> Array:
    return np.isnan(x) & (np.ascontiguousarray(x).view(f"u{x.itemsize}") & _QUIET[x.itemsize] == 0)


def _quiet(x: Array) -> Array:
    return (np.ascontiguousarray(x).view(f"u{x.itemsize}") | _QUIET[x.itemsize]).view(x.dtype)


def _median(a: Array, b: Array, c: Array) -> Array:
    if a.dtype.kind == "f" and np.isnan(a + b + c).any():
        middle = np.fmax(np.fmin(a, b), np.fmin(np.fmax(a, b), c))
        return np.where(np.isnan(a) | np.isnan(b) | np.isnan(c), _smallest(a, b, c), middle)
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


def _field(a: Array, start: Array, length: Array) -> Array:
    start, length = (x.astype("u4") & np.uint32(31) for x in (start, length))
    unused = np.uint32(32) - start - length
    if (start + length > 32).any() or (length == 0).any():
        raise NotImplementedError("a bit field that is empty or reaches beyond its number")
    return a << unused.astype(a.dtype) >> (unused + start).astype(a.dtype)


def _reversed_bits(a: Array) -> Array:
    bits = np.unpackbits(np.ascontiguousarray(a).view(np.uint8), bitorder="little").reshape(-1, 32)
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(np.uint32)[:, 0]


def _funnel(high: Array, low: Array, by: Array) -> Array:
    """`v_alignbit`: the low half of two registers that are shifted as one."""
    both = high.astype(np.uint64) << np.uint64(32) | low
    return (both >> (by & np.uint32(31)).astype(np.uint64)).astype(np.uint32)


def permuted_bytes(a: Array, b: Array, selectors: Array) -> Array:
    """`v_perm`: each byte of the selector names one of eight bytes, the first four of `b`, or a constant."""
    a, b, selectors = np.broadcast_arrays(a, b, selectors)
    both = np.stack([b, a], axis=1).view(np.uint8)
    chosen = np.ascontiguousarray(selectors)[:, None].view(np.uint8)
    if ((chosen > 7) & (chosen < 12)).any():
        raise NotImplementedError("signs of v_perm_b32")
    taken = np.take_along_axis(both, (chosen & 7).astype(np.int64), axis=1)
    return np.where(chosen < 8, taken, np.where(chosen == 12, 0, 0xFF)).astype(np.uint8).view(np.uint32)[:, 0]


def _to_integer(x: Array, kind: str) -> Array:
    """Towards zero, within the limits; 0 of NaN."""
    limits = np.iinfo(kind)
    return np.clip(np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0), limits.min, limits.max).astype(kind)


def _count_below(mask: Array, add: Array, first: int) -> Array:
    """`v_mbcnt`: how many bits of half a lane mask stand below the lane."""
    below = np.clip(np.arange(64) - first, 0, 32).astype(np.uint64)
    bits = mask.astype(np.uint64) & (np.uint64(1) << below) - np.uint64(1)
    return np.bitwise_count(bits).astype(np.uint32) + add


_U = "u4 u4"
# Types of the result and of the operands.
TABLE: dict[str, tuple[str, str, Callable[..., Array]]] = {
    "v_mov_b32": ("u4", "u4", lambda a: a),
    "v_accvgpr_read_b32": ("u4", "u4", lambda a: a),
    "v_accvgpr_write_b32": ("u4", "u4", lambda a: a),
    "v_accvgpr_mov_b32": ("u4", "u4", lambda a: a),
    "v_mov_b64": ("u8", "u8", lambda a: a),
    "v_not_b32": ("u4", "u4", lambda a: ~a),
    "v_bfrev_b32": ("u4", "u4", _reversed_bits),
    "v_and_b32": ("u4", _U, lambda a, b: a & b),
    "v_or_b32": ("u4", _U, lambda a, b: a | b),
    "v_xor_b32": ("u4", _U, lambda a, b: a ^ b),
    "v_or3_b32": ("u4", "u4 u4 u4", lambda a, b, c: a | b | c),
    "v_and_or_b32": ("u4", "u4 u4 u4", lambda a, b, c: a & b | c),
    "v_bfi_b32": ("u4", "u4 u4 u4", lambda a, b, c: a & b | ~a & c),
    "v_bfe_u32": ("u4", "u4 u4 u4", _field),
    "v_bfe_i32": ("i4", "i4 u4 u4", _field),
    "v_alignbit_b32": ("u4", "u4 u4 u4", _funnel),
    "v_perm_b32": ("u4", "u4 u4 u4", permuted_bytes),
    "v_lshlrev_b32": ("u4", _U, lambda a, b: b << (a & np.uint32(31))),
    "v_lshrrev_b32": ("u4", _U, lambda a, b: b >> (a & np.uint32(31))),
    "v_ashrrev_i32": ("i4", "u4 i4", lambda a, b: b >> (a & np.uint32(31)).astype("i4")),
    "v_lshlrev_b16": ("u2", "u2 u2", lambda a, b: b << (a & np.uint16(15))),
    "v_lshrrev_b16": ("u2", "u2 u2", lambda a, b: b >> (a & np.uint16(15))),
    "v_ashrrev_i16": ("i2", "u2 i2", lambda a, b: b >> (a & np.uint16(15)).astype("i2")),
    "v_lshlrev_b64": ("u8", "u4 u8", lambda a, b: b << (a & np.uint32(63)).astype("u8")),
    "v_lshrrev_b64": ("u8", "u4 u8", lambda a, b: b >> (a & np.uint32(63)).astype("u8")),
    "v_ashrrev_i64": ("i8", "u4 i8", lambda a, b: b >> (a & np.uint32(63)).astype("i8")),
    "v_lshl_add_u32": ("u4", "u4 u4 u4", lambda a, b, c: (a << (b & np.uint32(31))) + c),
    "v_lshl_add_u64": ("u8", "u8 u4 u8", lambda a, b, c: (a << (b & np.uint32(7)).astype("u8")) + c),
    "v_lshl_or_b32": ("u4", "u4 u4 u4", lambda a, b, c: a << (b & np.uint32(31)) | c),
    "v_add_lshl_u32": ("u4", "u4 u4 u4", lambda a, b, c: a + b << (c & np.uint32(31))),
    "v_xad_u32": ("u4", "u4 u4 u4", lambda a, b, c: (a ^ b) + c),
    "v_add_u32": ("u4", _U, lambda a, b: a + b),
    "v_add3_u32": ("u4", "u4 u4 u4", lambda a, b, c: a + b + c),
    "v_sub_u32": ("u4", _U, lambda a, b: a - b),
    "v_subrev_u32": ("u4", _U, lambda a, b: b - a),
    "v_add_u16": ("u2", "u2 u2", lambda a, b: a + b),
    "v_sub_u16": ("u2", "u2 u2", lambda a, b: a - b),
    "v_mul_lo_u32": ("u4", _U, lambda a, b: a * b),
    "v_mul_lo_u16": ("u2", "u2 u2", lambda a, b: a * b),
    "v_mul_hi_u32": ("u4", _U, _high),
    "v_mul_hi_i32": ("i4", "i4 i4", _high),
    "v_mul_u32_u24": ("u4", _U, lambda a, b: _24_bits(a) * _24_bits(b)),
    "v_mul_i32_i24": ("i4", "i4 i4", lambda a, b: _24_bits(a) * _24_bits(b)),
    "v_mad_u32_u24": ("u4", "u4 u4 u4", lambda a, b, c: _24_bits(a) * _24_bits(b) + c),
    "v_mad_i32_i24": ("i4", "i4 i4 i4", lambda a, b, c: _24_bits(a) * _24_bits(b) + c),
    "v_min_i32": ("i4", "i4 i4", np.minimum),
    "v_max_i32": ("i4", "i4 i4", np.maximum),
    "v_min_u32": ("u4", _U, np.minimum),
    "v_max_u32": ("u4", _U, np.maximum),
    "v_max3_i32": ("i4", "i4 i4 i4", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_med3_i32": ("i4", "i4 i4 i4", _median),
    "v_mbcnt_lo_u32_b32": ("u4", _U, lambda a, b: _count_below(a, b, 0)),
    "v_mbcnt_hi_u32_b32": ("u4", _U, lambda a, b: _count_below(a, b, 32)),
    "v_add_f32": ("f4", "f4 f4", lambda a, b: a + b),
    "v_sub_f32": ("f4", "f4 f4", lambda a, b: a - b),
    "v_subrev_f32": ("f4", "f4 f4", lambda a, b: b - a),
    "v_mul_f32": ("f4", "f4 f4", lambda a, b: a * b),
    "v_fma_f32": ("f4", "f4 f4 f4", _fma),
    "v_div_fmas_f32": ("f4", "f4 f4 f4", _fma),
    "v_div_fixup_f32": ("f4", "f4 f4 f4", lambda approximate, a, b: b / a),
    "v_max_f32": ("f4", "f4 f4", _largest),
    "v_min_f32": ("f4", "f4 f4", _smallest),
    "v_max3_f32": ("f4", "f4 f4 f4", _largest),
    "v_min3_f32": ("f4", "f4 f4 f4", _smallest),
    "v_med3_f32": ("f4", "f4 f4 f4", _median),
    "v_rcp_f32": ("f4", "f4", lambda a: np.float32(1) / a),
    "v_rcp_iflag_f32": ("f4", "f4", lambda a: np.float32(1) / a),
    "v_exp_f32": ("f4", "f4", lambda a: np.exp2(a.astype(np.float64)).astype(np.float32)),
    "v_log_f32": ("f4", "f4", lambda a: np.log2(a.astype(np.float64)).astype(np.float32)),
    "v_rndne_f32": ("f4", "f4", np.rint),
    "v_ldexp_f32": ("f4", "f4 i4", lambda a, b: np.ldexp(a, b)),
    "v_add_f16": ("f2", "f2 f2", lambda a, b: a + b),
    "v_sub_f16": ("f2", "f2 f2", lambda a, b: a - b),
    "v_mul_f16": ("f2", "f2 f2", lambda a, b: a * b),
    "v_max_f16": ("f2", "f2 f2", _largest),
    "v_min_f16": ("f2", "f2 f2", _smallest),
    "v_cvt_f16_f32": ("f2", "f4", lambda a: a.astype(np.float16)),
    "v_cvt_f32_f16": ("f4", "f2", lambda a: a.astype(np.float32)),
    "v_cvt_f32_i32": ("f4", "i4", lambda a: a.astype(np.float32)),
    "v_cvt_f32_u32": ("f4", "u4", lambda a: a.astype(np.float32)),
    "v_cvt_u32_f32": ("u4", "f4", lambda a: _to_integer(a, "u4")),
    "v_cvt_i32_f32": ("i4", "f4", lambda a: _to_integer(a, "i4")),
    "v_cndmask_b32": ("u4", "u4 u4 mask", lambda a, b, chosen: np.where(chosen, b, a)),
    "v_cmp_o_f32": ("mask", "f4 f4", lambda a, b: ~(np.isnan(a) | np.isnan(b))),
    "v_cmp_u_f32": ("mask", "f4 f4", lambda a, b: np.isnan(a) | np.isnan(b)),
    "v_cmp_o_f16": ("mask", "f2 f2", lambda a, b: ~(np.isnan(a) | np.isnan(b))),
    "v_cmp_u_f16": ("mask", "f2 f2", lambda a, b: np.isnan(a) | np.isnan(b)),
}  # fmt: skip
_ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": lambda a, b: a == b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lg": lambda a, b: (a < b) | (a > b),
}
for _kind in ("i4", "u4", "i2", "u2", "f4", "f2", "i8", "u8"):
    _name = f"{_kind[0]}{8 * int(_kind[1])}"
    for _how, _compare in _ORDERED.items():
        TABLE[f"v_cmp_{_how}_{_name}"] = ("mask", f"{_kind} {_kind}", _compare)
        if _kind[0] == "f":  # the opposite, which holds for NaN
            _opposite = lambda a, b, compare=_compare: ~compare(a, b)  # noqa: E731
            TABLE[f"v_cmp_n{_how}_{_name}"] = ("mask", f"{_kind} {_kind}", _opposite)
    if _kind[0] != "f":
        TABLE[f"v_cmp_ne_{_name}"] = ("mask", f"{_kind} {_kind}", lambda a, b: a != b)

_SELECTED = {"DWORD": (0, 0xFFFFFFFF)}
_SELECTED |= {f"WORD_{i}": (16 * i, 0xFFFF) for i in range(2)} | {f"BYTE_{i}": (8 * i, 0xFF) for i in range(4)}
_OF_LANES = ("quad_perm", "row_shr", "row_shl", "row_ror", "row_half_mirror", "row_mirror", "row_bcast")
_DPP = (*_OF_LANES, "row_mask", "bank_mask", "bound_ctrl")
_SDWA = ("dst_sel", "dst_unused", "src0_sel", "src1_sel")


def compile_vector(instruction: Instruction) -> Callable[[Wave], None]:
    """Of one that reads and writes whole registers, or parts by SDWA, or other lanes by DPP."""
    base, operands = instruction.base, instruction.operands
    if base == "v_fmac_f32":
        base, operands = "v_fma_f32", (*operands, operands[0])
    if base not in TABLE:
        raise NotImplementedError(instruction.text)
    result, kinds, function = TABLE[base]
    target, *sources = operands
    is_dpp, is_sdwa = instruction.name.endswith("_dpp"), instruction.name.endswith("_sdwa")
    instruction.only(*(_DPP if is_dpp else _SDWA if is_sdwa else ()))
    readers: list[Read] = []
    for i, (operand, kind) in enumerate(zip(sources, kinds.split(), strict=True)):
        selected = instruction.modifiers.get(f"src{i}_sel")
        readers.append(_part(operand, kind, selected) if selected else reader(operand, kind))
    moved = moved_lanes(instruction) if is_dpp else None
    first, _ = registers(target)  # type: ignore[misc]
    put = _putter(instruction, first, result)

    def do(wave: Wave) -> None:
        put(wave, function(*[read(wave) for read in readers]), None)

    def do_moved(wave: Wave) -> None:
        assert moved is not None
        sources, writes, zeros = moved(wave)
        value = np.broadcast_to(readers[0](wave), 64)[sources]
        value = np.where(zeros, value.dtype.type(0), value)
        put(wave, function(value, *[read(wave) for read in readers[1:]]), writes)

    return do_moved if is_dpp else do


def _part(operand: str, kind: str, selected: str) -> Read:
    """Some bytes of a register."""
    extended = operand.startswith("sext(")
    if operand.startswith(("-", "|")):
        raise NotImplementedError(f"{operand} by parts")
    read = reader(operand[5:-1] if extended else operand, "u4")
    shift, mask = _SELECTED[selected]
    sign = np.uint32((mask >> 1) + 1)

    def do(wave: Wave) -> Array:
        value = read(wave) >> np.uint32(shift) & np.uint32(mask)
        if extended:
            value = (value ^ sign) - sign
        return value.astype(f"u{kind[1]}").view(kind)

    return do


def _putter(instruction: Instruction, first: int, kind: str) -> Callable[[Wave, Array, Array | None], None]:
    """What writes a result of that type into the registers from `first` on."""
    if kind == "mask":

        def put_mask(wave: Wave, value: Array, active: Array | None) -> None:
            wave.set_scalar(first, 2, mask_of(np.broadcast_to(value, 64) & wave.active))

        return put_mask
    shift, mask = _SELECTED[instruction.modifiers.get("dst_sel", "DWORD")]
    keeps = instruction.modifiers.get("dst_unused", "UNUSED_PAD")
    if keeps not in ("UNUSED_PAD", "UNUSED_PRESERVE"):
        raise NotImplementedError(instruction.text)

    def put(wave: Wave, value: Array, active: Array | None) -> None:
        if value.itemsize == 2:
            value = np.ascontiguousarray(value).view(np.uint16).astype(np.uint32)  # the other half becomes zeros
        if mask != 0xFFFFFFFF:
            value = (value.view(np.uint32) & np.uint32(mask)) << np.uint32(shift)
            if keeps == "UNUSED_PRESERVE":
                value = value | wave.vectors[first] & np.uint32(0xFFFFFFFF ^ mask << shift)
        wave.put(first, value, active)

    return put


# -- with a second result ----------------------------------------------------------------------------------------------


def compile_with_carry(instruction: Instruction) -> Callable[[Wave], None]:
    """Sums with a carry out, and some in; `v_mad_u64_u32`; `v_div_scale`, which leaves its operand as it is."""
    instruction.only()
    target, carry, *sources = instruction.operands
    first, of_carry = (registers(each)[0] for each in (target, carry))  # type: ignore[index]
    name = instruction.base
    kinds = {
        "v_mad_u64_u32": ["u4", "u4", "u8"], "v_mad_i64_i32": ["i4", "i4", "i8"],
        "v_div_scale_f32": ["f4", "f4", "f4"],
    }.get(name, ["u4", "u4", "mask"])  # fmt: skip
    readers = [reader(*each) for each in zip(sources, kinds, strict=False)]

    def do(wave: Wave) -> None:
        a, b, *more = (read(wave) for read in readers)
        out = np.zeros(64, dtype=bool)
        if name == "v_div_scale_f32":
            value = a
        elif name.startswith("v_mad"):
            value = _wide(a) * _wide(b) + more[0]  # nobody asks for its carry, which is none here
        else:
            carried = more[0].astype("i8") if more else 0
            a, b = a.astype("i8"), b.astype("i8")
            total = {"add": a + b + carried, "sub": a - b - carried, "subrev": b - a - carried}[
                re.match(r"v_(add|subrev|sub)", name)[1].replace("addc", "add")  # type: ignore[index]
            ]
            value, out = (total & 0xFFFFFFFF).astype("u4"), np.broadcast_to((total < 0) | (total >> 32 > 0), 64)
        wave.put(first, value)
        wave.set_scalar(of_carry, 2, mask_of(out & wave.active))

    return do
