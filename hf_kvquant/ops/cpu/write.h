// Quantizing new tokens into their slots.
#pragma once

#include "formats.h"
#include "runtime.h"
#include "tables.h"

namespace {

constexpr int64_t SMALL_WRITE = 1 << 15;  // numbers that are worth one more thread

struct Write {
    Side k, v;
    Tables tables;
    Source key, value;
    int64_t format, num_tokens;  // of key and value
    int64_t* clipped;
};

// The bits of float8: `BIAS` is the difference of the exponents' biases, `MANTISSA` bits are kept.
template <int BIAS, int MANTISSA>
INLINE uint8_t float8_of(float x, float qmax) {
    constexpr int dropped = 23 - MANTISSA;
    uint32_t u = bits_of(x), magnitude = u & 0x7FFFFFFF, sign = u >> 24 & 0x80;
    uint32_t clamped = std::min(magnitude, bits_of(qmax));
    uint32_t normal = ((clamped + (1u << (dropped - 1)) - 1 + (clamped >> dropped & 1)) >> dropped) -
                      (uint32_t(BIAS) << MANTISSA);
    // Adding a number whose last bit is worth a denormal's rounds to one.
    const float unit = float_of(uint32_t(BIAS + 1 + dropped) << 23);
    uint32_t denormal = bits_of(float_of(clamped) + unit) - bits_of(unit);
    uint32_t code = (clamped < uint32_t(BIAS + 1) << 23 ? denormal : normal) | sign;
    return uint8_t(magnitude > 0x7F800000 ? 0x7F : code);
}
INLINE uint8_t int8_of(float x) {
    float clamped = x < -127.0f ? -127.0f : x > 127.0f ? 127.0f : x;
    uint32_t code = bits_of(clamped + 12582912.0f) - 0x4B400000 + 128;  // rounds to an integer in the low bits
    return uint8_t((bits_of(x) & 0x7FFFFFFF) > 0x7F800000 ? 0 : code);
}

struct Encoding {
    float reciprocal_qmax, clip_limit;
};
Encoding encoding_of(int64_t format) {
    if (format == E4M3) return {float(1.0 / 448.0), 464.0f};
    if (format == E5M2) return {float(1.0 / 57344.0), 61440.0f};
    return {float(1.0 / 127.0), 127.5f};
}

// Token t of head h, from `y` in units of the codes, to its slot. Every multiplication is rounded on its own: they
// decide the bytes.
int64_t encode(const Side& side, float* y, int64_t slot) {
    const int64_t dim = side.dim;
    const Encoding encoding = encoding_of(side.format);
    int64_t num_clipped = 0;
    if (side.token_scale) {
        uint32_t most = 0;  // as integers magnitudes are ordered, NaN above all
        for (int64_t d = 0; d < dim; d++) most = std::max(most, bits_of(y[d]) & 0x7FFFFFFF);
        float scale = float_of(most) * encoding.reciprocal_qmax;
        scale = scale < 0x1p-100f ? 0x1p-100f : scale;
        uint32_t up = most >= 0x7F800000 ? 0x7FC00000 : (bits_of(scale) + 0xFFFF) & 0xFFFF0000;
        side.token_scale[slot] = uint16_t(up >> 16);
        const float reciprocal = 1.0f / float_of(up);
        for (int64_t d = 0; d < dim; d++) y[d] = y[d] * reciprocal;
    } else {
        int32_t count = 0;
        for (int64_t d = 0; d < dim; d++) count += !(std::fabs(y[d]) <= encoding.clip_limit);
        num_clipped = count;
    }
    uint8_t* codes = reinterpret_cast<uint8_t*>(side.pages) + slot * dim;
    if (side.format == E4M3)
        for (int64_t d = 0; d < dim; d++) codes[d] = float8_of<120, 3>(y[d], 448.0f);
    else if (side.format == E5M2)
        for (int64_t d = 0; d < dim; d++) codes[d] = float8_of<112, 2>(y[d], 57344.0f);
    else
        for (int64_t d = 0; d < dim; d++) codes[d] = int8_of(y[d]);
    return num_clipped;
}

// Tokens [first, last) of one head of K or V.
int write_tokens(const Write& w, const Side& side, const Source& source, int64_t b, int64_t h, int64_t first,
                 int64_t last, int64_t& num_clipped) {
    static thread_local Workspace workspace;
    const int64_t dim = side.dim, padded = round_up(dim, W), size = size_of(w.format);
    Carver carver{workspace.of(4 * (padded * sizeof(float) + 64))};
    float* y = carver.take<float>(padded);
    float *reciprocals = carver.take<float>(padded), *zeros = carver.take<float>(padded);
    char* gathered = carver.take<char>(padded * 4);
    side.scales_of(h, reciprocals);
    side.zeros_of(h, zeros);
    if (side.scale)
        for (int64_t d = 0; d < dim; d++) reciprocals[d] = 1.0f / reciprocals[d];
    for (int64_t t = first; t < last; t++) {
        const int64_t slot = w.tables.slot(b, h, w.tables.seq_lens[b] - w.num_tokens + t);
        if (slot < 0) return 1;
        const char* from = source.start + (b * source.batch + h * source.head + t * source.token) * size;
        if (source.channel != 1) {
            for (int64_t d = 0; d < dim; d++) std::memcpy(gathered + d * size, from + d * source.channel * size, size);
            from = gathered;
        }
        if (side.format >= FLOAT) {
            std::memcpy(side.pages + slot * dim * size, from, dim * size);
            continue;
        }
        with_format(w.format, [&](auto codec) {
            typedef decltype(codec) C;
            if constexpr (sizeof(typename C::T) > 1)
                for (int64_t d = 0; d < dim; d += W)
                    store(y + d, read_some<C>(reinterpret_cast<const typename C::T*>(from) + d, dim - d));
        });
        if (side.zero)
            for (int64_t d = 0; d < dim; d++) y[d] = y[d] - zeros[d];
        if (side.scale)
            for (int64_t d = 0; d < dim; d++) y[d] = y[d] * reciprocals[d];
        num_clipped += encode(side, y, slot);
    }
    return 0;
}

}  // namespace

// Returns 0, or 1 if the page table names a page that the pool does not have.
extern "C" int64_t hf_kvquant_write_kv(const Write* w) {
    constexpr int64_t PIECE = 32;  // tokens of an item
    const int64_t pieces = (w->num_tokens + PIECE - 1) / PIECE, heads = w->tables.num_heads;
    const int64_t per_side = w->tables.batch_size * heads * pieces;
    std::atomic<int64_t> num_clipped[2] = {{0}, {0}};
    std::atomic<int> failed{0};
    const int64_t work = w->tables.batch_size * heads * w->num_tokens * (w->k.dim + w->v.dim);
    in_parallel(2 * per_side, std::min(w->tables.num_threads, 1 + work / SMALL_WRITE), [&](int64_t item) {
        const int64_t side = item / per_side, rest = item % per_side, first = rest % pieces * PIECE;
        int64_t count = 0;
        if (write_tokens(*w, side ? w->v : w->k, side ? w->value : w->key, rest / pieces / heads, rest / pieces % heads,
                         first, std::min(first + PIECE, w->num_tokens), count))
            failed = 1;
        num_clipped[side] += count;
    });
    if (w->clipped)
        for (int side = 0; side < 2; side++) w->clipped[side] += num_clipped[side];
    return failed;
}
