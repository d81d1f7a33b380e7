// Pages as dense numbers.
#pragma once

#include <type_traits>

#include "formats.h"
#include "rows.h"
#include "runtime.h"
#include "tables.h"

namespace {

constexpr int64_t SMALL_READ = 1 << 15;  // numbers that are worth one more thread

struct Read {
    Side side;
    const int64_t* page_ids;  // [batch_size, num_columns]
    int64_t batch_size, num_columns, num_pages, num_heads, page_size, num_threads;
    char* output;  // [batch_size, num_heads, num_columns * page_size, dim]
    int64_t format;
};

// Of a head: its scales and zeros, 1 and 0 where there are none; with room for a multiple of W.
struct HeadScales {
    const float *scales, *zeros;
};

// W numbers from what was read. Every product and sum is rounded on its own, as the reference has it.
template <bool CLAMPED, bool ZERO>
INLINE f32 number_of(f32 x, float token_scale, const HeadScales& head, int64_t d) {
    x = x * token_scale * load<f32>(head.scales + d);
    if (ZERO) x = rounded_apart(x) + load<f32>(head.zeros + d);
    // fp16 ends where activations may be, and with scales rounded up its largest numbers come back larger.
    if (CLAMPED) x = x > 65504.0f ? splat(65504.0f) : x < -65504.0f ? splat(-65504.0f) : x;
    return x;
}

// Tokens of one head of a page, from `slot` on, into the output from number `target` on.
template <class In, class Out, bool ZERO>
void read_tokens(const Read& r, int64_t slot, const HeadScales head, int64_t target) {
    constexpr bool CLAMPED = sizeof(typename In::T) == 1 && std::is_same<Out, Codec<HALF>>::value;
    const int64_t dim = r.side.dim;
    const typename In::T* row = reinterpret_cast<const typename In::T*>(r.side.pages) + slot * dim;
    typename Out::T* to = reinterpret_cast<typename Out::T*>(r.output) + target;
    const uint16_t* token_scales = r.side.token_scale;
    for (int64_t t = 0, count = r.page_size; t < count; t++, row += dim, to += dim) {
        const float token_scale = token_scales ? bfloat_number(token_scales[slot + t]) : 1.0f;
        int64_t d = 0;
        for (; d + In::STEP * W <= dim; d += In::STEP * W) {
            f32 x[In::STEP];
            if constexpr (In::STEP > 1)
                In::read_step(row + d, x);
            else
                x[0] = In::read(row + d);
            UNROLL for (int i = 0; i < In::STEP; i++)
                Out::write(to + d + i * W,
                           number_of<CLAMPED, ZERO>(x[i] * In::factor, token_scale, head, d + i * W));
        }
        for (; d < dim; d += W) {
            const f32 x = read_some<In>(row + d, dim - d) * In::factor;
            write_some<Out>(to + d, number_of<CLAMPED, ZERO>(x, token_scale, head, d), dim - d);
        }
    }
}

void read_page(const Read& r, int64_t slot, const HeadScales& head, int64_t target) {
    if (r.side.format == r.format) {
        const int64_t row_size = r.side.row_size();
        std::memcpy(r.output + target * size_of(r.format), r.side.pages + slot * row_size, r.page_size * row_size);
        return;
    }
    with_format(r.side.format, [&](auto in) {
        with_format(r.format, [&](auto out) {
            typedef decltype(in) In;
            typedef decltype(out) Out;
            if constexpr (sizeof(typename Out::T) > 1) {
                if (r.side.zero)
                    read_tokens<In, Out, true>(r, slot, head, target);
                else
                    read_tokens<In, Out, false>(r, slot, head, target);
            }
        });
    });
}

}  // namespace

// Returns 0, or 1 if a page is named that the pool does not have.
extern "C" int64_t hf_kvquant_read_pages(const Read* arguments) {
    const Read& r = *arguments;
    const int64_t dim = r.side.dim, padded = round_up(dim, W), numbers = r.page_size * dim;  // of a head of a page
    const int64_t piece = std::max<int64_t>(1, SMALL_READ / std::max<int64_t>(1, numbers));  // pages of an item
    const int64_t pieces = (r.num_columns + piece - 1) / piece, heads = r.batch_size * r.num_heads;
    std::atomic<int> failed{0};
    const int64_t threads = std::min(r.num_threads, 1 + heads * r.num_columns * numbers / SMALL_READ);
    in_parallel(heads * pieces, threads, [&](int64_t item) {
        static thread_local Workspace workspace;
        Carver carver{workspace.of(2 * (padded * sizeof(float) + 64))};
        float *scales = carver.take<float>(padded), *zeros = carver.take<float>(padded);
        const int64_t head = item / pieces, b = head / r.num_heads, h = head % r.num_heads;
        r.side.scales_of(h, scales);
        r.side.zeros_of(h, zeros);
        const int64_t first = item % pieces * piece;
        for (int64_t column = first; column < std::min(first + piece, r.num_columns); column++) {
            const int64_t page = r.page_ids[b * r.num_columns + column];
            if (page < 0 || page >= r.num_pages) {
                failed = 1;
                return;
            }
            read_page(r, (page * r.num_heads + h) * r.page_size, {scales, zeros},
                      (head * r.num_columns + column) * numbers);
        }
    });
    return failed;
}
