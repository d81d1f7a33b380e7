// Attention works on the G query heads of a key/value head together: row t * G + g is token t of head g. An item of
// work (item.h) is some rows of some heads over a span of tokens; then the spans are put together (merge.h).
// Scales and zeros of K go into the query and V's into the output, token scales into logits and weights. Spans do not
// depend on the number of threads, so neither does the result.
#pragma once

#include "item.h"
#include "merge.h"
#include "runtime.h"
#include "visible.h"
#include "ways.h"

namespace {

// Rows of an item when there are many. Large blocks read K and V less often; small ones lose less at the edge of what is
// seen, and there are enough of them for many cores.
constexpr int ROW_BLOCK = 128, LARGE_BLOCK = 512, FEWEST_LARGE_BLOCKS = 16;
constexpr int64_t SMALL_ATTENTION = 1 << 18;  // multiply-adds that are worth one more thread

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
