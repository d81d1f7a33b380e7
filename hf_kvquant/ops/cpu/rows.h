// Where the tokens of a span lie.
#pragma once

#include <algorithm>

#include "formats.h"
#include "order.h"
#include "runtime.h"
#include "tables.h"

namespace {

float bfloat_number(uint16_t x) { return float_of(uint32_t(x) << 16); }

// The pages of tokens [start, start + count) of sequence b, as the slot, in tokens of one head, where each begins for head
// 0. Returns whether all are pages of the pool.
bool find_pages(const Tables& tables, int64_t b, int64_t start, int64_t count, int64_t* slots) {
    const int64_t page_size = tables.page_size;
    const int32_t* page_table = tables.page_table + b * tables.num_columns;
    int64_t column = start / page_size % tables.num_columns;
    for (int64_t t = -(start % page_size); t < count; t += page_size) {
        const int64_t page = page_table[column];
        if (page < 0 || page >= tables.num_pages) return false;
        column = column + 1 < tables.num_columns ? column + 1 : 0;
        *slots++ = page * tables.num_heads * page_size;
    }
    return true;
}

// Tokens of one head that follow each other.
struct Tokens {
    const int64_t* slots;  // of their pages, for head 0
    int64_t head, page_size;
    int64_t skipped, count;  // so many tokens of the first page come before them

    // From the token on that comes `before` tokens behind the beginning of the first page.
    Tokens(const int64_t* slots, int64_t head, int64_t page_size, int64_t before, int64_t count)
        : slots(slots + before / page_size), head(head), page_size(page_size), skipped(before % page_size), count(count) {}

    // work(t, slot, n) for each page: tokens t ... t + n - 1 lie from `slot` on, in tokens of one head.
    template <class Work>
    INLINE void by_page(Work work) const {
        const int64_t* slot = slots;
        for (int64_t t = 0, inside = skipped; t < count; inside = 0) {
            const int64_t here = std::min(count - t, page_size - inside);
            work(t, *slot++ + head * page_size + inside, here);
            t += here;
        }
    }
};

// The slots of every 16th token of `count`, the first one `skipped` tokens into its page, for head 0; and more that repeat
// the last one.
void find_places(const int64_t* slots, int64_t page_size, int64_t skipped, int64_t count, int64_t* places) {
    // Divisions are as dear as a token, so there are none.
    for (int64_t t = 0; t < count; t += PLACE, skipped += PLACE) {
        for (; skipped >= page_size; skipped -= page_size) slots++;
        *places++ = *slots + skipped;
    }
    if (count) std::fill(places, places + MORE_PLACES, places[-1]);
}

// Where a side has them; and some more, up to a multiple of W, that repeat the last one. The first `hidden` ones are not to
// be read, so another stands for them.
void find_rows(const Side& side, const Tokens& tokens, int64_t hidden, const char** rows) {
    const int64_t row_size = side.row_size(), count = tokens.count;
    tokens.by_page([&](int64_t t, int64_t slot, int64_t here) {
        const char* row = side.pages + slot * row_size;
        // Eight at a time, as compilers like them; what is too many is written over.
        for (int64_t j = 0; j < here; j += 8, row += 8 * row_size)
            UNROLL for (int k = 0; k < 8; k++) rows[t + j + k] = row + k * row_size;
    });
    std::fill(rows + count, rows + round_up(count, W), rows[count - 1]);
    std::fill(rows, rows + hidden, rows[hidden]);
}

// Scales that will be read soon: of these tokens, for several heads.
void fetch_scales(const Side& side, const Tokens& tokens, int64_t num_heads) {
    if (!side.token_scale) return;
    tokens.by_page([&](int64_t, int64_t slot, int64_t here) {
        for (int64_t i = 0; i < num_heads; i++, slot += tokens.page_size)
            for (int64_t t = 0; t < here; t += 32) __builtin_prefetch(side.token_scale + slot + t);
    });
}

// Their scales, if the side has some, and zeros up to a multiple of W.
void find_scales(const Side& side, const Tokens& tokens, float* scales) {
    if (!side.token_scale) return;
    tokens.by_page([&](int64_t t, int64_t slot, int64_t here) {
        const uint16_t* from = side.token_scale + slot;
        int64_t j = 0;
        for (; j + W <= here; j += W) store(scales + t + j, Codec<BFLOAT>::read(from + j));
        for (; j < here; j++) scales[t + j] = bfloat_number(from[j]);
    });
    std::fill(scales + tokens.count, scales + round_up(tokens.count, W), 0.0f);
}

}  // namespace
