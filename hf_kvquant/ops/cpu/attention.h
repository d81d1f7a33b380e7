// Attention works on the G query heads of a key/value head together: row t * G + g is token t of head g. An item of
// work is some rows of one head over a span of tokens:
//   1. logits of a chunk of tokens, straight from the codes (few rows), from a tile of numbers (many rows), in digits
//      (few rows of 16 bits, int8);
//   2. softmax over the chunk, a running one over chunks;
//   3. rows += weights * values, in the same ways.
// Scales and zeros of K go into the query and V's into the output, token scales into logits and weights. Spans do not
// depend on the number of threads, so neither does the result.
#pragma once

#include "digits.h"
#include "products.h"
#include "rows.h"
#include "runtime.h"
#include "tables.h"

namespace {

constexpr int DIRECT_CHUNK = 512;                // tokens of one softmax where codes are read
constexpr int DIRECT_ROWS = 20;                  // up to so many rows read codes, more of them a tile of numbers
// Rows of an item when there are many. Large blocks read K and V less often; small ones lose less at the edge of what is
// seen, and there are enough of them for many cores.
constexpr int ROW_BLOCK = 128, LARGE_BLOCK = 512, FEWEST_LARGE_BLOCKS = 16;
constexpr int64_t SMALL_ATTENTION = 1 << 18;     // multiply-adds that are worth one more thread

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

// Rows [first, first + count) of every head of sequence b, and the spans of tokens that they are cut into. Items go
// through the heads of a span, which are neighbours in memory, before the next one. The first `hidden` tokens are seen by
// no row.
struct Block {
    int64_t b, first, count, start, hidden, stop, span, num_spans, first_item, first_part;
};

// Whether one of the sides is multiplied in digits; a span begins with a block then.
bool takes_digits(const Attention& a, const Side& side, int64_t rows) {
    return HAS_DIGITS && a.query_format != FLOAT && side.format == INT8 && side.dim % W == 0 &&
           rows <= DIRECT_ROWS && a.tables.page_size % BLOCK == 0;
}

// Spans are long enough to be worth their start, and short and many enough for many cores.
int64_t span_of(int64_t length, bool few_rows, int64_t num_blocks) {
    if (few_rows) return std::clamp<int64_t>(round_up(length * num_blocks / 128, 1024), 1024, 4096);
    return num_blocks >= 64 ? std::max<int64_t>(length, 1) : std::max<int64_t>(4096, round_up(length, 8) / 8);
}

// Raw logits of one row over tokens [start, start + count), of which it sees `seen`, to weights; returns their sum.
// `highest` is the running maximum.
float softmax(const Attention& a, int64_t b, int64_t h, int64_t row, int64_t start, int64_t count, Interval seen,
              const float* k_scales, const float* v_scales, float offset, float* logits, float& highest) {
    int64_t low = std::min(std::max(seen.start - start, int64_t(0)), count);
    int64_t high = std::max(std::min(seen.stop - start, count), low);
    int64_t padded = round_up(count, W), from = low / W * W, to = round_up(high, W);
    f32 most = splat(highest);
    for (int64_t i = from; i < to; i += W) {
        f32 x = load<f32>(logits + i);
        if (k_scales) x = x * load<f32>(k_scales + i);
        x = x + offset;
        if (a.softcap) x = float(a.softcap) * tanh_of(x / float(a.softcap));
        store(logits + i, x);
        most = larger(x, most);
    }
    if (a.mask) {
        const int64_t at = a.mask_index(b, h, row, start + low);
        float* x = logits + low;
        if (a.mask_format < 0) {
            const uint8_t* shown = reinterpret_cast<const uint8_t*>(a.mask) + at;
            for (int64_t i = 0; i < high - low; i++) x[i] = shown[i] ? x[i] : -INF;
        } else if (a.mask_format == FLOAT) {
            const float* bias = reinterpret_cast<const float*>(a.mask) + at;
            for (int64_t i = 0; i < high - low; i++) x[i] += bias[i];
        } else {
            const uint16_t* bias = reinterpret_cast<const uint16_t*>(a.mask) + at;
            for (int64_t i = 0; i < high - low; i++) x[i] += float_of(uint32_t(bias[i]) << 16);
        }
    }
    std::fill(logits, logits + low, -INF);
    std::fill(logits + high, logits + padded, -INF);

    if (a.mask || from < low || high < to) {  // some of these are hidden
        most = splat(highest);
        for (int64_t i = from; i < to; i += W) most = larger(load<f32>(logits + i), most);
    }
    highest = largest_of(most);

    f32 base = splat(highest == -INF ? 0.0f : highest), sums = {};
    for (int64_t i = 0; i < padded; i += W) {
        f32 weight = exp_of(load<f32>(logits + i) - base);
        sums += weight;
        if (v_scales) weight = weight * load<f32>(v_scales + i);
        store(logits + i, weight);
    }
    return sum_of(sums);
}

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

// One item: sums[row], highest[row] and values[row] of a block's head h over one span.
int attend(const Attention& a, const Block& block, int64_t h, int64_t span_index, float* sums, float* highest,
           float* values) {
    static thread_local Workspace workspace;
    const int64_t rows = block.count, k_dim = a.k.dim, v_dim = a.v.dim, group = a.group();
    const int64_t k_padded = round_up(k_dim, W), v_padded = round_up(v_dim, W);
    const int64_t start = block.start + span_index * block.span, stop = std::min(start + block.span, block.stop);
    const bool few = rows <= DIRECT_ROWS;
    const bool k_direct = few && k_dim % W == 0, v_direct = few && v_dim % W == 0;
    const bool in_blocks = start % BLOCK == 0;
    const bool k_digits = in_blocks && takes_digits(a, a.k, rows), v_digits = in_blocks && takes_digits(a, a.v, rows);
    const int64_t k_size = a.k.row_size(), v_size = a.v.row_size();
    const int64_t chunk = k_direct && v_direct ? DIRECT_CHUNK : CHUNK, padded = round_up(block.span, W) + PADDING;

    float *q, *units, *zeros, *logits, *offsets, *k_scales, *v_scales, *k_tile, *v_tile;
    Interval* seen;
    const char **k_rows, **v_rows;  // or blocks
    const float **k_tile_rows, **v_tile_rows;
    int64_t* slots;
    Digits q_digits, weight_digits;
    Carver carver{nullptr};
    for (int pass = 0; pass < 2; pass++) {
        if (pass) carver = {workspace.of(carver.used)};
        q = carver.take<float>(rows * k_padded);
        units = carver.take<float>(k_padded);
        zeros = carver.take<float>(k_padded);
        offsets = carver.take<float>(rows);
        seen = carver.take<Interval>(rows);
        logits = carver.take<float>(rows * chunk);
        k_scales = carver.take<float>(a.k.token_scale ? padded : 0);
        v_scales = carver.take<float>(a.v.token_scale ? padded : 0);
        k_rows = carver.take<const char*>(padded);
        v_rows = carver.take<const char*>(padded);
        k_tile = carver.take<float>(k_direct ? 0 : k_padded * CHUNK);
        v_tile = carver.take<float>(v_direct ? 0 : v_padded * CHUNK);
        k_tile_rows = carver.take<const float*>(k_direct ? 0 : k_dim);
        v_tile_rows = carver.take<const float*>(v_direct ? 0 : CHUNK);
        slots = carver.take<int64_t>(padded);
        q_digits = digits_from(carver, k_digits ? rows : 0, round_up(k_dim, 32));
        weight_digits = digits_from(carver, v_digits ? rows : 0, chunk);
    }
    if (!k_direct)
        for (int64_t d = 0; d < k_dim; d++) k_tile_rows[d] = k_tile + d * CHUNK;
    if (!v_direct)
        for (int64_t t = 0; t < CHUNK; t++) v_tile_rows[t] = v_tile + t * v_padded;

    // The query in units of the codes, and what K's zero adds.
    float factor = 1.0f;
    with_format(a.k.format, [&](auto codec) { factor = codec.factor; });
    a.k.scales_of(h, units);
    a.k.zeros_of(h, zeros);
    for (int64_t d = 0; d < k_dim; d++) units[d] = units[d] * float(a.softmax_scale) * factor;
    for (int64_t r = 0; r < rows; r++) {
        int64_t row = block.first + r, head = h * group + row % group;
        const char* from = a.query + (block.b * a.query_batch + head * a.query_head + row / group * a.query_token) *
                                         size_of(a.query_format);
        float* to = q + r * k_padded;
        with_format(a.query_format, [&](auto codec) {
            typedef decltype(codec) C;
            if constexpr (sizeof(typename C::T) > 1)
                for (int64_t d = 0; d < k_dim; d += W)
                    store(to + d, read_some<C>(reinterpret_cast<const typename C::T*>(from) + d, k_dim - d));
        });
        float offset = 0.0f;
        if (a.k.zero)
            for (int64_t d = 0; d < k_dim; d++) offset += to[d] * zeros[d];
        offsets[r] = offset * float(a.softmax_scale);
        for (int64_t d = 0; d < k_dim; d++) to[d] *= units[d];
        seen[r] = seen_by(a, block.b, row / group);
        sums[r] = 0.0f;
        highest[r] = -INF;
    }
    std::fill(values, values + rows * v_padded, 0.0f);

    with_format(a.k.format, [&](auto codec) {
        if constexpr (codec.DIGITS)
            if (k_digits) split_query(q, k_padded, rows, k_dim, q_digits);
    });

    const int64_t total = stop - start;
    const int64_t page_size = a.tables.page_size, num_pages = find_pages(a.tables, block.b, h, start, total, slots);
    if (num_pages < 0) return 1;
    const int64_t skipped = start % page_size;
    const auto find = [&](const Side& side, bool digits, const char** rows, float* scales) {
        if (digits) find_blocks(side, page_size, slots, num_pages, skipped, total, BLOCK, 3 * PLACES, rows);
        else find_rows(side, page_size, slots, num_pages, skipped, total, rows);
        find_scales(side, page_size, slots, num_pages, skipped, total, scales);
    };
    find(a.k, k_digits, k_rows, k_scales);
    find(a.v, v_digits, v_rows, v_scales);
    if (a.v.token_scale && !span_index) std::fill(v_scales, v_scales + block.hidden, 0.0f);  // nothing times NaN is NaN
    if (k_digits)
        for (int64_t i = 0; i < PLACES; i++) prefetch(k_rows[i], BLOCK * k_size);
    for (int64_t t = 0; t < std::min<int64_t>(total, k_digits ? 0 : TILE); t++) prefetch(k_rows[t], k_size);
    for (int64_t t = 0; t < std::min<int64_t>(total, v_digits ? 0 : TILE); t++) prefetch(v_rows[t], v_size);
    const auto ahead = [&](const Side& side, bool digits, const char** rows, int64_t t) {
        return digits ? Ahead{reinterpret_cast<const uint8_t* const*>(rows + t / BLOCK), BLOCK * side.row_size()} : Ahead{};
    };

    for (int64_t t0 = 0; t0 < total; t0 += chunk) {
        const int64_t count = std::min(chunk, total - t0), columns = round_up(count, W);
        if (!few && a.mask && a.mask_format < 0 && !shows_any(a, block, h, seen, start + t0, count)) continue;
        with_format(a.k.format, [&](auto codec) {
            typedef decltype(codec) C;
            if constexpr (C::DIGITS)
                if (k_digits)
                    return dots_of_digits(q_digits, rows, ahead(a.k, true, k_rows, t0).blocks, count, k_dim,
                                          ahead(a.v, v_digits, v_rows, t0), logits, chunk);
            auto codes = reinterpret_cast<const typename C::T* const*>(k_rows + t0);
            if (k_direct) return dots_of_rows<C>(q, k_padded, rows, codes, count, k_dim, logits, chunk);
            decode_turned<C>(codes, count, k_dim, k_tile);
            for (int64_t r = 0; r < rows; r++) std::fill(logits + r * chunk, logits + r * chunk + columns, 0.0f);
            accumulate_rows<Codec<FLOAT>>(q, k_padded, rows, k_tile_rows, k_dim, columns, logits, chunk, false);
        });

        for (int64_t r = 0; r < rows; r++) {
            float before = highest[r];
            float sum = softmax(a, block.b, h, block.first + r, start + t0, count, seen[r],
                                a.k.token_scale ? k_scales + t0 : nullptr, a.v.token_scale ? v_scales + t0 : nullptr,
                                offsets[r], logits + r * chunk, highest[r]);
            if (highest[r] != before && before != -INF) {
                float shrink = exp_of(before - highest[r]);
                sums[r] *= shrink;
                for (int64_t d = 0; d < v_padded; d++) values[r * v_padded + d] *= shrink;
            }
            sums[r] += sum;
        }

        with_format(a.v.format, [&](auto codec) {
            typedef decltype(codec) C;
            if constexpr (C::DIGITS)
                if (v_digits)
                    return accumulate_digits(logits, chunk, rows, ahead(a.v, true, v_rows, t0).blocks, count, v_dim,
                                             weight_digits, ahead(a.k, k_digits, k_rows, t0 + count), values, v_padded);
            auto codes = reinterpret_cast<const typename C::T* const*>(v_rows + t0);
            if (v_direct)
                return accumulate_rows<C>(logits, chunk, rows, codes, count, v_dim, values, v_padded, true);
            decode_tile<C>(codes, count, v_dim, v_tile, v_padded);
            accumulate_rows<Codec<FLOAT>>(logits, chunk, rows, v_tile_rows, count, v_padded, values, v_padded, false);
        });
    }
    return 0;
}

uint16_t bfloat_of(float x) {
    const uint32_t u = bits_of(x);
    return uint16_t((u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
uint16_t half_of(float x) {
    const uint32_t u = bits_of(x), magnitude = u & 0x7FFFFFFF, sign = u >> 16 & 0x8000;
    if (magnitude > 0x7F800000) return 0x7E00;
    if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);  // rounds to 65536
    if (magnitude < 0x38800000)                                   // denormal
        return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
    return uint16_t(sign | (((magnitude + 0xFFF + (magnitude >> 13 & 1)) >> 13) - (112 << 10)));
}
void store_numbers(char* output, int64_t index, int64_t format, const float* x, int64_t count) {
    if (format == FLOAT) {
        std::memcpy(output + index * 4, x, count * 4);
        return;
    }
    uint16_t* to = reinterpret_cast<uint16_t*>(output) + index;
    if (format == BFLOAT)
        for (int64_t i = 0; i < count; i++) to[i] = bfloat_of(x[i]);
    else
        for (int64_t i = 0; i < count; i++) to[i] = half_of(x[i]);
}

// The spans of a block put together, normalized, in the output. Span i has sums[i * stride + r] and so on; the values
// of span 0 are written over.
void finish(const Attention& a, const Block& block, int64_t h, const float* sums, const float* highest, float* values,
            int64_t stride) {
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
        float top = sink;
        for (int64_t i = 0; i < block.num_spans; i++) top = std::max(top, highest[i * stride + r]);
        if (top == -INF) top = 0.0f;
        float seen = 0.0f, *total = values + r * v_padded;
        for (int64_t i = 0; i < block.num_spans; i++) {
            const float weight = exp_of(highest[i * stride + r] - top), *part = total + i * stride * v_padded;
            seen += sums[i * stride + r] * weight;
            for (int64_t d = 0; d < v_padded; d++) total[d] = (i ? total[d] : 0.0f) + part[d] * weight;
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

    Block* blocks;
    std::atomic<int64_t>* unfinished;  // spans, of every block's heads
    Carver carver{nullptr};
    for (int pass = 0; pass < 2; pass++) {
        if (pass) carver = {block_space.of(carver.used)};
        blocks = carver.take<Block>(num_blocks);
        unfinished = carver.take<std::atomic<int64_t>>(num_blocks * num_heads);
    }
    int64_t num_items = 0, num_parts = 0, work = 0, index = 0;
    for (int64_t b = 0; b < a.tables.batch_size; b++)
        for (int64_t i = 0; i < row_blocks; i++, index++) {
            const int64_t first = i * rows_each, count = std::min(rows_each, rows - first);
            Interval seen{INT64_MAX, 0};
            for (int64_t t = first / group; t <= (first + count - 1) / group; t++) {
                const Interval one = seen_by(a, b, t);
                if (one.start < one.stop) seen = {std::min(seen.start, one.start), std::max(seen.stop, one.stop)};
            }
            if (seen.stop == 0) seen.start = 0;
            const bool in_blocks = takes_digits(a, a.k, count) && takes_digits(a, a.v, count);
            const int64_t hidden = in_blocks ? seen.start % BLOCK : 0;
            seen.start -= hidden;
            const int64_t length = seen.stop - seen.start;
            const int64_t span = span_of(length, few, num_blocks * num_heads);
            const int64_t num_spans = std::max<int64_t>((length + span - 1) / span, 1);
            blocks[index] = {b, first, count, seen.start, hidden, seen.stop, span, num_spans, num_items, num_parts};
            for (int64_t h = 0; h < num_heads; h++) unfinished[index * num_heads + h] = num_spans;
            num_items += num_heads * num_spans;
            num_parts += num_spans > 1 ? num_heads * num_spans : 0;
            work += num_heads * length * count * (a.k.dim + a.v.dim);
        }

    float *sums, *highest, *values;
    for (int pass = 0; pass < 2; pass++) {
        carver = {pass ? part_space.of(carver.used) : nullptr};
        sums = carver.take<float>(num_parts * rows_each);
        highest = carver.take<float>(num_parts * rows_each);
        values = carver.take<float>(num_parts * rows_each * v_padded);
    }
    std::atomic<int> failed{0};
    const int64_t num_threads = std::min(a.tables.num_threads, 1 + work / SMALL_ATTENTION);
    const int64_t num_each = few ? std::clamp<int64_t>(num_items / (8 * num_threads), 1, num_heads) : 1;
    in_parallel(num_items, num_each, num_threads, [&](int64_t item) {
        const Block* after = std::upper_bound(blocks, blocks + num_blocks, item,
                                              [](int64_t i, const Block& block) { return i < block.first_item; });
        const Block& block = after[-1];
        const int64_t span = (item - block.first_item) / num_heads, h = (item - block.first_item) % num_heads;
        const int64_t part = (block.first_part + h * block.num_spans) * rows_each, at = span * rows_each;
        float *block_sums = sums + part, *block_highest = highest + part, *block_values = values + part * v_padded;
        if (block.num_spans == 1) {
            static thread_local Workspace own_space;
            const int64_t each = round_up(rows_each, W);
            block_sums = reinterpret_cast<float*>(own_space.of((2 + v_padded) * each * sizeof(float)));
            block_highest = block_sums + each;
            block_values = block_highest + each;
        }
        if (attend(a, block, h, span, block_sums + at, block_highest + at, block_values + at * v_padded)) failed = 1;
        if (--unfinished[(&block - blocks) * num_heads + h] == 0 && !failed)
            finish(a, block, h, block_sums, block_highest, block_values, rows_each);
    });
    return failed;
}
