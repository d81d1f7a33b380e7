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

// Where a side has these tokens, the first one `skipped` tokens into its page; and PADDING more, or a few more, that
// repeat the last one.
void find_rows(const Side& side, int64_t page_size, const int64_t* slots, int64_t num_pages, int64_t skipped,
               int64_t count, const char** rows) {
    const int64_t row_size = side.row_size();
    int64_t t = 0;
    for (int64_t i = 0; i < num_pages; i++, skipped = 0) {
        const int64_t here = std::min(count - t, page_size - skipped);
        const char* row = side.pages + (slots[i] + skipped) * row_size;
        // Eight at a time, as compilers like them; what is too many is written over.
        for (int64_t j = 0; j < here; j += 8, row += 8 * row_size)
            UNROLL for (int k = 0; k < 8; k++) rows[t + j + k] = row + k * row_size;
        t += here;
    }
    if (count) std::fill(rows + t, rows + round_up(count, W) + PADDING, rows[count - 1]);
}

// The same for blocks of `size` tokens, of which pages have a whole number and `skipped` is one; and `padding` more.
void find_blocks(const Side& side, int64_t page_size, const int64_t* slots, int64_t num_pages, int64_t skipped,
                 int64_t count, int64_t size, int64_t padding, const char** blocks) {
    const int64_t row_size = side.row_size();
    int64_t t = 0;
    for (int64_t i = 0; i < num_pages; i++, skipped = 0)
        for (int64_t j = skipped; j < page_size && t < count; j += size, t += size)  // a page may be longer than a span
            *blocks++ = side.pages + (slots[i] + j) * row_size;
    if (count) std::fill(blocks, blocks + padding, blocks[-1]);
}

// Their scales, if the side has some, and zeros for the padding.
void find_scales(const Side& side, int64_t page_size, const int64_t* slots, int64_t num_pages, int64_t skipped,
                 int64_t count, float* scales) {
    if (!side.token_scale) return;
    for (int64_t i = 0; i < num_pages; i++) __builtin_prefetch(side.token_scale + slots[i]);
    int64_t t = 0;
    for (int64_t i = 0; i < num_pages; i++, skipped = 0) {
        const int64_t here = std::min(count - t, page_size - skipped);
        const uint16_t* from = side.token_scale + slots[i] + skipped;
        int64_t j = 0;
        for (; j + W <= here; j += W) store(scales + t + j, Codec<BFLOAT>::read(from + j));
        for (; j < here; j++) scales[t + j] = bfloat_number(from[j]);
        t += here;
    }
    std::fill(scales + t, scales + round_up(count, W), 0.0f);
}

}  // namespace
