// From stored elements to numbers.
#pragma once

#include "vectors.h"

namespace {

enum Format { E4M3, E5M2, INT8, FLOAT, BFLOAT, HALF };

// `read` gives W numbers; a stored number is `factor` times what it gives. `read_step` gives STEP times as many, where
// that is cheaper. `write`, of numbers only, rounds to the nearest one. DIGITS: codes are integers, and there is an
// instruction for products of bytes.
template <int F>
struct Codec;

#if defined(__AVX512VBMI__)
// 8-bit floats by looking up both bytes of their bfloat16, which holds every one of them; 64 at a time. Unpacking works
// inside quarters of a register, so groups of four codes are dealt to the quarters first.
INLINE void look_up(const uint8_t* p, const uint8_t (&high)[128], const uint8_t (&low)[128], f32 (&out)[4]) {
    const __m512i dealt = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i codes = _mm512_permutexvar_epi32(dealt, _mm512_loadu_si512(p));
    const __m512i sign = _mm512_set1_epi8(char(0x80)), zero = _mm512_setzero_si512();
    __m512i top = _mm512_permutex2var_epi8(_mm512_load_si512(high), codes, _mm512_load_si512(high + 64));
    top = _mm512_ternarylogic_epi32(top, codes, sign, 0xF8);  // top | (codes & sign)
    const __m512i rest = _mm512_permutex2var_epi8(_mm512_load_si512(low), codes, _mm512_load_si512(low + 64));
    const __m512i first = _mm512_unpacklo_epi8(rest, top), second = _mm512_unpackhi_epi8(rest, top);
    out[0] = (f32)_mm512_unpacklo_epi16(zero, first);
    out[1] = (f32)_mm512_unpackhi_epi16(zero, first);
    out[2] = (f32)_mm512_unpacklo_epi16(zero, second);
    out[3] = (f32)_mm512_unpackhi_epi16(zero, second);
}
struct Bytes {
    alignas(64) uint8_t high[128];
    alignas(64) uint8_t low[128];
};
// Bytes of the bfloat16 of the positive codes of a format with this many mantissa bits and this bias.
constexpr Bytes bytes_of(int mantissa_bits, int bias, bool has_infinity) {
    Bytes bytes = {};
    for (int code = 0; code < 128; code++) {
        int exponent = code >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1), bits = 0;
        const int largest = (128 >> mantissa_bits) - 1;
        if (has_infinity ? exponent == largest : code == 127) {
            bits = 0x7F80 | (mantissa && code ? (has_infinity ? mantissa << (7 - mantissa_bits) : 0x40) : 0);
        } else if (exponent) {
            bits = (exponent - bias + 127) << 7 | mantissa << (7 - mantissa_bits);
        } else if (mantissa) {  // denormal: shift until the leading bit is implied
            int shift = 0;
            while (!(mantissa << shift & 1 << mantissa_bits)) shift++;
            const int rest = mantissa << shift & ((1 << mantissa_bits) - 1);
            bits = (1 - bias - shift + 127) << 7 | rest << (7 - mantissa_bits);
        }
        bytes.high[code] = uint8_t(bits >> 8);
        bytes.low[code] = uint8_t(bits);
    }
    return bytes;
}
constexpr Bytes E4M3_BYTES = bytes_of(3, 7, false), E5M2_BYTES = bytes_of(2, 15, true);
#endif

template <>
struct Codec<E4M3> {
    static constexpr bool DIGITS = false;
    typedef uint8_t T;
#if defined(__AVX512VBMI__)
    static constexpr int STEP = 4;
    static constexpr float factor = 1.0f;
    static INLINE void read_step(const T* p, f32 (&out)[STEP]) {
        look_up(p, E4M3_BYTES.high, E4M3_BYTES.low, out);
    }
    static INLINE f32 read(const T* p) { return decode(load<u8>(p)) * 256.0f; }
#else
    static constexpr int STEP = 1;
    static constexpr float factor = 256.0f;
    static INLINE f32 read(const T* p) { return decode(load<u8>(p)); }
#endif
    // As half precision, seven places to the left is a 256th, denormals included. Only NaN has to be moved: adding to
    // the last bit of the mantissa carries into the exponent's first bit for it alone.
    static INLINE f32 decode(u8 b) {
        i16 h = (__builtin_convertvector((i8)b, i16) << 7) & (int16_t)0xBFFF;
        return from_half((u16)(h | ((h + 0x80) & 0x4000)));
    }
};
template <>
struct Codec<E5M2> {
    static constexpr bool DIGITS = false;
    typedef uint8_t T;
    static constexpr float factor = 1.0f;
#if defined(__AVX512VBMI__)
    static constexpr int STEP = 4;
    static INLINE void read_step(const T* p, f32 (&out)[STEP]) {
        look_up(p, E5M2_BYTES.high, E5M2_BYTES.low, out);
    }
#else
    static constexpr int STEP = 1;
#endif
    static INLINE f32 read(const T* p) { return from_half(__builtin_convertvector(load<u8>(p), u16) << 8); }
};
template <>
struct Codec<INT8> {
    static constexpr bool DIGITS = HAS_DIGITS;
    typedef uint8_t T;
    static constexpr int STEP = 1;
    static constexpr float factor = 1.0f;
    static INLINE f32 read(const T* p) { return __builtin_convertvector(widened(load<u8>(p)) - 128, f32); }
};
template <>
struct Codec<FLOAT> {
    static constexpr bool DIGITS = false;
    static constexpr int STEP = 1;
    typedef float T;
    static constexpr float factor = 1.0f;
    static INLINE f32 read(const T* p) { return load<f32>(p); }
    static INLINE void write(T* p, f32 x) { store(p, x); }
};
template <>
struct Codec<BFLOAT> {
    static constexpr bool DIGITS = false;
    static constexpr int STEP = 1;
    typedef uint16_t T;
    static constexpr float factor = 1.0f;
    static INLINE f32 read(const T* p) { return (f32)(widened(load<u16>(p)) << 16); }
    static INLINE void write(T* p, f32 x) {
        const u32 u = (u32)x, rounded = (u + 0x7FFFu + (u >> 16 & 1u)) >> 16;
        store(p, narrowed((u & 0x7FFFFFFFu) > 0x7F800000u ? u32{} + 0x7FC0u : rounded));
    }
};
template <>
struct Codec<HALF> {
    static constexpr bool DIGITS = false;
    static constexpr int STEP = 1;
    typedef uint16_t T;
    static constexpr float factor = 1.0f;
    static INLINE f32 read(const T* p) { return from_half(load<u16>(p)); }
    static INLINE void write(T* p, f32 x) { store(p, to_half(x)); }
};

template <class Use>
INLINE void with_format(int64_t format, Use use) {
    switch (format) {
        case E4M3: return use(Codec<E4M3>());
        case E5M2: return use(Codec<E5M2>());
        case INT8: return use(Codec<INT8>());
        case FLOAT: return use(Codec<FLOAT>());
        case BFLOAT: return use(Codec<BFLOAT>());
        default: return use(Codec<HALF>());
    }
}
int64_t size_of(int64_t format) { return format == FLOAT ? 4 : format >= BFLOAT ? 2 : 1; }

// Numbers from p on, `count` of which exist.
template <class C>
INLINE f32 read_some(const typename C::T* p, int64_t count) {
    if (count >= W) return C::read(p);
    typename C::T padded[W] = {};
    std::memcpy(padded, p, count * sizeof *p);
    return C::read(padded);
}

// The first `count` of them.
template <class C>
INLINE void write_some(typename C::T* p, f32 x, int64_t count) {
    if (count >= W) return C::write(p, x);
    typename C::T padded[W];
    C::write(padded, x);
    std::memcpy(p, padded, count * sizeof *p);
}

// `count` numbers from index on, in one of the formats that are no codes. Up to a multiple of W of them are read.
void store_numbers(char* output, int64_t index, int64_t format, const float* x, int64_t count) {
    with_format(format, [&](auto codec) {
        typedef decltype(codec) C;
        if constexpr (sizeof(typename C::T) > 1)
            for (int64_t i = 0; i < count; i += W)
                write_some<C>(reinterpret_cast<typename C::T*>(output) + index + i, load<f32>(x + i), count - i);
    });
}

}  // namespace
