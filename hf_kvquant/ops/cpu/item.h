// One item of work: some rows of some heads over a span of tokens, in chunks, each for all heads in turn:
//   1. logits, straight from the codes (few rows), from a tile of numbers (many rows), or by shorter products (few rows of
//      16 bits: int8 in digits, e4m3 in pairs);
//   2. softmax over the chunk, a running one over chunks;
//   3. rows += weights * values, in the same ways.
#pragma once

#include "digits.h"
#include "pairs.h"
#include "products.h"
#include "rows.h"
#include "softmax.h"
#include "ways.h"

namespace {

// What an item works in.
struct Room {
    int64_t rows, k_padded, v_padded;
    Way k_way, v_way;
    Head* heads;
    Interval* seen;                             // by every row
    float *logits, *sizes;                      // [rows, CHUNK], which become weights; [rows]: their largest
    float *k_scales, *v_scales;                 // of a chunk's tokens; null where there are none
    const char** rows_at;                       // where a chunk's tokens lie
    float *k_tile, *v_tile;                     // a chunk in numbers, channels and tokens first
    const float **k_tile_rows, **v_tile_rows;   // and where its channels and tokens begin
    int64_t *slots, *places;                    // of the span's pages; of every 16th token
    Digits weight_digits;
    uint32_t* weight_pairs;

    // With a carver of no memory it only counts.
    Room(Carver& carver, const Attention& a, int64_t rows, int64_t num_heads, int64_t num_tokens)
        : rows(rows), k_padded(round_up(a.k.dim, W)), v_padded(round_up(a.v.dim, W)), k_way(way_of(a, a.k, rows)),
          v_way(way_of(a, a.v, rows)) {
        heads = carver.take<Head>(num_heads);
        const int64_t digits_stride = round_up(a.k.dim, 32);
        for (int64_t i = 0; i < num_heads; i++) {
            Head head{};
            head.query = carver.take<float>(rows * k_padded);
            head.offsets = carver.take<float>(rows);
            head.digits = digits_from(carver, k_way == DIGITS ? rows : 0, digits_stride);
            head.groups = carver.take<uint64_t>(k_way == PAIRS ? rows * digits_stride / 4 : 0);
            if (carver.at) heads[i] = head;
        }
        seen = carver.take<Interval>(rows);
        logits = carver.take<float>(rows * CHUNK);
        sizes = carver.take<float>(rows);
        k_scales = a.k.token_scale ? carver.take<float>(CHUNK) : nullptr;
        v_scales = a.v.token_scale ? carver.take<float>(CHUNK) : nullptr;
        rows_at = carver.take<const char*>(CHUNK + 8);
        k_tile = carver.take<float>(k_way == TILES ? k_padded * CHUNK : 0);
        v_tile = carver.take<float>(v_way == TILES ? v_padded * CHUNK : 0);
        k_tile_rows = carver.take<const float*>(k_way == TILES ? a.k.dim : 0);
        v_tile_rows = carver.take<const float*>(v_way == TILES ? CHUNK : 0);
        slots = carver.take<int64_t>(num_tokens / a.tables.page_size + 2);
        places = carver.take<int64_t>(num_tokens / PLACE + 1 + MORE_PLACES);
        weight_digits = digits_from(carver, v_way == DIGITS ? rows : 0, CHUNK);
        weight_pairs = carver.take<uint32_t>(v_way == PAIRS ? rows * CHUNK : 0);
        if (!carver.at) return;
        if (k_way == TILES)
            for (int64_t d = 0; d < a.k.dim; d++) k_tile_rows[d] = k_tile + d * CHUNK;
        if (v_way == TILES)
            for (int64_t t = 0; t < CHUNK; t++) v_tile_rows[t] = v_tile + t * v_padded;
    }
};

// A head's rows of the query, and nothing seen yet.
void begin(const Attention& a, const Block& block, Way way, Head& head) {
    static thread_local Workspace workspace;
    const int64_t rows = block.count, dim = a.k.dim, padded = round_up(dim, W), group = a.group();
    float *units = reinterpret_cast<float*>(workspace.of(2 * padded * sizeof(float))), *zeros = units + padded;
    float factor = 1.0f;
    with_format(a.k.format, [&](auto codec) { factor = codec.factor; });
    a.k.scales_of(head.index, units);
    a.k.zeros_of(head.index, zeros);
    for (int64_t d = 0; d < dim; d++) units[d] = units[d] * float(a.softmax_scale) * factor;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t row = block.first + r, q_head = head.index * group + row % group;
        const char* from = a.query + (block.b * a.query_batch + q_head * a.query_head + row / group * a.query_token) *
                                         size_of(a.query_format);
        float* to = head.query + r * padded;
        with_format(a.query_format, [&](auto codec) {
            typedef decltype(codec) C;
            if constexpr (sizeof(typename C::T) > 1)
                for (int64_t d = 0; d < dim; d += W)
                    store(to + d, read_some<C>(reinterpret_cast<const typename C::T*>(from) + d, dim - d));
        });
        float offset = 0.0f;
        if (a.k.zero)
            for (int64_t d = 0; d < dim; d++) offset += to[d] * zeros[d];
        head.offsets[r] = offset * float(a.softmax_scale);
        if (way != PAIRS)
            for (int64_t d = 0; d < dim; d++) to[d] *= units[d];
    }
    head.unit = way == PAIRS ? units[0] : 1.0f;
    if constexpr (HAS_PAIRS)
        if (way == PAIRS) group_query(head.query, padded, rows, dim, head.groups);
    with_format(a.k.format, [&](auto codec) {
        if constexpr (codec.DIGITS)
            if (way == DIGITS) split_query(head.query, padded, rows, dim, head.digits);
    });
    std::fill(head.part.sums, head.part.sums + rows, 0.0f);
    std::fill(head.part.highest, head.part.highest + rows, -INF);
    std::fill(head.part.values, head.part.values + rows * round_up(a.v.dim, W), 0.0f);
}

// Logits of a head over a chunk of `count` tokens. While they are read, `next` is fetched.
void multiply_keys(const Attention& a, const Room& room, const Head& head, int64_t count, const Reading& here,
                   const Reading& next) {
    const int64_t rows = room.rows, dim = a.k.dim, columns = round_up(count, W);
    float* logits = room.logits;
    with_format(a.k.format, [&](auto codec) {
        typedef decltype(codec) C;
        if constexpr (C::DIGITS)
            if (room.k_way == DIGITS)
                return dots_of_digits(head.digits, rows, count, dim, here, next, logits, CHUNK);
        auto codes = reinterpret_cast<const typename C::T* const*>(room.rows_at);
        if constexpr (HAS_PAIRS && std::is_same_v<typename C::T, uint8_t>)
            if (room.k_way == PAIRS) return dots_of_pairs(head.groups, rows, count, dim, here, next, logits, CHUNK);
        if (room.k_way == CODES)
            return dots_of_rows<C>(head.query, room.k_padded, rows, codes, count, dim, here, next, logits, CHUNK);
        decode_turned<C>(codes, count, dim, room.k_tile);
        for (int64_t r = 0; r < rows; r++) std::fill(logits + r * CHUNK, logits + r * CHUNK + columns, 0.0f);
        accumulate_rows<Codec<FLOAT>>(head.query, room.k_padded, rows, room.k_tile_rows, dim, columns, {}, {}, logits, CHUNK);
    });
}

// The values of a chunk times their weights, added to what a head has seen.
void add_values(const Attention& a, const Room& room, const Head& head, int64_t count, const Reading& here,
                const Reading& next) {
    const int64_t rows = room.rows, dim = a.v.dim, padded = room.v_padded;
    float *weights = room.logits, *values = head.part.values;
    with_format(a.v.format, [&](auto codec) {
        typedef decltype(codec) C;
        if constexpr (C::DIGITS)
            if (room.v_way == DIGITS)
                return accumulate_digits(weights, CHUNK, room.sizes, rows, count, dim, room.weight_digits, here, next, values,
                                         padded);
        auto codes = reinterpret_cast<const typename C::T* const*>(room.rows_at);
        if constexpr (HAS_PAIRS && std::is_same_v<typename C::T, uint8_t>)
            if (room.v_way == PAIRS)
                return accumulate_pairs(weights, CHUNK, rows, codes, count, dim, room.weight_pairs, here, next, values,
                                        padded);
        if (room.v_way == CODES)
            return accumulate_rows<C>(weights, CHUNK, rows, codes, count, dim, here, next, values, padded);
        decode_tile<C>(codes, count, dim, room.v_tile, padded);
        accumulate_rows<Codec<FLOAT>>(weights, CHUNK, rows, room.v_tile_rows, count, padded, {}, {}, values, padded);
    });
}

// `num_heads` heads of a block from `first_head` on, over one span; their parts are `part_size` apart. Returns 1 if a page
// is none of the pool's.
int attend(const Attention& a, const Block& block, int64_t span_index, int64_t first_head, int64_t num_heads,
           float* parts, int64_t part_size) {
    static thread_local Workspace workspace;
    const Interval span = block.span(span_index);
    const int64_t rows = block.count, start = span.start, total = span.stop - span.start;
    Carver counting{nullptr};
    Room(counting, a, rows, num_heads, total);
    Carver carver{workspace.of(counting.used)};
    const Room room(carver, a, rows, num_heads, total);
    for (int64_t r = 0; r < rows; r++) room.seen[r] = seen_by(a, block.b, (block.first + r) / a.group());

    const int64_t page_size = a.tables.page_size, before = start % page_size;
    if (!find_pages(a.tables, block.b, start, total, room.slots)) return 1;
    find_places(room.slots, page_size, before, total, room.places);
    const Order order{room.places, page_size, first_head, num_heads};
    const auto k_at = [&](int64_t chunk, int64_t i) { return room.k_way == TILES ? Reading{} : order.at(a.k, chunk, i); };
    const auto v_at = [&](int64_t chunk, int64_t i) { return room.v_way == TILES ? Reading{} : order.at(a.v, chunk, i); };
    if (total > 0)
        for (Fetch first = k_at(0, 0).fetch(0); first.offset < first.near.size;) first();
    for (int64_t i = 0; i < num_heads; i++) {
        room.heads[i].index = first_head + i;
        room.heads[i].part = Part(parts + i * part_size, rows, room.v_padded);
        begin(a, block, room.k_way, room.heads[i]);
    }

    for (int64_t t = 0, c = 0; t < total; t += CHUNK, c++) {
        const int64_t count = std::min<int64_t>(CHUNK, total - t);
        const Tokens next(room.slots, first_head, page_size, before + t + count, std::min<int64_t>(CHUNK, total - t - count));
        fetch_scales(a.k, next, num_heads);
        fetch_scales(a.v, next, num_heads);
        for (int64_t i = 0; i < num_heads; i++) {
            const Head& head = room.heads[i];
            if (rows > DIRECT_ROWS && a.mask && a.mask_format < 0 &&
                !shows_any(a, block, head.index, room.seen, start + t, count))
                continue;
            const Reading k_here = k_at(c, i), v_here = v_at(c, i), k_next = k_at(c, i + 1);
            const Tokens tokens(room.slots, head.index, page_size, before + t, count);
            find_scales(a.k, tokens, room.k_scales);
            find_scales(a.v, tokens, room.v_scales);
            const int64_t hidden = span_index || t ? 0 : block.hidden;
            if (room.v_scales) std::fill(room.v_scales, room.v_scales + hidden, 0.0f);  // nothing times NaN is NaN

            if (!is_in_blocks(a, a.k, rows)) find_rows(a.k, tokens, hidden, room.rows_at);
            multiply_keys(a, room, head, count, k_here, v_here);
            in_groups(rows, [&](int64_t r, auto n) {
                softmax<n()>(a, block, head, r, room.seen, start + t, count, room.k_scales, room.v_scales,
                             room.logits + r * CHUNK, room.sizes + r);
            });
            if (!is_in_blocks(a, a.v, rows)) find_rows(a.v, tokens, hidden, room.rows_at);
            add_values(a, room, head, count, v_here, k_next);
        }
    }
    return 0;
}

}  // namespace
