// In which of several ways codes are multiplied.
#pragma once

#include "blocks.h"
#include "visible.h"

namespace {

constexpr int DIRECT_ROWS = 20;  // up to so many rows read codes, more of them a tile of numbers

// How a side's codes are multiplied: in a tile of numbers, or as they are read; in digits or in pairs where there are
// instructions for it.
enum Way { TILES, CODES, DIGITS, PAIRS };

Way way_of(const Attention& a, const Side& side, int64_t rows) {
    const bool is_key = &side == &a.k, has_blocks = a.tables.page_size % BLOCK == 0;
    if (rows > DIRECT_ROWS || side.dim % W) return TILES;
    if (a.query_format == FLOAT) return CODES;  // which wants more than 16 bits
    if (HAS_DIGITS && side.format == INT8 && has_blocks) return DIGITS;
    // K's scales of channels would go into the query.
    if (HAS_PAIRS && side.format == E4M3 && (!is_key || (a.query_format == BFLOAT && !side.scale_channel && has_blocks)))
        return PAIRS;
    return CODES;
}
// Whether it is read in blocks, with one of which a span has to begin then.
bool is_in_blocks(const Attention& a, const Side& side, int64_t rows) {
    const Way way = way_of(a, side, rows);
    return way == DIGITS || (way == PAIRS && &side == &a.k);
}

}  // namespace
