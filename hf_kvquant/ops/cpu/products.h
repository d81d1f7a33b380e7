// The arithmetic of attention: logits from rows of K, sums of rows of V. Rows are pointers, so pages of any size, rings
// and tiles of numbers are all the same to it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "formats.h"
#include "order.h"

namespace {

constexpr int ROWS = 4;  // of a kernel in registers
constexpr int VECTORS = W == 8 ? 2 : 4;

// out[r][t] = q[r] . rows[t], for N rows; `rows` is readable, and `out` writable, up to a multiple of four.
template <class C, int N>
void dots(const float* q, int64_t q_stride, const typename C::T* const* rows, int64_t count, int64_t dim, float* out,
          int64_t out_stride, Fetch* fetch) {
    constexpr int S = C::STEP;
    for (int64_t t = 0; t < count; t += 4) {
        f32 sums[N][4];
        UNROLL for (int r = 0; r < N; r++) UNROLL for (int j = 0; j < 4; j++) sums[r][j] = f32{};
        if (fetch) fetch->for_four_tokens();
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
                int64_t column, float* out, int64_t out_stride, Fetch* fetch) {
    f32 sums[N][M];
    UNROLL for (int r = 0; r < N; r++)
        UNROLL for (int m = 0; m < M; m++) sums[r][m] = load<f32>(out + r * out_stride + column + m * W);
    const auto add = [&](int64_t i) {
        f32 x[M];
        if constexpr (C::STEP == M && M > 1)
            C::read_step(rows[i] + column, x);
        else
            UNROLL for (int m = 0; m < M; m++) x[m] = C::read(rows[i] + column + m * W);
        UNROLL for (int r = 0; r < N; r++) {
            f32 weight = splat(weights[r * weight_stride + i]);
            UNROLL for (int m = 0; m < M; m++) sums[r][m] += weight * x[m];
        }
    };
    int64_t i = 0;
    if (fetch)
        for (; i + 4 <= count; i += 4) {
            fetch->for_four_tokens();
            for (int j = 0; j < 4; j++) add(i + j);
        }
    for (; i < count; i++) add(i);
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
                  int64_t dim, const Reading& reading, const Reading& next, float* out, int64_t out_stride) {
    in_tiles(count, reading, next, [&](int64_t t, int64_t size, int64_t, Fetch* fetch) {
        in_groups(num_rows, [&](int64_t r, auto n) {
            dots<C, n()>(q + r * q_stride, q_stride, rows + t, size, dim, out + r * out_stride + t, out_stride,
                         r ? nullptr : fetch);
        });
    });
}

// `columns` is a multiple of W.
template <class C>
void accumulate_rows(const float* weights, int64_t weight_stride, int64_t num_rows, const typename C::T* const* rows,
                     int64_t count, int64_t columns, const Reading& reading, const Reading& next, float* out,
                     int64_t out_stride) {
    in_tiles(count, reading, next, [&](int64_t t, int64_t size, int64_t, Fetch* fetch) {
        for (int64_t column = 0; column < columns;) {
            bool wide = column + VECTORS * W <= columns;
            in_groups(num_rows, [&](int64_t r, auto n) {
                const float* from = weights + r * weight_stride + t;
                float* to = out + r * out_stride;
                Fetch* first = r || column ? nullptr : fetch;
                if (wide) accumulate<C, n(), VECTORS>(from, weight_stride, rows + t, size, column, to, out_stride, first);
                else accumulate<C, n(), 1>(from, weight_stride, rows + t, size, column, to, out_stride, first);
            });
            column += wide ? VECTORS * W : W;
        }
    });
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
