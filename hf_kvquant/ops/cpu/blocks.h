// Blocks of 16 tokens, one row behind the other, and K in them. In registers its codes become groups of four that are
// neighbours in the direction of the sum, a token in each lane. What is next is made of its rows between the products with
// what is there, for a processor has units for both; and nothing goes through memory, as storing it would take longer than
// multiplying.
#pragma once

#include "order.h"

namespace {

constexpr int64_t BLOCK = PLACE;
static_assert(BLOCK == 16);

#if WIDTH == 16

// GCC takes the loops below apart, with twice as many moves as products.
#if defined(__clang__)
#define KEEP_LOOPS
#else
#define KEEP_LOOPS __attribute__((optimize("no-tree-pre")))
#endif

// A block's codes of 32 channels on the way to groups of channels: eight registers of 16 tokens. A mask says which of
// the channels there are.
struct Turned {
    __m512i x[8];

    // Of eight steps the `i`th.
    INLINE void make(int i, const uint8_t* from, int64_t dim, __mmask16 low, __mmask16 high) {
        if (i < 4) {
            const uint8_t* row = from + (i < 2 ? 2 * i : 2 * i + 4) * dim;
            const __m512i a = two_rows(row, dim, low, high), b = two_rows(row + dim, dim, low, high);
            x[2 * i] = _mm512_unpacklo_epi32(a, b);
            x[2 * i + 1] = _mm512_unpackhi_epi32(a, b);
        } else if (i < 6) {
            __m512i* four = x + 4 * (i - 4);
            const __m512i a = four[0], b = four[1], c = four[2], d = four[3];
            four[0] = _mm512_unpacklo_epi64(a, c);
            four[1] = _mm512_unpackhi_epi64(a, c);
            four[2] = _mm512_unpacklo_epi64(b, d);
            four[3] = _mm512_unpackhi_epi64(b, d);
        } else {
            UNROLL for (int k = 2 * (i - 6); k < 2 * (i - 6) + 2; k++) {
                const __m512i a = x[k], b = x[k + 4];
                x[k] = _mm512_shuffle_i32x4(a, b, 0x88);
                x[k + 4] = _mm512_shuffle_i32x4(a, b, 0xDD);
            }
        }
    }
    // A row and the fourth behind it, so that tokens come out in order.
    INLINE static __m512i two_rows(const uint8_t* row, int64_t dim, __mmask16 low, __mmask16 high) {
        return _mm512_mask_loadu_epi32(_mm512_maskz_loadu_epi32(low, row), high, row + 4 * dim - 32);
    }
};

// out[r][t] = row r of the query . token t of the blocks, for N rows that multiply groups.
template <int N, class Rows>
KEEP_LOOPS void dots_of_blocks(Rows rows, const uint8_t* const* blocks, int64_t num_blocks, int64_t dim, Fetch* fetch,
                               float* out, int64_t out_stride) {
    Fetch next = fetch ? *fetch : Fetch{};  // here it stays in registers
    const __mmask16 last_low = dim % 32 ? 0x000F : 0x00FF, last_high = dim % 32 ? 0x0F00 : 0xFF00;
    Turned now;
    UNROLL for (int i = 0; i < 8; i++)
        now.make(i, blocks[0], dim, dim < 32 ? last_low : 0x00FF, dim < 32 ? last_high : 0xFF00);
    int64_t d = 0;
    for (int64_t left = num_blocks * ((dim + 31) / 32); left > 0; left--) {
        const bool is_last = d + 32 >= dim;
        d = is_last ? 0 : d + 32;
        blocks += is_last && left > 1;
        if (fetch) UNROLL for (int i = 0; i < 2; i++) next();
        const uint8_t* from = blocks[0] + d;
        const __mmask16 low = d + 32 > dim ? last_low : 0x00FF, high = d + 32 > dim ? last_high : 0xFF00;
        Turned then;
        UNROLL for (int k = 0; k < 8; k++) {
            rows.add(k, now.x[k]);
            then.make(k, from, dim, low, high);
        }
        now = then;
        rows.go_on();
        if (!is_last) continue;
        UNROLL for (int r = 0; r < N; r++) store(out + r * out_stride, rows.result(r));
        rows.begin();
        out += BLOCK;
    }
    if (fetch) *fetch = next;
}

#endif

}  // namespace
