// Attention works on the G query heads of a key/value head together: row t * G + g is token t of head g. An item of
// work is some rows of some heads over a span of tokens, in chunks, each for all heads in turn:
//   1. logits, straight from the codes (few rows), from a tile of numbers (many rows), or by shorter products (few rows of
//      16 bits: int8 in digits, e4m3 in pairs);
//   2. softmax over the chunk, a running one over chunks;
//   3. rows += weights * values, in the same ways.
// Scales and zeros of K go into the query and V's into the output, token scales into logits and weights. Spans do not
// depend on the number of threads, so neither does the result.
#pragma once

#include "digits.h"
#include "pairs.h"
#include "products.h"
#include "rows.h"
#include "runtime.h"
#include "softmax.h"
#include "visible.h"

namespace {

constexpr int DIRECT_ROWS = 20;  // up to so many rows read codes, more of them a tile of numbers
// Rows of an item when there are many. Large blocks read K and V less often; small ones lose less at the edge of what is
// seen, and there are enough of them for many cores.
constexpr int ROW_BLOCK = 128, LARGE_BLOCK = 512, FEWEST_LARGE_BLOCKS = 16;
constexpr int64_t SMALL_ATTENTION = 1 << 18;  // multiply-adds that are worth one more thread

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

// How many spans: long enough to be worth their start, and short and many enough for many cores. Of few rows a power of
// two, so that most numbers of threads take as many each.
int64_t num_spans_of(int64_t length, bool few_rows, int64_t num_blocks) {
    if (!few_rows) return num_blocks >= 64 ? 1 : std::clamp<int64_t>((length + 4095) / 4096, 1, 8);
    const int64_t shortest = std::clamp<int64_t>(length * num_blocks / 128, length < 4096 ? 512 : 1024, 4096);
    int64_t num_spans = 1;
    while (2 * num_spans * shortest <= length) num_spans *= 2;
    return num_spans;
}

// Whether threads that take one item after the other all end at about the same time.
bool is_even(int64_t num_items, int64_t num_threads) {
    return num_threads == 1 || (num_items >= 2 * num_threads && round_up(num_items, num_threads) * 15 <= num_items * 16);
}

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

// One item: `num_heads` heads of a block from `first_head` on, over one span; their parts are `part_size` apart.
// Returns 1 if a page is none of the pool's.
int attend(const Attention& a, const Block& block, int64_t span_index, int64_t first_head, int64_t num_heads,
           float* parts, int64_t part_size) {
    static thread_local Workspace workspace;
    const int64_t rows = block.count, k_dim = a.k.dim, v_dim = a.v.dim;
    const int64_t k_padded = round_up(k_dim, W), v_padded = round_up(v_dim, W);
    const Interval span = block.span(span_index);
    const int64_t start = span.start, total = span.stop - span.start;
    const Way k_way = way_of(a, a.k, rows), v_way = way_of(a, a.v, rows);
    const int64_t page_size = a.tables.page_size, num_pages = total / page_size + 2;

    Head* heads;
    Interval* seen;
    float *logits, *sizes, *k_scales, *v_scales, *k_tile, *v_tile;
    const char** rows_at;
    const float **k_tile_rows, **v_tile_rows;
    int64_t *slots, *places;
    Digits weight_digits;
    uint32_t* weight_pairs;
    Carver carver{nullptr};
    for (int pass = 0; pass < 2; pass++) {
        if (pass) carver = {workspace.of(carver.used)};
        heads = carver.take<Head>(num_heads);
        for (int64_t i = 0; i < num_heads; i++) {
            const Head head = {
                first_head + i, carver.take<float>(rows * k_padded), carver.take<float>(rows),
                digits_from(carver, k_way == DIGITS ? rows : 0, round_up(k_dim, 32)),
                carver.take<uint64_t>(k_way == PAIRS ? rows * round_up(k_dim, 32) / 4 : 0), 1.0f,
                Part(parts + i * part_size, rows, v_padded)};
            if (pass) heads[i] = head;
        }
        seen = carver.take<Interval>(rows);
        logits = carver.take<float>(rows * CHUNK);
        sizes = carver.take<float>(rows);
        k_scales = carver.take<float>(a.k.token_scale ? CHUNK : 0);
        v_scales = carver.take<float>(a.v.token_scale ? CHUNK : 0);
        rows_at = carver.take<const char*>(CHUNK + 8);
        k_tile = carver.take<float>(k_way == TILES ? k_padded * CHUNK : 0);
        v_tile = carver.take<float>(v_way == TILES ? v_padded * CHUNK : 0);
        k_tile_rows = carver.take<const float*>(k_way == TILES ? k_dim : 0);
        v_tile_rows = carver.take<const float*>(v_way == TILES ? CHUNK : 0);
        slots = carver.take<int64_t>(num_pages);
        places = carver.take<int64_t>(total / PLACE + 1 + MORE_PLACES);
        weight_digits = digits_from(carver, v_way == DIGITS ? rows : 0, CHUNK);
        weight_pairs = carver.take<uint32_t>(v_way == PAIRS ? rows * CHUNK : 0);
    }
    if (k_way == TILES)
        for (int64_t d = 0; d < k_dim; d++) k_tile_rows[d] = k_tile + d * CHUNK;
    if (v_way == TILES)
        for (int64_t t = 0; t < CHUNK; t++) v_tile_rows[t] = v_tile + t * v_padded;
    for (int64_t r = 0; r < rows; r++) seen[r] = seen_by(a, block.b, (block.first + r) / a.group());
    if (!find_pages(a.tables, block.b, start, total, slots)) return 1;
    const int64_t before = start % page_size;
    find_places(slots, page_size, before, total, places);
    const Order order{places, page_size, first_head, num_heads};
    const auto k_at = [&](int64_t chunk, int64_t i) { return k_way == TILES ? Reading{} : order.at(a.k, chunk, i); };
    const auto v_at = [&](int64_t chunk, int64_t i) { return v_way == TILES ? Reading{} : order.at(a.v, chunk, i); };
    if (total > 0)
        for (Fetch first = k_at(0, 0).fetch(0); first.offset < first.near.size;) first();
    for (int64_t i = 0; i < num_heads; i++) begin(a, block, k_way, heads[i]);

    for (int64_t t = 0, c = 0; t < total; t += CHUNK, c++) {
        const int64_t count = std::min<int64_t>(CHUNK, total - t), columns = round_up(count, W);
        const Tokens next(slots, first_head, page_size, before + t + count, std::min<int64_t>(CHUNK, total - t - count));
        fetch_scales(a.k, next, num_heads);
        fetch_scales(a.v, next, num_heads);
        for (int64_t i = 0; i < num_heads; i++) {
            const Head& head = heads[i];
            const int64_t h = head.index;
            if (rows > DIRECT_ROWS && a.mask && a.mask_format < 0 && !shows_any(a, block, h, seen, start + t, count)) continue;
            const Reading k_here = k_at(c, i), v_here = v_at(c, i), k_next = k_at(c, i + 1);
            const Tokens tokens(slots, h, page_size, before + t, count);
            find_scales(a.k, tokens, k_scales);
            find_scales(a.v, tokens, v_scales);
            const int64_t hidden = span_index || t ? 0 : block.hidden;
            if (a.v.token_scale) std::fill(v_scales, v_scales + hidden, 0.0f);  // nothing times NaN is NaN

            if (!is_in_blocks(a, a.k, rows)) find_rows(a.k, tokens, hidden, rows_at);
            with_format(a.k.format, [&](auto codec) {
                typedef decltype(codec) C;
                if constexpr (C::DIGITS)
                    if (k_way == DIGITS)
                        return dots_of_digits(head.digits, rows, count, k_dim, k_here, v_here, logits, CHUNK);
                auto codes = reinterpret_cast<const typename C::T* const*>(rows_at);
                if constexpr (HAS_PAIRS && std::is_same_v<typename C::T, uint8_t>)
                    if (k_way == PAIRS) return dots_of_pairs(head.groups, rows, count, k_dim, k_here, v_here, logits, CHUNK);
                if (k_way == CODES)
                    return dots_of_rows<C>(head.query, k_padded, rows, codes, count, k_dim, k_here, v_here, logits, CHUNK);
                decode_turned<C>(codes, count, k_dim, k_tile);
                for (int64_t r = 0; r < rows; r++) std::fill(logits + r * CHUNK, logits + r * CHUNK + columns, 0.0f);
                accumulate_rows<Codec<FLOAT>>(head.query, k_padded, rows, k_tile_rows, k_dim, columns, {}, {}, logits,
                                              CHUNK);
            });

            in_groups(rows, [&](int64_t r, auto n) {
                softmax<n()>(a, block, head, r, seen, start + t, count, a.k.token_scale ? k_scales : nullptr,
                             a.v.token_scale ? v_scales : nullptr, logits + r * CHUNK, sizes + r);
            });

            if (!is_in_blocks(a, a.v, rows)) find_rows(a.v, tokens, hidden, rows_at);
            with_format(a.v.format, [&](auto codec) {
                typedef decltype(codec) C;
                if constexpr (C::DIGITS)
                    if (v_way == DIGITS)
                        return accumulate_digits(logits, CHUNK, sizes, rows, count, v_dim, weight_digits, v_here, k_next,
                                                 head.part.values, v_padded);
                auto codes = reinterpret_cast<const typename C::T* const*>(rows_at);
                if constexpr (HAS_PAIRS && std::is_same_v<typename C::T, uint8_t>)
                    if (v_way == PAIRS)
                        return accumulate_pairs(logits, CHUNK, rows, codes, count, v_dim, weight_pairs, v_here, k_next,
                                                head.part.values, v_padded);
                if (v_way == CODES)
                    return accumulate_rows<C>(logits, CHUNK, rows, codes, count, v_dim, v_here, k_next, head.part.values,
                                              v_padded);
                decode_tile<C>(codes, count, v_dim, v_tile, v_padded);
                accumulate_rows<Codec<FLOAT>>(logits, CHUNK, rows, v_tile_rows, count, v_padded, {}, {}, head.part.values,
                                              v_padded);
            });
        }
    }
    return 0;
}

// The spans of a block's head put together, normalized, in the output; parts are `stride` apart, and the first one is
// written over.
void finish(const Attention& a, const Block& block, int64_t h, float* parts, int64_t stride) {
    static thread_local Workspace workspace;
    const int64_t v_dim = a.v.dim, v_padded = round_up(v_dim, W), group = a.group();
    float *units = reinterpret_cast<float*>(workspace.of(2 * v_padded * sizeof(float))), *zeros = units + v_padded;
    float factor = 1.0f;
    with_format(a.v.format, [&](auto codec) { factor = codec.factor; });
    a.v.scales_of(h, units);
    a.v.zeros_of(h, zeros);
    for (int64_t d = 0; d < v_dim; d++) units[d] *= factor;
    for (int64_t r = 0; r < block.count; r++) {
        const int64_t row = block.first + r, head = h * group + row % group;
        const float sink = a.sinks ? a.sinks[head] : -INF;
        const auto part = [&](int64_t i) { return Part(parts + i * stride, block.count, v_padded); };
        float top = sink;
        for (int64_t i = 0; i < block.num_spans; i++) top = std::max(top, part(i).highest[r]);
        if (top == -INF) top = 0.0f;
        float seen = 0.0f, *total = parts + r * v_padded;
        for (int64_t i = 0; i < block.num_spans; i++) {
            const float weight = exp_of(part(i).highest[r] - top), *values = part(i).values + r * v_padded;
            seen += part(i).sums[r] * weight;
            for (int64_t d = 0; d < v_padded; d++) total[d] = (i ? total[d] : 0.0f) + values[d] * weight;
        }
        const float sum = seen + exp_of(sink - top), reciprocal = sum == 0.0f ? 0.0f : 1.0f / sum;
        const int64_t at = (block.b * a.num_q_heads + head) * a.num_tokens + row / group;
        if (a.lse) a.lse[at] = top + std::log(sum);
        for (int64_t d = 0; d < v_dim; d++) total[d] = total[d] * reciprocal * units[d];
        if (a.v.zero)
            for (int64_t d = 0; d < v_dim; d++) total[d] += zeros[d] * (seen * reciprocal);
        store_numbers(a.output, at * v_dim, a.query_format, total, v_dim);
    }
}

}  // namespace

// Returns 0, or 1 if the page table names a page that the pool does not have.
extern "C" int64_t hf_kvquant_paged_attention(const Attention* arguments) {
    static thread_local Workspace block_space, part_space;
    const Attention& a = *arguments;
    const int64_t rows = a.num_rows(), group = a.group(), v_padded = round_up(a.v.dim, W);
    const bool few = rows <= DIRECT_ROWS;
    const int64_t many = rows >= FEWEST_LARGE_BLOCKS * LARGE_BLOCK ? LARGE_BLOCK : ROW_BLOCK;
    const int64_t rows_each = few ? rows : std::min(rows, many);
    const int64_t row_blocks = (rows + rows_each - 1) / rows_each, num_heads = a.tables.num_heads;
    const int64_t num_blocks = a.tables.batch_size * row_blocks;

    Block* blocks = reinterpret_cast<Block*>(block_space.of(num_blocks * sizeof(Block)));
    int64_t num_spans = 0, num_parts = 0, work = 0, index = 0;
    for (int64_t b = 0; b < a.tables.batch_size; b++)
        for (int64_t i = 0; i < row_blocks; i++, index++) {
            const int64_t first = i * rows_each, count = std::min(rows_each, rows - first);
            Interval seen{INT64_MAX, 0};
            for (int64_t t = first / group; t <= (first + count - 1) / group; t++) {
                const Interval one = seen_by(a, b, t);
                if (one.start < one.stop) seen = {std::min(seen.start, one.start), std::max(seen.stop, one.stop)};
            }
            if (seen.stop == 0) seen.start = 0;
            const bool in_blocks = is_in_blocks(a, a.k, count) || is_in_blocks(a, a.v, count);
            const int64_t hidden = in_blocks ? seen.start % BLOCK : 0;
            seen.start -= hidden;
            const int64_t length = seen.stop - seen.start;
            const int64_t spans = num_spans_of(length, few, num_blocks * num_heads);
            blocks[index] = {b, first, count, seen.start, hidden, seen.stop, spans, num_spans, num_parts};
            num_spans += spans;
            num_parts += spans > 1 ? spans * num_heads : 0;
            work += num_heads * length * count * (a.k.dim + a.v.dim);
        }
    const int64_t num_threads = std::min(a.tables.num_threads, 1 + work / SMALL_ATTENTION);
    // Few rows: as many heads together as leave threads about even.
    int64_t set_size = few ? num_heads : 1;
    const auto num_sets_of = [&](int64_t size) { return (num_heads + size - 1) / size; };
    while (set_size > 1 && !is_even(num_spans * num_sets_of(set_size), num_threads)) set_size--;
    const int64_t num_sets = num_sets_of(set_size);

    const int64_t part_size = Part::size(rows_each, v_padded);
    float* parts;
    std::atomic<int64_t>* unfinished;  // spans, of every block's sets of heads
    Carver carver{nullptr};
    for (int pass = 0; pass < 2; pass++) {
        if (pass) carver = {part_space.of(carver.used)};
        parts = carver.take<float>(num_parts * part_size);
        unfinished = carver.take<std::atomic<int64_t>>(num_blocks * num_sets);
    }
    for (int64_t i = 0; i < num_blocks * num_sets; i++) unfinished[i] = blocks[i / num_sets].num_spans;
    std::atomic<int> failed{0};
    in_parallel(num_spans * num_sets, num_threads, [&](int64_t item) {
        // Sets of fewer heads come last, when threads end.
        const int64_t set = item / num_spans, first_head = set * set_size, num = std::min(set_size, num_heads - first_head);
        const Block* after = std::upper_bound(blocks, blocks + num_blocks, item % num_spans,
                                              [](int64_t i, const Block& block) { return i < block.first_span; });
        const Block& block = after[-1];
        const int64_t span = item % num_spans - block.first_span, stride = num_heads * part_size;
        static thread_local Workspace own_space;
        float* start = block.num_spans == 1 ? reinterpret_cast<float*>(own_space.of(num * part_size * sizeof(float)))
                                            : parts + (block.first_part + first_head) * part_size;
        if (attend(a, block, span, first_head, num, start + span * stride, part_size)) failed = 1;
        if (--unfinished[(&block - blocks) * num_sets + set] || failed) return;
        for (int64_t i = 0; i < num; i++) finish(a, block, first_head + i, start + i * part_size, stride);
    });
    return failed;
}
