// The spans of a block put together.
#pragma once

#include "softmax.h"

namespace {

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
