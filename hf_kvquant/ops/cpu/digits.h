// Products of a few rows with int8 codes by the instruction that multiplies and adds bytes, four at a time: half the
// arithmetic of float32. Rows become integers of 16 bits, relative to their largest number, in two digits of 8 bits;
// the sums of products are exact. That is for queries of 16 bits: outputs are rounded to 8 or 11 bits, which hides it.
//
// A tile is `[depth, columns]` groups: of four codes that are neighbours in the direction of the sum.
#pragma once

#include "formats.h"
#include "products.h"
#include "runtime.h"

namespace {

// Tokens of a tile: it and the next one's rows have room in the first cache.
constexpr int64_t tile_tokens(int64_t dim) { return dim <= 64 ? 128 : 64; }

// Rows of numbers in digits, with room for `stride` numbers each.
struct Digits {
    int32_t* groups;  // [rows, 2, stride / 4]: high digits, and low ones
    int32_t* starts;  // [rows, 2]: what their sums start from; for digits that have a sign
    float* units;     // [rows]
    int64_t stride;

    int32_t* high(int64_t row) const { return groups + uint64_t(row * stride) / 2; }
    int32_t* low(int64_t row) const { return high(row) + uint64_t(stride) / 4; }
};
Digits digits_from(Carver& carver, int64_t rows, int64_t stride) {
    return {carver.take<int32_t>(rows * stride / 2), carver.take<int32_t>(rows * 2), carver.take<float>(rows), stride};
}

// The tile that will be read next: as many lines as one has are fetched half while this one is made, half while it is
// multiplied, for nothing is fetched faster than memory gives it.
struct Ahead {
    const uint8_t* const* row;
    int64_t dim, tokens, offset = 0;  // tokens of a tile

    // PLACES lines.
    INLINE void fetch() {
        const int64_t place = uint64_t(tokens) / PLACES;
        UNROLL for (int i = 0; i < PLACES; i++) __builtin_prefetch(row[i * place] + offset);
        if (FETCHES_TWICE && offset + 64 <= dim)
            UNROLL for (int i = 0; i < PLACES; i++) prefetch_to_second_cache(row[i * place + tokens] + offset);
        offset += 64;
        row += offset >= dim;
        offset = offset >= dim ? 0 : offset;
    }
};

// Rows of the query, `dim` a multiple of 16.
void split_query(const float* q, int64_t q_stride, int64_t num_rows, int64_t dim, const Digits& digits);

// As dots_of_rows, for a query that has been split. Tiles are as large as `next`, which is fetched on the way.
void dots_of_digits(const Digits& q, int64_t num_rows, const uint8_t* const* rows, int64_t count, int64_t dim,
                    int32_t* tile, Ahead next, float* out, int64_t out_stride);

// As accumulate_rows; `dim` is a multiple of 16, no weight is negative, and they are zero up to a multiple of 16.
// `digits` has room for them.
void accumulate_digits(const float* weights, int64_t weight_stride, int64_t num_rows, const uint8_t* const* rows,
                       int64_t count, int64_t dim, const Digits& digits, int32_t* tile, Ahead next, float* out,
                       int64_t out_stride);

#if HAS_DIGITS

INLINE i32 rounded(f32 x) { return (i32)_mm512_cvtps_epi32((__m512)x); }
INLINE void store_bytes(int32_t* to, i32 x) { _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)x)); }

// The largest magnitude in a row, NaN if there is a NaN or an infinity, and not so small that its reciprocal overflows.
INLINE float size_of_row(const float* x, int64_t count) {
    f32 most = splat(0x1p-100f), unusable = {};
    for (int64_t i = 0; i < count; i += W) {
        const f32 v = load<f32>(x + i);
        most = larger(larger(v, -v), most);
        unusable += v - v;
    }
    return _mm512_reduce_max_ps((__m512)most) + _mm512_reduce_add_ps((__m512)unusable);
}

// Here digits have a sign and codes have none, so sums start from the codes' offset.
void split_query(const float* q, int64_t q_stride, int64_t num_rows, int64_t dim, const Digits& digits) {
    constexpr float range = 127 * 256;
    for (int64_t r = 0; r < num_rows; r++) {
        const float* x = q + r * q_stride;
        const float size = size_of_row(x, dim), reciprocal = range / size;
        i32 sum = {};
        for (int64_t i = 0; i < dim; i += W) {
            const i32 number = rounded(load<f32>(x + i) * reciprocal), up = number + 128;
            sum += number;
            store_bytes(digits.high(r) + i / 4, up >> 8);
            store_bytes(digits.low(r) + i / 4, up ^ 128);
        }
        const int32_t total = _mm512_reduce_add_epi32((__m512i)sum);
        digits.starts[2 * r] = -128 * (total >> 8);
        digits.starts[2 * r + 1] = -128 * (total & 255);
        digits.units[r] = size / range;
    }
}
// Here digits have no sign and codes have one.
INLINE void split_weights(const float* x, int64_t count, const Digits& digits, int64_t row) {
    constexpr float range = 65535;
    const float size = size_of_row(x, count), reciprocal = range / size;
    int32_t *high = digits.high(row), *low = digits.low(row);
    for (int64_t i = 0; i < count; i += W, high += W / 4, low += W / 4) {
        const i32 number = rounded(load<f32>(x + i) * reciprocal);
        store_bytes(high, number >> 8);
        store_bytes(low, number);
    }
    digits.units[row] = size / range;
}

INLINE __m512i load_bytes(const uint8_t* p, int64_t count) {
    return count >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((uint64_t(1) << count) - 1, p);
}
// 16 x 16 groups, turned.
INLINE void turn(__m512i (&x)[16]) {
    __m512i y[16];
    UNROLL for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
        y[i] = _mm512_unpacklo_epi64(a, c);
        y[i + 1] = _mm512_unpackhi_epi64(a, c);
        y[i + 2] = _mm512_unpacklo_epi64(b, d);
        y[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(y[i], y[i + 4], 0x88), b = _mm512_shuffle_i32x4(y[i], y[i + 4], 0xDD);
        const __m512i c = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0xDD);
        x[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(a, c, 0xDD);
        x[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        x[i + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
}
// `[dim / 4, ahead.tokens]` groups of channels; tokens and dim are multiples of 16.
INLINE void turned_tile(const uint8_t* const* rows, int64_t tokens, int64_t dim, int32_t* tile, Ahead& ahead) {
    const int64_t stride = ahead.tokens;
    for (int64_t t = 0; t < tokens; t += 16)
        for (int64_t d = 0; d < dim; d += 64) {
            ahead.fetch();
            ahead.fetch();
            __m512i x[16];
            UNROLL for (int i = 0; i < 16; i++) x[i] = load_bytes(rows[t + i] + d, dim - d);
            turn(x);
            int32_t* to = tile + d / 4 * stride + t;
            UNROLL for (int i = 0; i < 16; i++)
                if (4 * i < dim - d) _mm512_store_si512(to + i * stride, x[i]);
        }
}
// `[tokens / 4, dim]` groups of tokens, as bytes with a sign; tokens is a multiple of 8 and dim of 16.
INLINE void plain_tile(const uint8_t* const* rows, int64_t tokens, int64_t dim, int32_t* tile, Ahead& ahead) {
    // Unpacking works inside quarters of a register, so channels are dealt to the quarters first.
    const __m512i dealt = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i offset = _mm512_set1_epi8(char(0x80));
    for (int64_t first = 0; first < tokens; first += 8)
        for (int64_t d = 0; d < dim; d += 64) {
            ahead.fetch();
            UNROLL for (int64_t t = first; t < first + 8; t += 4) {
                __m512i x[4];
                UNROLL for (int i = 0; i < 4; i++)
                    x[i] = _mm512_permutexvar_epi32(dealt, load_bytes(rows[t + i] + d, dim - d));
                const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
                const __m512i c = _mm512_unpacklo_epi8(x[2], x[3]), e = _mm512_unpackhi_epi8(x[2], x[3]);
                x[0] = _mm512_unpacklo_epi16(a, c);
                x[1] = _mm512_unpackhi_epi16(a, c);
                x[2] = _mm512_unpacklo_epi16(b, e);
                x[3] = _mm512_unpackhi_epi16(b, e);
                int32_t* to = tile + t / 4 * dim + d;
                UNROLL for (int i = 0; i < 4; i++)
                    if (16 * i < dim - d) _mm512_store_si512(to + 16 * i, _mm512_xor_si512(x[i], offset));
            }
        }
}

// GCC takes the loop below apart, with twice as many moves as products.
#if defined(__clang__)
#define KEEP_LOOPS
#else
#define KEEP_LOOPS __attribute__((optimize("no-tree-pre")))
#endif
#define INLINE_LAMBDA __attribute__((always_inline))

// out[r][c] = row r of the query . column c of the tile, or, with weights, that much more; N rows. Depth is a multiple of
// PLACES.
template <int N, bool QUERY>
KEEP_LOOPS void multiply(const Digits& digits, int64_t row, const int32_t* tile, int64_t tile_stride, int64_t columns,
                         int64_t depth, Ahead* ahead, float* out, int64_t out_stride) {
    const int64_t stride = uint64_t(digits.stride) / 4;
    const int32_t* groups = digits.high(row);
    Ahead next = ahead ? *ahead : Ahead{};  // here it stays in registers
    const auto some = [&](auto vectors, bool fetches) INLINE_LAMBDA {
        constexpr int M = vectors();
        __m512i sums[2][N][M];
        UNROLL for (int p = 0; p < 2; p++) UNROLL for (int r = 0; r < N; r++) UNROLL for (int m = 0; m < M; m++)
            sums[p][r][m] = _mm512_set1_epi32(QUERY ? digits.starts[2 * (row + r) + p] : 0);
        for (int64_t first = 0; first < depth; first += PLACES) {
            if (fetches) next.fetch();
            for (int64_t k = first; k < first + PLACES; k++) {
                __m512i codes[M];
                UNROLL for (int m = 0; m < M; m++) codes[m] = _mm512_load_si512(tile + k * tile_stride + 16 * m);
                UNROLL for (int p = 0; p < 2; p++) UNROLL for (int r = 0; r < N; r++) {
                    const __m512i digit = _mm512_set1_epi32(groups[(2 * r + p) * stride + k]);
                    UNROLL for (int m = 0; m < M; m++)  // bytes without a sign times bytes with one
                        sums[p][r][m] = QUERY ? _mm512_dpbusd_epi32(sums[p][r][m], codes[m], digit)
                                              : _mm512_dpbusd_epi32(sums[p][r][m], digit, codes[m]);
                }
            }
        }
        UNROLL for (int r = 0; r < N; r++) UNROLL for (int m = 0; m < M; m++) {
            f32 x = (f32)_mm512_cvtepi32_ps(sums[0][r][m]) * 256.0f + (f32)_mm512_cvtepi32_ps(sums[1][r][m]);
            float* to = out + r * out_stride + 16 * m;
            x = x * digits.units[row + r];
            store(to, QUERY ? x : load<f32>(to) + x);
        }
    };
    for (; columns >= 2 * W; columns -= 2 * W, tile += 2 * W, out += 2 * W) some(std::integral_constant<int, 2>(), ahead);
    if (columns) some(std::integral_constant<int, 1>(), false);
}
template <bool QUERY>
void multiply_rows(const Digits& digits, int64_t num_rows, const int32_t* tile, int64_t tile_stride, int64_t columns,
                   int64_t depth, Ahead ahead, float* out, int64_t out_stride) {
    in_groups(num_rows, [&](int64_t r, auto n) {
        multiply<n(), QUERY>(digits, r, tile, tile_stride, columns, depth, r ? nullptr : &ahead, out + r * out_stride,
                             out_stride);
    });
}

void dots_of_digits(const Digits& q, int64_t num_rows, const uint8_t* const* rows, int64_t count, int64_t dim,
                    int32_t* tile, Ahead next, float* out, int64_t out_stride) {
    for (int64_t t = 0; t < count; t += next.tokens) {
        const int64_t here = round_up(std::min(next.tokens, count - t), W);
        Ahead ahead = t + here < count ? Ahead{rows + t + here, dim, next.tokens} : next;
        turned_tile(rows + t, here, dim, tile, ahead);
        multiply_rows<true>(q, num_rows, tile, next.tokens, here, dim / 4, ahead, out + t, out_stride);
    }
}
void accumulate_digits(const float* weights, int64_t weight_stride, int64_t num_rows, const uint8_t* const* rows,
                       int64_t count, int64_t dim, const Digits& digits, int32_t* tile, Ahead next, float* out,
                       int64_t out_stride) {
    for (int64_t r = 0; r < num_rows; r++) split_weights(weights + r * weight_stride, round_up(count, W), digits, r);
    for (int64_t t = 0; t < count; t += next.tokens) {
        const int64_t here = round_up(std::min(next.tokens, count - t), W);
        Ahead ahead = t + here < count ? Ahead{rows + t + here, dim, next.tokens} : next;
        const Digits part = {digits.groups + t / 4, digits.starts, digits.units, digits.stride};
        plain_tile(rows + t, here, dim, tile, ahead);
        multiply_rows<false>(part, num_rows, tile, dim, dim, here / 4, ahead, out, out_stride);
    }
}
#endif

}  // namespace
