// The packings of core.layers.quant_formats, as integer.h wants them.
#pragma once

#include "integer.h"
#include "panels.h"

namespace core_kernels { namespace {

// 4 or 8 bit codes one after the other; PIECE_ columns at a time, which divide a group.
template <int BITS, int PIECE_> struct AffineRows {
    static constexpr int PIECE = PIECE_, MIDDLE = -1;
    static constexpr bool PAIRED = BITS == 4;

    const Weight& weight;
    int64_t groups;

    explicit AffineRows(const Plan& plan) : weight(plan.weight), groups(weight.in / weight.group) {}

    // Numbers of groups [g, g + count) of W rows, a vector for each group; at most W.
    void turn(const void* base, int32_t type, int64_t n, int64_t g, int64_t count, float* to) const {
        const int64_t size = type == UINT8 ? 1 : type == FLOAT32 ? 4 : 2, stride = groups * size, bytes = (count * size + 15) / 16 * 16;
        const uint8_t* at = static_cast<const uint8_t*>(base) + n * stride + g * size;
        if (at + (W - 1) * stride + bytes > static_cast<const uint8_t*>(base) + weight.out * stride) return turn_last(base, type, n, g, count, to);
        for (int64_t i = 0; i < count; i += 16 / size, at += 16) {
            VI words[4];
            load_turned(at, stride, words);
            if (type == UINT8) turn_words<4>(words, count - i, to + i * W, [](VI word, auto j) { return to_float(byte_of<j>(word)); });
            else if (type == FLOAT16) turn_words<2>(words, count - i, to + i * W, [](VI word, auto j) { return j ? high_halves(word) : low_halves(word); });
            else if (type == BFLOAT16) turn_words<2>(words, count - i, to + i * W, [](VI word, auto j) { return as_floats(j ? mask(word, int(0xffff0000)) : shift_left<16>(word)); });
            else turn_words<1>(words, count - i, to + i * W, [](VI word, auto) { return as_floats(word); });
        }
    }
    // `count` numbers of four words that have EACH of them; number j of a word is get(word, j).
    template <int EACH, class Get> static INLINE void turn_words(const VI* words, int64_t count, float* to, const Get& get) {
        unrolled<4 * EACH>([&](auto i) {
            if (i < count) store(to + i * W, get(words[i / EACH], std::integral_constant<int, i % EACH>{}));
        });
    }
    // The same where whole words would reach beyond the last number.
    void turn_last(const void* base, int32_t type, int64_t n, int64_t g, int64_t count, float* to) const {
        float found[W * W], turned[W * W];
        for (int r = 0; r < W; r++) store(found + r * W, load_scales(base, (n + r) * groups + g, int(count), type));
        transpose(found, turned, W);
        memcpy(to, turned, size_t(count) * W * sizeof(float));
    }
    // Of pieces [from, to): a group has several.
    void scales(int64_t n, int64_t from, int64_t to, const Decoded& decoded) const {
        const int64_t per_group = weight.group / PIECE;
        for (int64_t g = from / per_group; g * per_group < to; g += W) {
            const int64_t count = std::min<int64_t>(W, (to + per_group - 1) / per_group - g);
            float scale[W * W], offset[W * W];
            turn(weight.scales, weight.scale_type, n, g, count, scale);
            if (weight.extra_type != NONE) turn(weight.extra, weight.extra_type, n, g, count, offset);
            for (int64_t i = 0; i < count; i++) {
                const VF one = load(scale + i * W);
                VF other = set1(float(1 << (BITS - 1)));
                if (weight.extra_type != NONE) other = load(offset + i * W);
                if (weight.extra_type == NONE || weight.extra_type == UINT8) other = negate(mul(other, one));
                const int64_t first = std::max(from, (g + i) * per_group), last = std::min(to, (g + i + 1) * per_group);
                for (int64_t piece = first - from; piece < last - from; piece++) {
                    store(decoded.scales + piece * W, one);
                    store(decoded.offsets + piece * W, other);
                }
            }
        }
    }
    void decode(int64_t n, int64_t from, int64_t to, const Decoded& decoded) const {
        scales(n, from / PIECE, to / PIECE, decoded);
        constexpr int COLUMNS_OF_LOAD = 128 / BITS;
        const uint8_t* at = weight.codes + n * weight.row_bytes + from * BITS / 8;
        NextRows next(weight, n, from, to, (to - from) / COLUMNS_OF_LOAD);
        uint8_t* codes = decoded.codes;
        for (int64_t k = from; k < to; k += COLUMNS_OF_LOAD, at += 16, codes += COLUMNS_OF_LOAD * W) {
            next.ask();
            VI words[4];
            load_turned(at, weight.row_bytes, words);
            for (int t = 0; t < 4; t++) {
                if constexpr (BITS == 4) store_nibbles(codes + 8 * t * W, codes + (8 * t + 4) * W, words[t]);
                else store_codes(codes + 4 * t * W, words[t]);
            }
        }
    }
};

}}  // namespace core_kernels
