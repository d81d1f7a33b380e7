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

// The tile that will be read next: as many lines as one has are fetched while this one is read, for nothing is
// fetched faster than memory gives it.
struct Ahead {
    const uint8_t* const* row;
    int64_t dim, offset = 0;

    // PLACES lines.
    INLINE void fetch() {
        constexpr int place = TILE / PLACES;
        UNROLL for (int i = 0; i < PLACES; i++) __builtin_prefetch(row[i * place] + offset);
        if (FETCHES_TWICE && offset + 64 <= dim)
            UNROLL for (int i = 0; i < PLACES; i++) prefetch_to_second_cache(row[i * place + TILE] + offset);
        offset += 64;
        row += offset >= dim;
        offset = offset >= dim ? 0 : offset;
    }
};

// Rows of the query, `dim` a multiple of 16.
void split_query(const float* q, int64_t q_stride, int64_t num_rows, int64_t dim, const Digits& digits);

// As dots_of_rows, for a query that has been split. `next` is fetched on the way.
void dots_of_digits(const Digits& q, int64_t num_rows, const uint8_t* const* rows, int64_t count, int64_t dim,
                    Ahead next, float* out, int64_t out_stride);

// As accumulate_rows; `dim` is a multiple of 16, no weight is negative, and they are zero up to a multiple of 16.
// `digits` has room for them.
void accumulate_digits(const float* weights, int64_t weight_stride, int64_t num_rows, const uint8_t* const* rows,
                       int64_t count, int64_t dim, const Digits& digits, Ahead next, float* out,
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
INLINE void split_weights(const float* x, int64_t x_stride, int64_t count, const Digits& digits, int64_t row) {
    constexpr float range = 65535;
    float reciprocal[N];
    UNROLL for (int r = 0; r < N; r++) {
        const float size = size_of_row(x + r * x_stride, count);
        reciprocal[r] = range / size;
        digits.units[row + r] = size / range;
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

// GCC takes the loops below apart, with twice as many moves as products.
#if defined(__clang__)
#define KEEP_LOOPS
#else
#define KEEP_LOOPS __attribute__((optimize("no-tree-pre")))
#endif
#define INLINE_LAMBDA __attribute__((always_inline))

// As _mm512_dpbusd_epi32 with four bytes in all places, which compilers load by an instruction of its own.
INLINE void add_products(__m512i& sum, __m512i codes, const int32_t& digits) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(digits));
}


// 16 tokens of 32 channels on the way from rows to groups of channels: eight registers of 16 tokens.
struct Turning {
    __m512i x[8];

    // Of eight steps the `i`th.
    INLINE void step(int i, const uint8_t* const* rows, int64_t d, __mmask16 low, __mmask16 high) {
        if (i < 4) {
            // Two rows to a register, so that tokens come out in order.
            const int first = i < 2 ? 2 * i : 2 * i + 4;
            const __m512i a = two_rows(rows + first, d, low, high), b = two_rows(rows + first + 1, d, low, high);
            x[2 * i] = _mm512_unpacklo_epi32(a, b);
            x[2 * i + 1] = _mm512_unpackhi_epi32(a, b);
        } else if (i < 6) {
            __m512i* u = x + 4 * (i - 4);
            const __m512i a = u[0], b = u[1], c = u[2], e = u[3];
            u[0] = _mm512_unpacklo_epi64(a, c);
            u[1] = _mm512_unpackhi_epi64(a, c);
            u[2] = _mm512_unpacklo_epi64(b, e);
            u[3] = _mm512_unpackhi_epi64(b, e);
        } else {
            UNROLL for (int k = 2 * (i - 6); k < 2 * (i - 6) + 2; k++) {
                const __m512i a = x[k], b = x[k + 4];
                x[k] = _mm512_shuffle_i32x4(a, b, 0x88);
                x[k + 4] = _mm512_shuffle_i32x4(a, b, 0xDD);
            }
        }
    }
    INLINE static __m512i two_rows(const uint8_t* const* rows, int64_t d, __mmask16 low, __mmask16 high) {
        return _mm512_mask_loadu_epi32(_mm512_maskz_loadu_epi32(low, rows[0] + d), high, rows[4] + d - 32);
    }
};

// out[r][t] = row r of the query . rows[t] for N rows.
template <int N>
KEEP_LOOPS void dots_of_tile(const Digits& digits, int64_t row, const uint8_t* const* rows, int64_t tokens, int64_t dim,
                             Ahead* ahead, float* out, int64_t out_stride) {
    Ahead next = ahead ? *ahead : Ahead{};  // here it stays in registers
    const __mmask16 last_low = dim % 32 ? 0x0F : 0xFF, last_high = dim % 32 ? 0x0F00 : 0xFF00;
    Turning now;
    UNROLL for (int i = 0; i < 8; i++) now.step(i, rows, 0, dim < 32 ? last_low : 0xFF, dim < 32 ? last_high : 0xFF00);
    __m512i sums[2][N];
    UNROLL for (int p = 0; p < 2; p++) UNROLL for (int r = 0; r < N; r++)
        sums[p][r] = _mm512_set1_epi32(digits.starts[2 * (row + r) + p]);
    const int32_t *first = digits.of(row), *digit = first;
    int64_t d = 0;
    for (int64_t left = tokens / 16 * ((dim + 31) / 32); left > 0; left--) {
        const bool is_last = d + 32 >= dim;
        d = is_last ? 0 : d + 32;
        rows += is_last && left > 1 ? 16 : 0;
        const __mmask16 low = d + 32 > dim ? last_low : 0xFF, high = d + 32 > dim ? last_high : 0xFF00;
        if (ahead) {
            next.fetch();
            next.fetch();
        }
        Turning then;
        UNROLL for (int k = 0; k < 8; k++) {
            UNROLL for (int p = 0; p < 2; p++) UNROLL for (int r = 0; r < N; r++)
                add_products(sums[p][r], now.x[k], digit[2 * N * k + 2 * r + p]);
            then.step(k, rows, d, low, high);
        }
        now = then;
        digit += 16 * N;
        if (is_last) {
            UNROLL for (int r = 0; r < N; r++) {
                const f32 x = (f32)_mm512_cvtepi32_ps(sums[0][r]) * 256.0f + (f32)_mm512_cvtepi32_ps(sums[1][r]);
                store(out + r * out_stride, x * digits.units[row + r]);
                UNROLL for (int p = 0; p < 2; p++) sums[p][r] = _mm512_set1_epi32(digits.starts[2 * (row + r) + p]);
            }
            out += 16;
            digit = first;
        }
    }
    if (ahead) *ahead = next;
}

// Four tokens of M * 16 channels on the way from rows to groups of tokens, as bytes with a sign.
template <int M>
struct Grouping {
    __m512i x[4];

    INLINE static __m512i row(const uint8_t* from, int64_t left) {
        if (M == 4) return _mm512_loadu_si512(from);
        // Unpacking works inside quarters of a register. Of a whole block the sums are put in order, else the channels.
        const __m512i dealt = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
        return _mm512_permutexvar_epi32(dealt, load_bytes(from, left));
    }
    // Of four steps the `i`th.
    INLINE void step(int i, const uint8_t* const* rows, int64_t d, int64_t left) {
        const __m512i offset = _mm512_set1_epi8(char(0x80));
        if (i < 2) {
            const __m512i a = row(rows[2 * i] + d, left), b = row(rows[2 * i + 1] + d, left);
            x[i] = _mm512_unpacklo_epi8(a, b);
            x[2 + i] = _mm512_unpackhi_epi8(a, b);
        } else {
            __m512i* u = x + 2 * (i - 2);
            const __m512i a = u[0], b = u[1];
            u[0] = _mm512_xor_si512(_mm512_unpacklo_epi16(a, b), offset);
            u[1] = _mm512_xor_si512(_mm512_unpackhi_epi16(a, b), offset);
        }
    }
};

// out[r][c] += weights[r] . channel c of the tile, for N rows and M vectors of channels from `d` on.
template <int N, int M>
KEEP_LOOPS void add_tile(const Digits& digits, int64_t row, const int32_t* digit, const uint8_t* const* rows, int64_t tokens, int64_t d, int64_t left,
              Ahead* ahead, float* out, int64_t out_stride) {
    Ahead next = ahead ? *ahead : Ahead{};
    __m512i sums[2][N][M];
    UNROLL for (int p = 0; p < 2; p++) UNROLL for (int r = 0; r < N; r++) UNROLL for (int m = 0; m < M; m++)
        sums[p][r][m] = _mm512_setzero_si512();
    Grouping<M> now;
    UNROLL for (int i = 0; i < 4; i++) now.step(i, rows, d, left);
    for (; tokens > 0; tokens -= 4, digit += 2 * N) {
        if (ahead) next.fetch();
        rows += tokens > 4 ? 4 : 0;
        Grouping<M> then;
        UNROLL for (int i = 0; i < 2 * N; i++) {
            const __m512i one = _mm512_set1_epi32(digit[i]);
            UNROLL for (int m = 0; m < M; m++) sums[i % 2][i / 2][m] = _mm512_dpbusd_epi32(sums[i % 2][i / 2][m], one, now.x[m]);
            UNROLL for (int j = i * 2 / N; j < (i + 1) * 2 / N; j++) then.step(j, rows, d, left);
        }
        now = then;
    }
    UNROLL for (int r = 0; r < N; r++) {
        f32 x[M];
        UNROLL for (int m = 0; m < M; m++)
            x[m] = (f32)_mm512_cvtepi32_ps(sums[0][r][m]) * 256.0f + (f32)_mm512_cvtepi32_ps(sums[1][r][m]);
        if (M == 4) {
            const __m512 a = _mm512_shuffle_f32x4((__m512)x[0], (__m512)x[1], 0x88), b = _mm512_shuffle_f32x4((__m512)x[0], (__m512)x[1], 0xDD);
            const __m512 c = _mm512_shuffle_f32x4((__m512)x[2], (__m512)x[3], 0x88), e = _mm512_shuffle_f32x4((__m512)x[2], (__m512)x[3], 0xDD);
            x[0] = (f32)_mm512_shuffle_f32x4(a, c, 0x88);
            x[2] = (f32)_mm512_shuffle_f32x4(a, c, 0xDD);
            x[1] = (f32)_mm512_shuffle_f32x4(b, e, 0x88);
            x[3] = (f32)_mm512_shuffle_f32x4(b, e, 0xDD);
        }
        float* to = out + r * out_stride + d;
        UNROLL for (int m = 0; m < M; m++) store(to + 16 * m, load<f32>(to + 16 * m) + x[m] * digits.units[row + r]);
    }
    if (ahead) *ahead = next;
}

void dots_of_digits(const Digits& q, int64_t num_rows, const uint8_t* const* rows, int64_t count, int64_t dim,
                    Ahead next, float* out, int64_t out_stride) {
    for (int64_t t = 0; t < count; t += TILE) {
        const int64_t here = round_up(std::min<int64_t>(TILE, count - t), W);
        Ahead ahead = t + here < count ? Ahead{rows + t + here, dim} : next;
        in_groups(num_rows, [&](int64_t r, auto n) {
            dots_of_tile<n()>(q, r, rows + t, here, dim, r ? nullptr : &ahead, out + r * out_stride + t, out_stride);
        });
    }
}
void accumulate_digits(const float* weights, int64_t weight_stride, int64_t num_rows, const uint8_t* const* rows,
                       int64_t count, int64_t dim, const Digits& digits, Ahead next, float* out,
                       int64_t out_stride) {
    const auto in_pairs = [&](auto work) {
        for (int64_t r = 0; r + 1 < num_rows; r += 2) work(r, std::integral_constant<int, 2>());
        if (num_rows % 2) work(num_rows - 1, std::integral_constant<int, 1>());
    };
    in_pairs([&](int64_t r, auto n) {
        split_weights<n()>(weights + r * weight_stride, weight_stride, round_up(count, W), digits, r);
    });
    for (int64_t t = 0; t < count; t += TILE) {
        const int64_t here = round_up(std::min<int64_t>(TILE, count - t), W);
        Ahead ahead = t + here < count ? Ahead{rows + t + here, dim} : next;
        in_pairs([&](int64_t r, auto n) {
            const int32_t* digit = digits.of(r) + t / 4 * (2 * n());
            for (int64_t d = 0; d < dim; d += 64) {
                const int64_t left = dim - d;
                const auto add = [&](auto m) {
                    add_tile<n(), m()>(digits, r, digit, rows + t, here, d, left, r ? nullptr : &ahead,
                                       out + r * out_stride, out_stride);
                };
                if (left > 48) add(std::integral_constant<int, 4>());
                else if (left > 32) add(std::integral_constant<int, 3>());
                else if (left > 16) add(std::integral_constant<int, 2>());
                else add(std::integral_constant<int, 1>());
            }
        });
    }
}
#endif

}  // namespace
