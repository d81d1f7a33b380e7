// Absolute maxima of every channel, from which scales are taken.
#pragma once

#include "formats.h"
#include "runtime.h"
#include "tables.h"

namespace {

constexpr int64_t SMALL_ABSMAX = 1 << 17;  // numbers that are worth one more thread

struct Absmax {
    Source x;
    int64_t format, batch_size, num_heads, num_tokens, dim;
    const uint8_t* valid;  // or null
    int64_t valid_batch, valid_token;  // strides
    float* out;                        // [num_heads, dim]
    int64_t num_threads;
};

// Tokens [first, last) of head h of sequence b, into `most`, whose entries are bits: as integers magnitudes are ordered.
template <class C>
void take_tokens(const Absmax& a, int64_t b, int64_t h, int64_t first, int64_t last, uint32_t* most) {
    const typename C::T* start = reinterpret_cast<const typename C::T*>(a.x.start) + b * a.x.batch + h * a.x.head;
    for (int64_t t = first; t < last; t++) {
        if (a.valid && !a.valid[b * a.valid_batch + t * a.valid_token]) continue;
        for (int64_t d = 0; d < a.dim; d += W) {
            u32 bits = (u32)read_some<C>(start + t * a.x.token + d, a.dim - d) & 0x7FFFFFFFu;
            bits = bits < 0x7F800000u ? bits : u32{};  // no number
            const u32 before = load<u32>(most + d);
            store(most + d, bits > before ? bits : before);
        }
    }
}

}  // namespace

extern "C" int64_t hf_kvquant_channel_absmax(const Absmax* arguments) {
    constexpr int64_t PIECE = 256;  // tokens of an item
    static thread_local Workspace workspace;
    const Absmax& a = *arguments;
    const int64_t pieces = (a.num_tokens + PIECE - 1) / PIECE, padded = round_up(a.dim, W);
    const int64_t each = a.batch_size * pieces, items = a.num_heads * each;
    uint32_t* parts = reinterpret_cast<uint32_t*>(workspace.of(items * padded * sizeof(uint32_t)));
    const int64_t work = a.batch_size * a.num_heads * a.num_tokens * a.dim;
    in_parallel(items, std::min(a.num_threads, 1 + work / SMALL_ABSMAX), [&](int64_t item) {
        const int64_t h = item / each, b = item % each / pieces, first = item % pieces * PIECE;
        uint32_t* most = parts + item * padded;
        std::fill(most, most + padded, 0u);
        with_format(a.format, [&](auto codec) {
            typedef decltype(codec) C;
            if constexpr (sizeof(typename C::T) > 1)
                take_tokens<C>(a, b, h, first, std::min(first + PIECE, a.num_tokens), most);
        });
    });
    for (int64_t h = 0; h < a.num_heads; h++)
        for (int64_t d = 0; d < a.dim; d++) {
            uint32_t most = 0;
            for (int64_t i = 0; i < each; i++) most = std::max(most, parts[(h * each + i) * padded + d]);
            a.out[h * a.dim + d] = float_of(most);
        }
    return 0;
}
