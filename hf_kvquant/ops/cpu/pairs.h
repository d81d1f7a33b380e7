// Products of a few rows with e4m3 codes by the instruction that multiplies and adds bfloat16, two at a time: half the
// arithmetic of float32, and numbers need not be made wider. bfloat16 holds every code. It holds a query of bfloat16, so
// logits are those of float32, as long as query times codes fits and the query has no denormals; weights become two of
// them, 17 bits in all.
#pragma once

#include "blocks.h"
#include "formats.h"
#include "products.h"

namespace {

// Rows of the query, whose numbers are bfloat16, `dim` a multiple of 16: in groups of four. Rows that are multiplied
// together lie together: of N rows `[ceil(dim / 32) * 8, N]`.
void group_query(const float* q, int64_t q_stride, int64_t num_rows, int64_t dim, uint64_t* out);

// As dots_of_rows, for a query in groups; places are blocks.
void dots_of_pairs(const uint64_t* q, int64_t num_rows, int64_t count, int64_t dim, const Reading& reading,
                   const Reading& next, float* out, int64_t out_stride);

// As accumulate_rows; `columns` is a multiple of 16, and weights are zero, and rows readable, up to a multiple of two.
// `pairs` has room for `[rows, CHUNK]`.
void accumulate_pairs(const float* weights, int64_t weight_stride, int64_t num_rows, const uint8_t* const* rows,
                      int64_t count, int64_t columns, uint32_t* pairs, const Reading& reading, const Reading& next,
                      float* out, int64_t out_stride);

#if HAS_PAIRS

// 64 codes as bfloat16, in two registers of pairs that are neighbours inside each quarter of the codes.
struct Unpacked {
    __m512i low, high;

    INLINE explicit Unpacked(__m512i codes) {
        const __m512i sign = _mm512_set1_epi8(char(0x80));
        __m512i top = _mm512_permutex2var_epi8(_mm512_load_si512(E4M3_BYTES.high), codes,
                                               _mm512_load_si512(E4M3_BYTES.high + 64));
        top = _mm512_ternarylogic_epi32(top, codes, sign, 0xF8);  // top | (codes & sign)
        const __m512i rest = _mm512_permutex2var_epi8(_mm512_load_si512(E4M3_BYTES.low), codes,
                                                      _mm512_load_si512(E4M3_BYTES.low + 64));
        low = _mm512_unpacklo_epi8(rest, top);
        high = _mm512_unpackhi_epi8(rest, top);
    }
};
INLINE f32 add_pairs(f32 sum, __m512i a, __m512i b) {
    return (f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

void group_query(const float* q, int64_t q_stride, int64_t num_rows, int64_t dim, uint64_t* out) {
    const int64_t num_groups = round_up(dim, 32) / 4;
    std::fill(out, out + num_rows * num_groups, 0);  // whatever is behind the last channel would be NaN at times
    in_groups(num_rows, [&](int64_t first, auto n) {
        for (int64_t r = 0; r < n(); r++)
            for (int64_t d = 0; d < dim; d += W) {
                const u32 numbers = (u32)load<f32>(q + (first + r) * q_stride + d) >> 16;
                uint64_t groups[4];
                store(groups, (__m256i)_mm512_cvtepi32_epi16((__m512i)numbers));
                for (int j = 0; j < 4; j++) out[first * num_groups + (d / 4 + j) * n() + r] = groups[j];
            }
    });
}

// N rows of the query on their way through the groups of a block.
template <int N>
struct PairRows {
    const uint64_t *first, *at;
    f32 sums[2][N];  // of the first and the last two tokens of every quarter, two lanes each

    INLINE explicit PairRows(const uint64_t* query) : first(query) { begin(); }
    INLINE void begin() {
        at = first;
        UNROLL for (int r = 0; r < N; r++) sums[0][r] = sums[1][r] = f32{};
    }
    INLINE void add(int k, __m512i codes) {
        const Unpacked numbers(codes);
        UNROLL for (int r = 0; r < N; r++) {
            const __m512i x = _mm512_set1_epi64(at[N * k + r]);
            sums[0][r] = add_pairs(sums[0][r], numbers.low, x);
            sums[1][r] = add_pairs(sums[1][r], numbers.high, x);
        }
    }
    INLINE void go_on() { at += 8 * N; }
    INLINE f32 result(int r) const {
        const __m512 a = (__m512)sums[0][r], b = (__m512)sums[1][r];
        return (f32)_mm512_shuffle_ps(a, b, 0x88) + (f32)_mm512_shuffle_ps(a, b, 0xDD);
    }
};
void dots_of_pairs(const uint64_t* q, int64_t num_rows, int64_t count, int64_t dim, const Reading& reading,
                   const Reading& next, float* out, int64_t out_stride) {
    in_tiles(count, reading, next, [&](int64_t t, int64_t size, int64_t tile, Fetch* fetch) {
        const Places blocks = reading.here[tile];
        in_groups(num_rows, [&](int64_t r, auto n) {
            dots_of_blocks<n()>(PairRows<n()>(q + r * (round_up(dim, 32) / 4)), blocks.start,
                                round_up(size, BLOCK) / BLOCK, dim, r ? nullptr : fetch, out + r * out_stride + t,
                                out_stride);
        });
    });
}

// The weights of a row in pairs of tokens: their bfloat16, and CHUNK / 2 further on that of the rest, which of an infinity
// is no number.
INLINE void split_weights(const float* weights, int64_t count, uint32_t* pairs) {
    for (int64_t t = 0; t < count; t += W, pairs += W / 2) {
        const f32 weight = load<f32>(weights + t);
        const __m256i high = (__m256i)_mm512_cvtneps_pbh((__m512)weight);
        const f32 rest = weight - (f32)((u32)_mm512_cvtepu16_epi32(high) << 16);
        store(pairs, high);
        store(pairs + CHUNK / 2, (__m256i)_mm512_cvtneps_pbh((__m512)rest));
    }
}
// For N rows and 64 columns from `column` on, of which `left` are there.
template <int N>
void add_pairs_of_rows(const uint32_t* pairs, const uint8_t* const* rows, int64_t count, int64_t column, int64_t left,
                       float* out, int64_t out_stride, Fetch* fetch) {
    const __mmask64 there = left < 64 ? (uint64_t(1) << left) - 1 : ~uint64_t(0);
    f32 sums[N][4] = {};
    for (int64_t t = 0; t < count; t += 2) {
        if (fetch && t % 4 == 0) fetch->for_four_tokens();
        const __m512i a = _mm512_maskz_loadu_epi8(there, rows[t] + column);
        const __m512i b = _mm512_maskz_loadu_epi8(there, rows[t + 1] + column);
        const Unpacked first(_mm512_unpacklo_epi8(a, b)), second(_mm512_unpackhi_epi8(a, b));
        const __m512i v[4] = {first.low, first.high, second.low, second.high};
        UNROLL for (int r = 0; r < N; r++)
            UNROLL for (int p = 0; p < 2; p++) {
                const __m512i weight = _mm512_set1_epi32(pairs[r * CHUNK + p * (CHUNK / 2) + t / 2]);
                UNROLL for (int m = 0; m < 4; m++) sums[r][m] = add_pairs(sums[r][m], v[m], weight);
            }
    }
    UNROLL for (int r = 0; r < N; r++) {
        put_in_order(sums[r]);
        float* to = out + r * out_stride + column;
        for (int m = 0; m < 4 && m * W < left; m++) store(to + m * W, load<f32>(to + m * W) + sums[r][m]);
    }
}
void accumulate_pairs(const float* weights, int64_t weight_stride, int64_t num_rows, const uint8_t* const* rows,
                      int64_t count, int64_t columns, uint32_t* pairs, const Reading& reading, const Reading& next,
                      float* out, int64_t out_stride) {
    for (int64_t r = 0; r < num_rows; r++) split_weights(weights + r * weight_stride, count, pairs + r * CHUNK);
    in_tiles(count, reading, next, [&](int64_t t, int64_t size, int64_t, Fetch* fetch) {
        for (int64_t column = 0; column < columns; column += 64)
            in_groups(num_rows, [&](int64_t r, auto n) {
                add_pairs_of_rows<n()>(pairs + r * CHUNK + t / 2, rows + t, size, column,
                                       columns - column, out + r * out_stride, out_stride, r || column ? nullptr : fetch);
            });
    });
}
#endif

}  // namespace
