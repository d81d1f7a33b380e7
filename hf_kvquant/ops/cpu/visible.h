// What attention is asked for, and which tokens a query sees.
#pragma once

#include <algorithm>

#include "rows.h"
#include "tables.h"

namespace {

struct Attention {
    Side k, v;
    Tables tables;
    const char* query;
    int64_t query_format, query_batch, query_head, query_token;  // strides; channels are neighbours
    char* output;                                                // contiguous, the query's dtype
    float* lse;                                                  // contiguous; or null
    int64_t num_q_heads, num_tokens;
    const char* mask;
    int64_t mask_format, mask_batch, mask_head, mask_token, mask_columns, mask_start;  // format -1: bool
    const float* sinks;
    int64_t window, causal;  // window -1: none
    double softmax_scale, softcap;  // softcap 0: none

    int64_t group() const { return num_q_heads / tables.num_heads; }
    int64_t num_rows() const { return group() * num_tokens; }
    // Where the mask has row `row` of key/value head h for token `position`.
    int64_t mask_index(int64_t b, int64_t h, int64_t row, int64_t position) const {
        return b * mask_batch + (h * group() + row % group()) * mask_head + row / group() * mask_token + position -
               mask_start;
    }
};

struct Interval {
    int64_t start, stop;
};

// What query token t of sequence b sees, apart from what the mask says inside its columns.
Interval seen_by(const Attention& a, int64_t b, int64_t t) {
    int64_t length = a.tables.seq_lens[b], position = length - a.num_tokens + t;
    int64_t last_page = floor_div(std::max<int64_t>(length - 1, 0), a.tables.page_size);
    int64_t start = std::max<int64_t>(last_page - a.tables.num_columns + 1, 0) * a.tables.page_size, stop = length;
    if (a.causal) stop = std::min(stop, position + 1);
    if (a.window >= 0) start = std::max(start, position - a.window + 1);
    if (a.mask) {
        start = std::max(start, a.mask_start);
        stop = std::min(stop, a.mask_start + a.mask_columns);
    }
    return {start, std::max(start, stop)};
}

// Rows [first, first + count) of every head of sequence b, and the tokens that they see, in spans. The first `hidden`
// tokens are seen by no row.
struct Block {
    int64_t b, first, count, start, hidden, stop, num_spans, first_span, first_part;

    // Whole chunks, as many in one span as in another.
    Interval span(int64_t i) const {
        const int64_t num_chunks = (stop - start + CHUNK - 1) / CHUNK;
        return {start + i * num_chunks / num_spans * CHUNK, std::min(start + (i + 1) * num_chunks / num_spans * CHUNK, stop)};
    }
};

// Whether a mask of bool shows any of tokens [start, start + count) to any row of the block.
bool shows_any(const Attention& a, const Block& block, int64_t h, const Interval* seen, int64_t start, int64_t count) {
    for (int64_t r = 0; r < block.count; r++) {
        const int64_t from = std::max(seen[r].start, start), to = std::min(seen[r].stop, start + count);
        if (from >= to) continue;
        const char* shown = a.mask + a.mask_index(block.b, h, block.first + r, from);
        char any = 0;
        for (int64_t i = 0; i < to - from; i++) any |= shown[i];
        if (any) return true;
    }
    return false;
}

// What a mask adds to the logits x of tokens [position, position + count).
void add_mask(const Attention& a, const Block& block, int64_t h, int64_t row, int64_t position, int64_t count, float* x) {
    const int64_t at = a.mask_index(block.b, h, row, position);
    if (a.mask_format < 0) {
        const uint8_t* shown = reinterpret_cast<const uint8_t*>(a.mask) + at;
        for (int64_t i = 0; i < count; i++) x[i] = shown[i] ? x[i] : -INF;
    } else if (a.mask_format == FLOAT) {
        const float* bias = reinterpret_cast<const float*>(a.mask) + at;
        for (int64_t i = 0; i < count; i++) x[i] += bias[i];
    } else {
        const uint16_t* bias = reinterpret_cast<const uint16_t*>(a.mask) + at;
        for (int64_t i = 0; i < count; i++) x[i] += float_of(uint32_t(bias[i]) << 16);
    }
}

}  // namespace
