// A running softmax: what is seen of a head, and the weights of a chunk of tokens.
#pragma once

#include "digits.h"
#include "visible.h"

namespace {

// What one head's rows have seen of a span, in units of the largest weight. Parts share no line of a cache, as several
// threads write to them.
struct Part {
    float *values, *sums, *highest;  // [rows, v_padded], [rows], [rows]

    static int64_t size(int64_t rows, int64_t v_padded) { return round_up(rows * v_padded, 16) + 2 * round_up(rows, 16); }
    Part() = default;
    Part(float* start, int64_t rows, int64_t v_padded)
        : values(start), sums(start + round_up(rows * v_padded, 16)), highest(sums + round_up(rows, 16)) {}
};

// What an item keeps of one of its heads from chunk to chunk.
struct Head {
    int64_t index;
    float *query, *offsets;  // [rows, k_padded] in units of the codes; [rows]: what K's zero adds
    Digits digits;           // the query in digits,
    uint64_t* groups;        // or in pairs, which are not in those units
    float unit;              // but logits in this one
    Part part;
};

// Raw logits of N rows from `first` on, over tokens [start, start + count), become weights, and the rows' parts are put
// into units of the largest one until now. sizes[r] becomes the largest of a row's weights where digits are made of them,
// and NaN if there is one or an infinity.
template <int N>
void softmax(const Attention& a, const Block& block, const Head& head, int64_t first, const Interval* seen, int64_t start,
             int64_t count, const float* k_scales, const float* v_scales, float* logits, float* sizes) {
    const int64_t padded = round_up(count, W), v_padded = round_up(a.v.dim, W);
    float* highest = head.part.highest + first;
    int64_t low[N], high[N], from = padded, to = 0;
    f32 most[N];
    UNROLL for (int r = 0; r < N; r++) {
        low[r] = std::min(std::max(seen[first + r].start - start, int64_t(0)), count);
        high[r] = std::max(std::min(seen[first + r].stop - start, count), low[r]);
        from = std::min(from, low[r] / W * W);
        to = std::max(to, round_up(high[r], W));
        most[r] = splat(highest[r]);
    }
    for (int64_t i = from; i < to; i += W) {
        const f32 scale = k_scales ? load<f32>(k_scales + i) * head.unit : splat(head.unit);
        UNROLL for (int r = 0; r < N; r++) {
            float* at = logits + r * CHUNK + i;
            f32 x = load<f32>(at) * scale + head.offsets[first + r];
            if (a.softcap) x = float(a.softcap) * tanh_of(x / float(a.softcap));
            store(at, x);
            most[r] = larger(x, most[r]);
        }
    }
    f32 base[N];
    float shrink[N];
    UNROLL for (int r = 0; r < N; r++) {
        float* x = logits + r * CHUNK;
        if (a.mask) add_mask(a, block, head.index, block.first + first + r, start + low[r], high[r] - low[r], x + low[r]);
        std::fill(x, x + low[r], -INF);
        std::fill(x + high[r], x + padded, -INF);
        if (a.mask || from < low[r] || high[r] < to) {  // some of these are hidden
            most[r] = splat(highest[r]);
            for (int64_t i = from; i < to; i += W) most[r] = larger(load<f32>(x + i), most[r]);
        }
        const float was = highest[r];
        highest[r] = largest_of(most[r]);
        base[r] = splat(highest[r] == -INF ? 0.0f : highest[r]);
        shrink[r] = highest[r] != was && was != -INF ? exp_of(was - highest[r]) : 1.0f;
    }

    f32 sums[N] = {};
    u32 largest[N] = {};
    for (int64_t i = 0; i < padded; i += W) {
        const f32 scale = v_scales ? load<f32>(v_scales + i) : splat(1.0f);
        UNROLL for (int r = 0; r < N; r++) {
            float* at = logits + r * CHUNK + i;
            f32 weight = exp_of(load<f32>(at) - base[r]);
            sums[r] += weight;
            weight = weight * scale;
            if (HAS_DIGITS) largest[r] = (u32)weight > largest[r] ? (u32)weight : largest[r];
            store(at, weight);
        }
    }
    UNROLL for (int r = 0; r < N; r++) {
        float* values = head.part.values + (first + r) * v_padded;
        if (shrink[r] != 1.0f)
            for (int64_t d = 0; d < v_padded; d++) values[d] *= shrink[r];
        head.part.sums[first + r] = head.part.sums[first + r] * shrink[r] + sum_of(sums[r]);
        sizes[r] = size_of_weights(largest[r]);
    }
}

}  // namespace
