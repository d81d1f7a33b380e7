// Arguments that several operations have, as kernels.py packs them: every member is eight bytes.
#pragma once

#include <cstdint>

#include "formats.h"
#include "runtime.h"

namespace {

struct Side {
    char* pages;
    int64_t format, dim;
    const float* scale;
    int64_t scale_head, scale_channel;  // strides, 0 where one number serves all
    const float* zero;
    int64_t zero_head, zero_channel;
    uint16_t* token_scale;

    int64_t row_size() const { return size_of(format) * dim; }  // bytes of a token
    // Head h's scales and zeros, one a channel; 1 and 0 where there are none.
    void scales_of(int64_t h, float* out) const {
        for (int64_t d = 0; d < dim; d++) out[d] = scale ? scale[h * scale_head + d * scale_channel] : 1.0f;
    }
    void zeros_of(int64_t h, float* out) const {
        for (int64_t d = 0; d < dim; d++) out[d] = zero ? zero[h * zero_head + d * zero_channel] : 0.0f;
    }
};
// A tensor [B, H, T, D].
struct Source {
    const char* start;
    int64_t batch, head, token, channel;  // strides
};
struct Tables {
    const int32_t* page_table;
    const int32_t* seq_lens;
    int64_t num_columns, num_pages, page_size, batch_size, num_heads, num_threads;

    // Where token p of sequence b lies, in tokens of one head; or -1 if the table names no page of the pool.
    INLINE int64_t slot(int64_t b, int64_t h, int64_t p) const {
        int64_t page = page_table[b * num_columns + floor_mod(floor_div(p, page_size), num_columns)];
        if (page < 0 || page >= num_pages) return -1;
        return (page * num_heads + h) * page_size + floor_mod(p, page_size);
    }
};

}  // namespace
