"""Stored bytes to numbers and back, inside kernels.

Attention reads 8-bit pages as uint16: two codes, channels 2i (low byte) and 2i + 1 (high byte). A tile of 16-bit
elements is loaded 16 bytes at a time and goes to the tensor cores as any fp16 tile does; the two codes are parted in
registers, by a few byte permutations for four codes. All codes are exact in fp16.

Three ways do the same: inline assembly (NVIDIA; `cvt` of e4m3 from compute capability 8.9 on), and plain Triton, which
runs everywhere, in the interpreter too. The interpreter rounds fp8 wrongly, so bits are made with integers there.
"""

import triton
import triton.language as tl

# Formats as kernels know them.
MODEL = tl.constexpr(0)
FP8_E4M3 = tl.constexpr(1)
FP8_E5M2 = tl.constexpr(2)
INT8 = tl.constexpr(3)

CODE_OF = {"model": 0, "fp8_e4m3": 1, "fp8_e5m2": 2, "int8": 3}

# How the codes are converted.
PLAIN = tl.constexpr(0)  # Triton only
PTX = tl.constexpr(1)  # NVIDIA
PTX_FP8 = tl.constexpr(2)  # NVIDIA with conversions of fp8, compute capability 8.9 and later


# As `_decode`, for two codes in the upper bytes of the halves of a register.
_DECODE_E4M3 = tl.constexpr(
    """
    {
    .reg .b32 m, n;
    prmt.b32 $0, $2, 0, 0x2404;
    and.b32 $1, $2, 0xff00ff00;
    shr.b32 m, $0, 1;
    and.b32 m, m, 0x3f803f80;
    lop3.b32 $0, $0, 0x80008000, m, 0xea;
    add.u32 n, m, 0x00800080;
    lop3.b32 $0, n, 0x40004000, $0, 0xea;
    shr.b32 m, $1, 1;
    and.b32 m, m, 0x3f803f80;
    lop3.b32 $1, $1, 0x80008000, m, 0xea;
    add.u32 n, m, 0x00800080;
    lop3.b32 $1, n, 0x40004000, $1, 0xea;
    }
    """
)
# Four numbers to the four codes of a register.
_ENCODE = """
{{
.reg .b16 lo, hi;
cvt.rn.satfinite.{0}x2.f32 lo, $2, $1;
cvt.rn.satfinite.{0}x2.f32 hi, $4, $3;
mov.b32 $0, {{lo, hi}};
}}
"""
_ENCODE_E4M3 = tl.constexpr(_ENCODE.format("e4m3"))
_ENCODE_E5M2 = tl.constexpr(_ENCODE.format("e5m2"))


@triton.jit
def decode_factor(FORMAT: tl.constexpr, ISA: tl.constexpr):
    """What the numbers of `decode_pair` have to be multiplied by."""
    return 256.0 if (FORMAT == FP8_E4M3 and ISA != PTX_FP8) else 1.0


@triton.jit
def decode_pair(x, FORMAT: tl.constexpr, ISA: tl.constexpr):
    """uint16 pairs of codes as two fp16 tensors, even and odd channels, in units of `decode_factor`."""
    if ISA != PLAIN and FORMAT == INT8:
        # 0x6400 | byte is the fp16 number 1024 + byte.
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 m, c;
            mov.b32 m, 0x64646464;
            mov.b32 c, 0x64806480;
            prmt.b32 $0, $2, m, 0x4240;
            prmt.b32 $1, $2, m, 0x4341;
            sub.rn.f16x2 $0, $0, c;
            sub.rn.f16x2 $1, $1, c;
            }
            """,
            "=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif ISA != PLAIN and FORMAT == FP8_E5M2:
        # e5m2 is the upper byte of fp16.
        return tl.inline_asm_elementwise(
            """
            prmt.b32 $0, $2, 0, 0x2404;
            and.b32 $1, $2, 0xff00ff00;
            """,
            "=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif ISA == PTX and FORMAT == FP8_E4M3:
        return tl.inline_asm_elementwise(
            _DECODE_E4M3, "=&r,=&r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    elif ISA == PTX_FP8 and FORMAT == FP8_E4M3:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            .reg .b16 e, o;
            prmt.b32 t, $2, 0, 0x3120;
            mov.b32 {e, o}, t;
            cvt.rn.f16x2.e4m3x2 $0, e;
            cvt.rn.f16x2.e4m3x2 $1, o;
            }
            """,
            "=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return _decode(x & 0xFF, FORMAT), _decode(x >> 8, FORMAT)


@triton.jit
def _decode(code, FORMAT: tl.constexpr):
    """One code in each uint16."""
    if FORMAT == FP8_E4M3:
        # The same fields one exponent bit lower: the number times 2^-8, subnormals included. NaN alone carries into the
        # exponent's first bit when the mantissa's last is added to it.
        bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        bits = bits | ((bits + 0x80) & 0x4000)
        return bits.to(tl.uint16).to(tl.float16, bitcast=True)
    elif FORMAT == FP8_E5M2:
        return (code << 8).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        return (code | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True) - 1152.0


@triton.jit
def encode(x, FORMAT: tl.constexpr, ISA: tl.constexpr):
    """fp32 numbers in code units as uint8 codes: rounded to nearest even, clamped, NaN as `formats.py` says."""
    if FORMAT == INT8:
        # Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
        clamped = tl.minimum(tl.maximum(x, -127.0), 127.0)
        rounded = (clamped + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        return tl.where(x == x, rounded + 128, 0).to(tl.uint8)
    elif ISA == PTX_FP8:
        asm: tl.constexpr = _ENCODE_E4M3 if FORMAT == FP8_E4M3 else _ENCODE_E5M2
        return tl.inline_asm_elementwise(asm, "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4)
    elif FORMAT == FP8_E4M3:
        return _encode_fp8(x, 448.0, 3, 7)
    else:
        return _encode_fp8(x, 57344.0, 2, 15)


@triton.jit
def _encode_fp8(x, QMAX: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """fp8 by integers: exact in the interpreter and on devices without the conversion."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), QMAX)
    magnitude_bits = magnitude.to(tl.int32, bitcast=True)
    # Normal numbers: round the mantissa to nearest even, then move the exponent's bias.
    shift: tl.constexpr = 23 - MANTISSA
    tie = (magnitude_bits >> shift) & 1
    normal = ((magnitude_bits + ((1 << (shift - 1)) - 1) + tie) >> shift) - ((127 - BIAS) << MANTISSA)
    # Subnormal ones are multiples of 2^(1 - BIAS - MANTISSA): adding a number of that many ulps rounds them.
    unit: tl.constexpr = 2.0 ** (23 + 1 - BIAS - MANTISSA)
    subnormal = (magnitude + unit).to(tl.int32, bitcast=True) & 0x7FFFFF
    smallest_normal: tl.constexpr = 2.0 ** (1 - BIAS)
    code = tl.where(magnitude < smallest_normal, subnormal, normal) | sign
    return tl.where(x == x, code, 0x7F).to(tl.uint8)


@triton.jit
def round_up_to_bf16_bits(x):
    """The bits of the smallest bfloat16 not below x (positive fp32), as int16; those of NaN if x is not finite."""
    bits = tl.where(x < float("inf"), x.to(tl.int32, bitcast=True), 0x7FC00000)
    return ((bits + 0xFFFF) >> 16).to(tl.int16)


@triton.jit
def bf16_bits_to_fp32(bits):
    """int16 bits of a bfloat16 as fp32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
