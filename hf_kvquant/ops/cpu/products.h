// The arithmetic of attention: logits from rows of K, sums of rows of V. Rows are pointers, so pages of any size, rings
// and tiles of numbers are all the same to it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "formats.h"

namespace {

constexpr int TILE = 64;        // tokens that stay in the first cache while rows go over them
constexpr int CHUNK = 128;      // tokens of a tile of numbers
constexpr int ROWS = 4;         // rows of a kernel in registers
constexpr int VECTORS = W == 8 ? 2 : 4;

template <class T>
INLINE void prefetch(const T* row, int64_t count) {
    for (int64_t offset = 0; offset < count * int64_t(sizeof(T)); offset += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(row) + offset);
}
INLINE void prefetch_to_second_cache(const void* line) { __builtin_prefetch(line, 0, 2); }

// Zen 4 has few lines under way to the first cache and more to the second. So a line is asked for twice there, a tile
// earlier for the second cache: 4 to 14 % faster. Zen 3 is of the same family and not measured; on an Intel Xeon of
// 2023 the second cache brought little.
bool is_zen_3_or_4() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("amdfam19h");
#else
    return false;
#endif
}
const bool FETCHES_TWICE = is_zen_3_or_4();
const int PADDING = FETCHES_TWICE ? 208 : 144;  // readable entries behind arrays of rows

// The next tile is fetched while rows go over one. Its tokens come from several places in turn: where a processor sees
// neighbours fetched it goes on by itself, but takes a while to begin.
constexpr int PLACES = 4;
INLINE int64_t next_token(int64_t token) { return TILE + token % PLACES * (TILE / PLACES) + token / PLACES; }

// N tokens of the next tile.
template <int N, class T>
INLINE void prefetch_next(const T* const* rows, int64_t token, int64_t count) {
    UNROLL for (int j = 0; j < N; j++) prefetch(rows[next_token(token + j)], count);
    if (!FETCHES_TWICE) return;
    const int64_t size = count * int64_t(sizeof(T));
    UNROLL for (int j = 0; j < N; j++) {
        const char* row = reinterpret_cast<const char*>(rows[TILE + next_token(token + j)]);
        // A last line that is not whole is the next token's first.
        for (int64_t offset = 0; offset + 64 <= size; offset += 64) prefetch_to_second_cache(row + offset);
    }
}

// out[r][t] = q[r] . rows[t], for N rows; `rows` is readable, and `out` writable, up to a multiple of four.
template <class C, int N>
void dots(const float* q, int64_t q_stride, const typename C::T* const* rows, int64_t count, int64_t dim, float* out,
          int64_t out_stride, bool fetches) {
    constexpr int S = C::STEP;
    for (int64_t t = 0; t < count; t += 4) {
        f32 sums[N][4];
        UNROLL for (int r = 0; r < N; r++) UNROLL for (int j = 0; j < 4; j++) sums[r][j] = f32{};
        if (fetches) prefetch_next<4>(rows, t, dim);
        int64_t d = 0;
        if constexpr (S > 1)
            for (; d + S * W <= dim; d += S * W)
                UNROLL for (int j = 0; j < 4; j++) {
                    f32 k[S];
                    C::read_step(rows[t + j] + d, k);
                    UNROLL for (int s = 0; s < S; s++)
                        UNROLL for (int r = 0; r < N; r++) sums[r][j] += load<f32>(q + r * q_stride + d + s * W) * k[s];
                }
        for (; d < dim; d += W) {
            f32 k[4];
            UNROLL for (int j = 0; j < 4; j++) k[j] = C::read(rows[t + j] + d);
            UNROLL for (int r = 0; r < N; r++) {
                f32 x = load<f32>(q + r * q_stride + d);
                UNROLL for (int j = 0; j < 4; j++) sums[r][j] += x * k[j];
            }
        }
        store_sums<N>(sums, out + t, out_stride);
    }
}

// out[r][j] += sum over i of weights[r][i] * rows[i][j], for N rows and M vectors of columns.
template <class C, int N, int M>
void accumulate(const float* weights, int64_t weight_stride, const typename C::T* const* rows, int64_t count,
                int64_t column, float* out, int64_t out_stride, bool fetches, int64_t columns) {
    f32 sums[N][M];
    UNROLL for (int r = 0; r < N; r++)
        UNROLL for (int m = 0; m < M; m++) sums[r][m] = load<f32>(out + r * out_stride + column + m * W);
    for (int64_t i = 0; i < count; i++) {
        f32 x[M];
        if (fetches) prefetch_next<1>(rows, i, columns);
        if constexpr (C::STEP == M && M > 1)
            C::read_step(rows[i] + column, x);
        else
            UNROLL for (int m = 0; m < M; m++) x[m] = C::read(rows[i] + column + m * W);
        UNROLL for (int r = 0; r < N; r++) {
            f32 weight = splat(weights[r * weight_stride + i]);
            UNROLL for (int m = 0; m < M; m++) sums[r][m] += weight * x[m];
        }
    }
    UNROLL for (int r = 0; r < N; r++)
        UNROLL for (int m = 0; m < M; m++) store(out + r * out_stride + column + m * W, sums[r][m]);
}

// Any number of rows in groups of ROWS.
template <class Kernel>
INLINE void in_groups(int64_t num_rows, Kernel kernel) {
    int64_t r = 0;
    for (; r + ROWS <= num_rows; r += ROWS) kernel(r, std::integral_constant<int, ROWS>());
    switch (num_rows - r) {
        case 3: kernel(r, std::integral_constant<int, 3>()); break;
        case 2: kernel(r, std::integral_constant<int, 2>()); break;
        case 1: kernel(r, std::integral_constant<int, 1>()); break;
    }
}

template <class C>
void dots_of_rows(const float* q, int64_t q_stride, int64_t num_rows, const typename C::T* const* rows, int64_t count,
                  int64_t dim, float* out, int64_t out_stride) {
    for (int64_t t = 0; t < count; t += TILE)
        in_groups(num_rows, [&](int64_t r, auto n) {
            dots<C, n()>(q + r * q_stride, q_stride, rows + t, std::min<int64_t>(TILE, count - t), dim,
                         out + r * out_stride + t, out_stride, r == 0);
        });
}

// `columns` is a multiple of W.
template <class C>
void accumulate_rows(const float* weights, int64_t weight_stride, int64_t num_rows, const typename C::T* const* rows,
                     int64_t count, int64_t columns, float* out, int64_t out_stride, bool fetches) {
    for (int64_t i = 0; i < count; i += TILE) {
        int64_t here = std::min<int64_t>(TILE, count - i);
        for (int64_t column = 0; column < columns;) {
            bool wide = column + VECTORS * W <= columns;
            in_groups(num_rows, [&](int64_t r, auto n) {
                const float* from = weights + r * weight_stride + i;
                float* to = out + r * out_stride;
                const bool first = fetches && r == 0 && column == 0;
                if (wide)
                    accumulate<C, n(), VECTORS>(from, weight_stride, rows + i, here, column, to, out_stride, first,
                                                columns);
                else
                    accumulate<C, n(), 1>(from, weight_stride, rows + i, here, column, to, out_stride, first, columns);
            });
            column += wide ? VECTORS * W : W;
        }
    }
}

// Tiles of numbers: `[count, dim]`, and turned `[dim, CHUNK]`; `rows` is readable up to a multiple of W.
template <class C>
void decode_tile(const typename C::T* const* rows, int64_t count, int64_t dim, float* tile, int64_t stride) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t d = 0; d < dim; d += W) store(tile + t * stride + d, read_some<C>(rows[t] + d, dim - d));
}
template <class C>
void decode_turned(const typename C::T* const* rows, int64_t count, int64_t dim, float* tile) {
    for (int64_t t = 0; t < count; t += W)
        for (int64_t d = 0; d < dim; d += W) {
            f32 block[W];
            for (int i = 0; i < W; i++) block[i] = read_some<C>(rows[t + i] + d, dim - d);
            transpose(block);
            for (int i = 0; i < W; i++) store(tile + (d + i) * CHUNK + t, block[i]);
        }
}

}  // namespace
