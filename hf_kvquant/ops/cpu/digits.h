// Products of a few rows with int8 codes by the instruction that multiplies and adds bytes, four at a time: half the
// arithmetic of float32. Rows become integers of 16 bits, relative to their largest number, in two digits of 8 bits;
// the sums of products are exact. That is for queries of 16 bits: outputs are rounded to 8 or 11 bits, which hides it.
#pragma once

#include "blocks.h"
#include "formats.h"
#include "products.h"
#include "runtime.h"

namespace {

// Rows of numbers in digits, with room for `stride` numbers each. Rows that are multiplied together lie together: of N
// rows `[stride / 4, N, 2]` groups of four bytes, high digits and low ones in turn.
struct Digits {
    int32_t* groups;
    int32_t* starts;  // [rows, 2]: what their sums start from; for digits that have a sign
    float* units;     // [rows]
    int64_t stride;

    int32_t* of(int64_t row) const { return groups + uint64_t(row * stride) / 2; }
};
Digits digits_from(Carver& carver, int64_t rows, int64_t stride) {
    return {carver.take<int32_t>(rows * stride / 2), carver.take<int32_t>(rows * 2), carver.take<float>(rows), stride};
}

// The size of a row of weights, none of them negative, whose largest bits these are: NaN if there is a NaN or an infinity,
// and not so small that its reciprocal overflows.
INLINE float size_of_weights(u32 largest) {
#if HAS_DIGITS
    const uint32_t bits = _mm512_reduce_max_epu32((__m512i)largest);
    return bits < bits_of(INF) ? std::max(float_of(bits), 0x1p-100f) : NAN;
#else
    return 0.0f;
#endif
}

// Rows of the query, `dim` a multiple of 16.
void split_query(const float* q, int64_t q_stride, int64_t num_rows, int64_t dim, const Digits& digits);

// As dots_of_rows, for a query that has been split; places are blocks.
void dots_of_digits(const Digits& q, int64_t num_rows, int64_t count, int64_t dim, const Reading& reading,
                    const Reading& next, float* out, int64_t out_stride);

// As accumulate_rows; `dim` is a multiple of 16, no weight is negative or larger than the row's size, and they are zero
// up to a multiple of 16. `digits` has room for them.
void accumulate_digits(const float* weights, int64_t weight_stride, const float* sizes, int64_t num_rows, int64_t count,
                       int64_t dim, const Digits& digits, const Reading& reading, const Reading& next, float* out,
                       int64_t out_stride);

#if HAS_DIGITS

INLINE i32 rounded(f32 x) { return (i32)_mm512_cvtps_epi32((__m512)x); }
INLINE __m128i bytes_of(i32 x) { return _mm512_cvtepi32_epi8((__m512i)x); }

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
    in_groups(num_rows, [&](int64_t first, auto n) {
        for (int64_t r = 0; r < n(); r++) {
            const float* x = q + (first + r) * q_stride;
            const float size = size_of_row(x, dim), reciprocal = range / size;
            int32_t* groups = digits.of(first) + 2 * r;
            i32 sum = {};
            for (int64_t i = 0; i < dim; i += W) {
                const i32 number = rounded(load<f32>(x + i) * reciprocal), up = number + 128;
                sum += number;
                int32_t high[4], low[4];
                _mm_storeu_si128((__m128i*)high, bytes_of(up >> 8));
                _mm_storeu_si128((__m128i*)low, bytes_of(up ^ 128));
                for (int j = 0; j < 4; j++) {
                    groups[(i / 4 + j) * (2 * n())] = high[j];
                    groups[(i / 4 + j) * (2 * n()) + 1] = low[j];
                }
            }
            const int32_t total = _mm512_reduce_add_epi32((__m512i)sum);
            digits.starts[2 * (first + r)] = -128 * (total >> 8);
            digits.starts[2 * (first + r) + 1] = -128 * (total & 255);
            digits.units[first + r] = size / range;
        }
    });
}
// Here digits have no sign and codes have one. One or two rows.
template <int N>
INLINE void split_weights(const float* x, int64_t x_stride, const float* sizes, int64_t count, const Digits& digits,
                          int64_t row) {
    constexpr float range = 65535;
    float reciprocal[N];
    UNROLL for (int r = 0; r < N; r++) {
        reciprocal[r] = range / sizes[r];
        digits.units[row + r] = sizes[r] / range;
    }
    __m128i* to = (__m128i*)digits.of(row);
    for (int64_t i = 0; i < count; i += W, to += 2 * N) {
        __m128i high[N], low[N];
        UNROLL for (int r = 0; r < N; r++) {
            const i32 number = rounded(load<f32>(x + r * x_stride + i) * reciprocal[r]);
            const __m128i above = bytes_of(number >> 8), below = bytes_of(number);
            high[r] = _mm_unpacklo_epi32(above, below);
            low[r] = _mm_unpackhi_epi32(above, below);
        }
        if (N == 1) {
            _mm_store_si128(to, high[0]);
            _mm_store_si128(to + 1, low[0]);
        } else {
            _mm_store_si128(to, _mm_unpacklo_epi64(high[0], high[N - 1]));
            _mm_store_si128(to + 1, _mm_unpackhi_epi64(high[0], high[N - 1]));
            _mm_store_si128(to + 2, _mm_unpacklo_epi64(low[0], low[N - 1]));
            _mm_store_si128(to + 3, _mm_unpackhi_epi64(low[0], low[N - 1]));
        }
    }
}

// As _mm512_dpbusd_epi32, with four digits that meet all codes; compilers take two instructions for it.
INLINE void add_products(__m512i& sum, __m512i codes, const int32_t& digits) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(digits));
}

// N rows of the query, from `row` on, on their way through the groups of a block.
template <int N>
struct DigitRows {
    const int32_t *first, *at, *starts;
    const float* units;
    __m512i sums[2][N];

    INLINE DigitRows(const Digits& digits, int64_t row)
        : first(digits.of(row)), starts(digits.starts + 2 * row), units(digits.units + row) {
        begin();
    }
    INLINE void begin() {
        at = first;
        UNROLL for (int r = 0; r < N; r++) UNROLL for (int p = 0; p < 2; p++) sums[p][r] = _mm512_set1_epi32(starts[2 * r + p]);
    }
    // The `k`th of eight groups.
    INLINE void add(int k, __m512i codes) {
        UNROLL for (int p = 0; p < 2; p++) UNROLL for (int r = 0; r < N; r++)
            add_products(sums[p][r], codes, at[2 * (N * k + r) + p]);
    }
    INLINE void go_on() { at += 16 * N; }
    INLINE f32 result(int r) const {
        return ((f32)_mm512_cvtepi32_ps(sums[0][r]) * 256.0f + (f32)_mm512_cvtepi32_ps(sums[1][r])) * units[r];
    }
};

// Four tokens' codes of M * 16 channels on the way to groups of tokens, as bytes with a sign.
template <int M>
struct Grouped {
    __m512i x[4];

    // Of four steps the `i`th; `left` channels.
    INLINE void make(int i, const uint8_t* from, int64_t dim, int64_t left) {
        const __m512i offset = _mm512_set1_epi8(char(0x80));
        if (i < 2) {
            const __m512i a = row(from + 2 * i * dim, left), b = row(from + (2 * i + 1) * dim, left);
            x[i] = _mm512_unpacklo_epi8(a, b);
            x[2 + i] = _mm512_unpackhi_epi8(a, b);
        } else {
            __m512i* two = x + 2 * (i - 2);
            const __m512i a = two[0], b = two[1];
            two[0] = _mm512_xor_si512(_mm512_unpacklo_epi16(a, b), offset);
            two[1] = _mm512_xor_si512(_mm512_unpackhi_epi16(a, b), offset);
        }
    }
    // Unpacking works inside quarters of a register. Of 64 channels the sums are put in order, of fewer the channels.
    INLINE static __m512i row(const uint8_t* from, int64_t left) {
        if (M == 4) return _mm512_loadu_si512(from);
        const __m512i dealt = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
        return _mm512_permutexvar_epi32(dealt, _mm512_maskz_loadu_epi8((uint64_t(1) << left) - 1, from));
    }
};

// out[r][c] += the sum over t of weights[r][t] * channel c of token t of the blocks, for N rows, whose digits begin at
// `digit`, and M vectors of channels from `d` on.
template <int N, int M>
KEEP_LOOPS void add_blocks(const int32_t* digit, const float* units, const uint8_t* const* blocks, int64_t num_blocks,
                           int64_t dim, int64_t d, Fetch* fetch, float* out, int64_t out_stride) {
    Fetch next = fetch ? *fetch : Fetch{};
    __m512i sums[2][N][M] = {};
    Grouped<M> now;
    UNROLL for (int i = 0; i < 4; i++) now.make(i, blocks[0] + d, dim, dim - d);
    const uint8_t* from = blocks[0] + d;
    for (int64_t left = num_blocks * (BLOCK / 4); left > 0; left--, digit += 2 * N) {
        const bool is_last = left % (BLOCK / 4) == 1;
        blocks += is_last && left > 1;
        from = is_last ? blocks[0] + d : from + 4 * dim;
        if (fetch) next();
        Grouped<M> then;
        UNROLL for (int i = 0; i < 2 * N; i++) {
            const __m512i four = _mm512_set1_epi32(digit[i]);
            UNROLL for (int m = 0; m < M; m++)  // bytes without a sign times bytes with one
                sums[i % 2][i / 2][m] = _mm512_dpbusd_epi32(sums[i % 2][i / 2][m], four, now.x[m]);
            UNROLL for (int k = 2 * i / N; k < 2 * (i + 1) / N; k++) then.make(k, from, dim, dim - d);
        }
        now = then;
    }
    UNROLL for (int r = 0; r < N; r++) {
        f32 x[M];
        UNROLL for (int m = 0; m < M; m++)
            x[m] = (f32)_mm512_cvtepi32_ps(sums[0][r][m]) * 256.0f + (f32)_mm512_cvtepi32_ps(sums[1][r][m]);
        if constexpr (M == 4) put_in_order(x);
        float* to = out + r * out_stride + d;
        UNROLL for (int m = 0; m < M; m++) store(to + m * W, load<f32>(to + m * W) + x[m] * units[r]);
    }
    if (fetch) *fetch = next;
}

void dots_of_digits(const Digits& q, int64_t num_rows, int64_t count, int64_t dim, const Reading& reading,
                    const Reading& next, float* out, int64_t out_stride) {
    in_tiles(count, reading, next, [&](int64_t t, int64_t size, int64_t tile, Fetch* fetch) {
        const Places blocks = reading.here[tile];
        in_groups(num_rows, [&](int64_t r, auto n) {
            dots_of_blocks<n()>(DigitRows<n()>(q, r), blocks.start, round_up(size, BLOCK) / BLOCK, dim,
                                r ? nullptr : fetch, out + r * out_stride + t, out_stride);
        });
    });
}
// One or two rows at a time, whose sums fit into registers.
template <class Work>
INLINE void by_twos(int64_t num_rows, Work work) {
    for (int64_t r = 0; r + 1 < num_rows; r += 2) work(r, std::integral_constant<int, 2>());
    if (num_rows % 2) work(num_rows - 1, std::integral_constant<int, 1>());
}
void accumulate_digits(const float* weights, int64_t weight_stride, const float* sizes, int64_t num_rows, int64_t count,
                       int64_t dim, const Digits& digits, const Reading& reading, const Reading& next, float* out,
                       int64_t out_stride) {
    by_twos(num_rows, [&](int64_t r, auto n) {
        split_weights<n()>(weights + r * weight_stride, weight_stride, sizes + r, round_up(count, W), digits, r);
    });
    in_tiles(count, reading, next, [&](int64_t t, int64_t size, int64_t tile, Fetch* fetch) {
        const Places blocks = reading.here[tile];
        by_twos(num_rows, [&](int64_t r, auto n) {
            const int32_t* digit = digits.of(r) + t / 4 * (2 * n());
            for (int64_t d = 0; d < dim; d += 64) {
                const auto add = [&](auto m) {
                    add_blocks<n(), m()>(digit, digits.units + r, blocks.start, round_up(size, BLOCK) / BLOCK, dim, d,
                                         r ? nullptr : fetch, out + r * out_stride, out_stride);
                };
                switch (std::min<int64_t>(dim - d, 64) / 16) {
                    case 4: add(std::integral_constant<int, 4>()); break;
                    case 3: add(std::integral_constant<int, 3>()); break;
                    case 2: add(std::integral_constant<int, 2>()); break;
                    default: add(std::integral_constant<int, 1>());
                }
            }
        });
    });
}
#endif

}  // namespace
