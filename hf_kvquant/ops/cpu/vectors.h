// Vectors of W floats, as wide as the instruction set has them, in the vector types of GCC and clang.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WIDTH 16
#elif defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#define WIDTH 8
#else
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#define WIDTH 4
#endif
#if WIDTH == 16 && defined(__AVX512VNNI__)
#define HAS_DIGITS 1
#else
#define HAS_DIGITS 0
#endif
#if WIDTH == 16 && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

namespace {

constexpr int W = WIDTH;
constexpr float INF = std::numeric_limits<float>::infinity();

typedef float f32 __attribute__((vector_size(4 * W)));
typedef int32_t i32 __attribute__((vector_size(4 * W)));
typedef uint32_t u32 __attribute__((vector_size(4 * W)));
typedef uint16_t u16 __attribute__((vector_size(2 * W)));
typedef int16_t i16 __attribute__((vector_size(2 * W)));
typedef uint8_t u8 __attribute__((vector_size(W)));
typedef int8_t i8 __attribute__((vector_size(W)));
typedef float quad __attribute__((vector_size(16)));

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

template <class V, class T>
INLINE V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V, class T>
INLINE void store(T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}
INLINE f32 splat(float x) { return x - f32{}; }
INLINE uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}
INLINE float float_of(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}
// The second operand where neither is larger, so a NaN in it stays.
INLINE f32 larger(f32 a, f32 b) { return a > b ? a : b; }

// -- shuffles ----------------------------------------------------------------------------------------------------

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i32){__VA_ARGS__})
#endif
#if WIDTH == 16
#define LOW_PAIRS 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGH_PAIRS 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define FIRST_HALVES 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define SECOND_HALVES 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define EVEN_QUARTERS 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define ODD_QUARTERS 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#elif WIDTH == 8
#define LOW_PAIRS 0, 8, 1, 9, 4, 12, 5, 13
#define HIGH_PAIRS 2, 10, 3, 11, 6, 14, 7, 15
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW_PAIRS 0, 4, 1, 5
#define HIGH_PAIRS 2, 6, 3, 7
#define LOW_HALVES LOW_PAIRS
#define HIGH_HALVES HIGH_PAIRS
#endif

// Sums of neighbours: in each group of four lanes a0+a2, b0+b2, a1+a3, b1+b3.
INLINE f32 fold(f32 a, f32 b) { return SHUFFLE(a, b, LOW_PAIRS) + SHUFFLE(a, b, HIGH_PAIRS); }

// The sums over groups of four lanes.
INLINE quad sums_of(f32 folded) {
    quad parts[W / 4];
    std::memcpy(parts, &folded, sizeof folded);
    for (int step = W / 8; step; step /= 2)
        for (int i = 0; i < step; i++) parts[i] += parts[i + step];
    return parts[0];
}
// out[r * stride + j] = the sum of v[r][j].
template <int N>
INLINE void store_sums(const f32 (&v)[N][4], float* out, int64_t stride) {
    f32 folded[4] = {};
    UNROLL for (int r = 0; r < N; r++) folded[r] = fold(fold(v[r][0], v[r][2]), fold(v[r][1], v[r][3]));
#if WIDTH == 16
    if constexpr (N > 1) {
        const f32 ab = SHUFFLE(folded[0], folded[1], FIRST_HALVES) + SHUFFLE(folded[0], folded[1], SECOND_HALVES);
        const f32 cd = SHUFFLE(folded[2], folded[3], FIRST_HALVES) + SHUFFLE(folded[2], folded[3], SECOND_HALVES);
        const f32 all = SHUFFLE(ab, cd, EVEN_QUARTERS) + SHUFFLE(ab, cd, ODD_QUARTERS);
        quad parts[4];
        std::memcpy(parts, &all, sizeof all);
        UNROLL for (int r = 0; r < N; r++) store(out + r * stride, parts[r]);
        return;
    }
#endif
    UNROLL for (int r = 0; r < N; r++) store(out + r * stride, sums_of(folded[r]));
}
// All lanes put together by `two`, in a fixed order.
template <class Two>
INLINE float reduced(f32 v, Two two) {
    quad parts[W / 4];
    std::memcpy(parts, &v, sizeof v);
    for (int step = W / 8; step; step /= 2)
        for (int i = 0; i < step; i++) parts[i] = two(parts[i], parts[i + step]);
    const quad x = parts[0];
    return two(two(x[0], x[2]), two(x[1], x[3]));
}
INLINE float sum_of(f32 v) {
    return reduced(v, [](auto a, auto b) { return a + b; });
}
INLINE float largest_of(f32 v) {
    return reduced(v, [](auto a, auto b) { return a > b ? a : b; });
}
INLINE void transpose(f32 (&v)[W]) {
    f32 next[W];
    for (int stage = 1; stage < W; stage *= 2) {
        for (int i = 0; i < W / 2; i++) {
            next[2 * i] = SHUFFLE(v[i], v[i + W / 2], LOW_HALVES);
            next[2 * i + 1] = SHUFFLE(v[i], v[i + W / 2], HIGH_HALVES);
        }
        for (int i = 0; i < W; i++) v[i] = next[i];
    }
}

#if WIDTH == 16
// Unpacking works inside quarters of a register: four vectors of which each has the next four lanes of every quarter.
INLINE void put_in_order(f32 (&x)[4]) {
    const auto half = [](f32 a, f32 b) { return (f32)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88); };
    const auto other = [](f32 a, f32 b) { return (f32)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xDD); };
    const f32 a = half(x[0], x[1]), b = other(x[0], x[1]), c = half(x[2], x[3]), d = other(x[2], x[3]);
    x[0] = half(a, c);
    x[1] = half(b, d);
    x[2] = other(a, c);
    x[3] = other(b, d);
}
#endif

// -- functions ---------------------------------------------------------------------------------------------------

// e^x for x <= 0; a NaN stays one. A polynomial with the least relative error on |r| <= ln(2) / 2: within 4e-9 before
// rounding.
INLINE f32 exp_of(f32 x) {
    const float to_integer = 12582912.0f;  // 1.5 * 2^23: the integer ends up in the low bits
#if WIDTH == 16
    f32 clamped = (f32)_mm512_max_ps((__m512)splat(-200.0f), (__m512)x);  // the second one if it is a NaN
#else
    f32 clamped = x < -87.0f ? splat(-87.0f) : x;
#endif
    f32 shifted = clamped * 1.44269504f + to_integer;
    f32 n = shifted - to_integer;
    f32 r = clamped - n * 0.693145752f;  // the first 16 bits of ln(2): exact
    r = r - n * 1.42860677e-6f;
    f32 p = r * 0.001381454f + 0.008368745f;
    p = p * r + 0.04166839f;
    p = p * r + 0.1666652f;
    p = p * r + 0.49999993f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#if WIDTH == 16
    return (f32)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    i32 exponent = ((i32)shifted - (int32_t)0x4B400000 + 127) << 23;
    f32 result = p * (f32)exponent;
    return x < -87.0f ? splat(0.0f) : result;
#endif
}
INLINE float exp_of(float x) { return exp_of(splat(x))[0]; }

// Near zero an odd polynomial (Taylor's to the 13th power, error below 1e-8 for |x| < 0.4), else from e^(-2|x|).
INLINE f32 tanh_of(f32 x) {
    f32 size = larger(-x, x), z = x * x;
    f32 p = z * (21844.0f / 6081075) - 1382.0f / 155925;
    p = p * z + 62.0f / 2835;
    p = p * z - 17.0f / 315;
    p = p * z + 2.0f / 15;
    p = p * z - 1.0f / 3;
    f32 near_zero = x + x * z * p;
    f32 e = exp_of(-2.0f * size);
    f32 far = (1.0f - e) / (1.0f + e);
    return size < 0.4f ? near_zero : (x < 0.0f ? -far : far);
}

// Short integers as integers. Compilers take `__builtin_convertvector` of some widths apart.
INLINE u32 widened(u16 x) {
#if WIDTH == 16
    return (u32)_mm512_cvtepu16_epi32((__m256i)x);
#else
    return __builtin_convertvector(x, u32);
#endif
}
INLINE i32 widened(u8 b) {
#if WIDTH == 16
    return (i32)_mm512_cvtepu8_epi32((__m128i)b);
#elif WIDTH == 8
    return (i32)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&b)));
#elif defined(__aarch64__)
    uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32((uint32_t)b));
    return (i32)vmovl_u16(vget_low_u16(vmovl_u8(bytes)));
#else
    return (i32){b[0], b[1], b[2], b[3]};
#endif
}

// Integers below 65,536 as short ones.
INLINE u16 narrowed(u32 x) {
#if WIDTH == 16
    return (u16)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, u16);
#endif
}

// Half precision, denormals and NaN included.
INLINE f32 from_half(u16 h) {
#if WIDTH == 16
    return (f32)_mm512_cvtph_ps((__m256i)h);
#elif WIDTH == 8
    return (f32)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
    return (f32)vcvt_f32_f16((float16x4_t)h);
#else
    // Without a denormal on the way: a process may have them flushed.
    u32 u = __builtin_convertvector(h, u32), sign = (u & 0x8000u) << 16, magnitude = u & 0x7FFFu;
    u32 normal = (magnitude << 13) + (112u << 23), special = (magnitude << 13) | 0x7F800000u;
    u32 denormal = (u32)(__builtin_convertvector((i32)magnitude, f32) * 0x1p-24f);
    return (f32)((magnitude < 0x400u ? denormal : magnitude >= 0x7C00u ? special : normal) | sign);
#endif
}

INLINE u16 to_half(f32 x) {
#if WIDTH == 16
    return (u16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif WIDTH == 8
    return (u16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
    return (u16)vcvt_f16_f32((float32x4_t)x);
#else
    const u32 u = (u32)x, magnitude = u & 0x7FFFFFFFu, sign = u >> 16 & 0x8000u;
    const u32 normal = ((magnitude + 0xFFFu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
    const u32 denormal = (u32)((f32)magnitude + 0.5f) - bits_of(0.5f);
    const u32 finite = magnitude < 0x38800000u ? denormal : magnitude < 0x477FF000u ? normal : u32{} + 0x7C00u;
    return narrowed((magnitude > 0x7F800000u ? u32{} + 0x7E00u : finite) | sign);
#endif
}

// A product that is not joined with the sum it goes into, which would round once instead of twice.
INLINE f32 rounded_apart(f32 x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}

}  // namespace
