// Where the tokens of a span lie.
#pragma once

#include <algorithm>

#include "products.h"
#include "runtime.h"
#include "tables.h"

namespace {

float bfloat_number(uint16_t x) { return float_of(uint32_t(x) << 16); }

// Tokens [start, start + count) of one head of sequence b, and their scales, and PADDING more, or a few more, that
// repeat the last one. `slots` is room for as many numbers. Returns false if the page table names no page of the pool.
bool find_rows(const Tables& tables, const Side& side, int64_t b, int64_t h, int64_t start, int64_t count,
               int64_t* slots, const char** rows, float* scales) {
    if (!count) return true;
    const int64_t page_size = tables.page_size, row_size = side.row_size();
    const int32_t* page_table = tables.page_table + b * tables.num_columns;
    const char* pages = side.pages;
    const uint16_t* token_scale = side.token_scale;
    // Divisions are as dear as a token, so there are none below.
    int64_t column = start / page_size % tables.num_columns, skipped = start % page_size, num_pages = 0;
    for (int64_t t = -skipped; t < count; t += page_size, num_pages++) {
        const int64_t page = page_table[column];
        if (page < 0 || page >= tables.num_pages) return false;
        column = column + 1 < tables.num_columns ? column + 1 : 0;
        slots[num_pages] = (page * tables.num_heads + h) * page_size;
        if (token_scale) __builtin_prefetch(token_scale + slots[num_pages]);
    }
    int64_t t = 0;
    for (int64_t i = 0; i < num_pages; i++, skipped = 0) {
        const int64_t slot = slots[i] + skipped, here = std::min(count - t, page_size - skipped);
        const char* row = pages + slot * row_size;
        for (int64_t j = 0; j < here; j++, row += row_size) rows[t + j] = row;
        if (token_scale)
            for (int64_t j = 0; j < here; j++) scales[t + j] = bfloat_number(token_scale[slot + j]);
        t += here;
    }
    for (; t < round_up(count, W) + PADDING; t++) {
        rows[t] = rows[count - 1];
        if (token_scale) scales[t] = 0.0f;
    }
    return true;
}

}  // namespace
