// In which order codes are read, and what is fetched meanwhile: nothing comes faster than memory gives it.
//
// An item reads a chunk of one head after the other, then the next chunk. Heads are neighbours in a page, and a processor
// that sees them read in order fetches on by itself.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>

#include "tables.h"
#include "vectors.h"

namespace {

constexpr int CHUNK = 128;                // tokens of one head that are read together, K and V
constexpr int TILE = 64;                  // of them, as many as stay in the first cache while rows go over them
constexpr int PLACES = 4;                 // a tile is fetched from so many places in turn
constexpr int64_t PLACE = TILE / PLACES;  // tokens from there

// Zen 4 has few lines under way to the first cache and more to the second. So there a line is asked for twice, for the
// second cache a head earlier: without it int8 takes 1.1 to 1.3 times as long. Zen 3 is of the same family and not
// measured; on an Intel Xeon of 2023 the second cache brought little.
bool is_zen_3_or_4() {
#if defined(__x86_64__)  // asked like this, as compilers learn the names of processors late
    unsigned a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d) || b != 0x68747541) return false;  // "Auth", of AuthenticAMD
    return __get_cpuid(1, &a, &b, &c, &d) && (a >> 8 & 0xF) + (a >> 20 & 0xFF) == 0x19;  // the family
#else
    return false;
#endif
}
const bool FETCHES_TWICE = is_zen_3_or_4();

// Where a tile's places are.
struct Places {
    const uint8_t* start[PLACES];
    int64_t size;  // bytes of each; 0 if nothing is there
};
// Where a side has a chunk of one head.
struct Tiles {
    const uint8_t* start;
    const int64_t* slots;  // of every place
    int64_t row_size;

    INLINE Places operator[](int64_t tile) const {
        Places places{{}, PLACE * row_size};
        UNROLL for (int i = 0; i < PLACES; i++) places.start[i] = start + slots[tile * PLACES + i] * row_size;
        return places;
    }
};

// A tile on the way to the first cache, and one to the second.
struct Fetch {
    Places near, far;
    int64_t offset = 0;

    // A line of each place: a processor that sees neighbours fetched goes on by itself, but takes a while to begin.
    INLINE void operator()() {
        if (offset >= near.size) return;
        UNROLL for (int i = 0; i < PLACES; i++) __builtin_prefetch(near.start[i] + offset);
        if (FETCHES_TWICE) UNROLL for (int i = 0; i < PLACES; i++) __builtin_prefetch(far.start[i] + offset, 0, 2);
        offset += 64;
    }
    // What four tokens out of a tile leave time for.
    INLINE void for_four_tokens() {
        for (int64_t i = 0; i < near.size; i += 64 * TILE / 4) (*this)();
    }
};

// A chunk, and the one of the head behind it. Nothing where codes are not read in tiles.
struct Reading {
    Tiles here, after;

    INLINE Fetch fetch(int64_t tile) const { return here.row_size ? Fetch{here[tile], after[tile]} : Fetch{}; }
};

// work(t, n, tile, fetch) for each tile, of tokens t ... t + n - 1. While it is read, `fetch` gets the next one, and in the
// last one what is read `next`.
template <class Work>
INLINE void in_tiles(int64_t count, const Reading& reading, const Reading& next, Work work) {
    for (int64_t t = 0, i = 0; t < count; t += TILE, i++) {
        Fetch fetch = t + TILE < count ? reading.fetch(i + 1) : next.fetch(0);
        work(t, std::min<int64_t>(TILE, count - t), i, &fetch);
    }
}

// What an item reads.
struct Order {
    const int64_t* places;  // slots of every 16th token, for head 0
    int64_t page_size, first_head, num_heads;

    // Of the `i`th head, where heads past the last one are the next chunk's.
    Reading at(const Side& side, int64_t chunk, int64_t i) const { return {tiles(side, chunk, i), tiles(side, chunk, i + 1)}; }
    Tiles tiles(const Side& side, int64_t chunk, int64_t i) const {
        for (; i >= num_heads; i -= num_heads) chunk++;
        const int64_t row_size = side.row_size();
        return {reinterpret_cast<const uint8_t*>(side.pages) + (first_head + i) * page_size * row_size,
                places + chunk * (CHUNK / PLACE), row_size};
    }
};
constexpr int MORE_PLACES = 3 * CHUNK / PLACE;  // that have to be there behind the last one

}  // namespace
