// Where the tokens of a span lie.
#pragma once

#include <algorithm>

#include "products.h"
#include "runtime.h"
#include "tables.h"

namespace {

float bfloat_number(uint16_t x) { return float_of(uint32_t(x) << 16); }

// The pages of tokens [start, start + count) of one head of sequence b, as the slot, in tokens of one head, where each
// begins. Returns how many there are, or -1 if the page table names no page of the pool.
int64_t find_pages(const Tables& tables, int64_t b, int64_t h, int64_t start, int64_t count, int64_t* slots) {
    const int64_t page_size = tables.page_size;
    const int32_t* page_table = tables.page_table + b * tables.num_columns;
    // Divisions are as dear as a token, so there are none below.
    int64_t column = start / page_size % tables.num_columns, num_pages = 0;
    for (int64_t t = -(start % page_size); t < count; t += page_size, num_pages++) {
        const int64_t page = page_table[column];
        if (page < 0 || page >= tables.num_pages) return -1;
        column = column + 1 < tables.num_columns ? column + 1 : 0;
        slots[num_pages] = (page * tables.num_heads + h) * page_size;
    }
    return num_pages;
}

// Where a side has these tokens, the first one `skipped` tokens into its page, and their scales; and PADDING more, or a
// few more, that repeat the last one.
void find_rows(const Side& side, int64_t page_size, const int64_t* slots, int64_t num_pages, int64_t skipped,
               int64_t count, const char** rows, float* scales) {
    if (!count) return;
    const int64_t row_size = side.row_size();
    const uint16_t* token_scale = side.token_scale;
    if (token_scale)
        for (int64_t i = 0; i < num_pages; i++) __builtin_prefetch(token_scale + slots[i]);
    int64_t t = 0;
    for (int64_t i = 0; i < num_pages; i++, skipped = 0) {
        const int64_t slot = slots[i] + skipped, here = std::min(count - t, page_size - skipped);
        const char* row = side.pages + slot * row_size;
        // Eight at a time, as compilers like them; what is too many is written over.
        for (int64_t j = 0; j < here; j += 8, row += 8 * row_size)
            UNROLL for (int k = 0; k < 8; k++) rows[t + j + k] = row + k * row_size;
        if (token_scale) {
            int64_t j = 0;
            for (; j + W <= here; j += W) store(scales + t + j, Codec<BFLOAT>::read(token_scale + slot + j));
            for (; j < here; j++) scales[t + j] = bfloat_number(token_scale[slot + j]);
        }
        t += here;
    }
    const int64_t end = round_up(count, W) + PADDING;
    std::fill(rows + t, rows + end, rows[count - 1]);
    if (token_scale) std::fill(scales + t, scales + end, 0.0f);
}

}  // namespace
