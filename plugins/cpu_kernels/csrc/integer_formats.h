// The packings of core.layers.quant_formats and GGML's blocks, as integer.h wants them: unsigned bytes of W rows side by
// side, with a scale and an offset for a piece. What the blocks mean is written in ggml.h.
#pragma once

#include "integer.h"
#include "panels.h"

namespace core_kernels { namespace {

// The bytes of the W rows that come next, asked for a little at a time while these are decoded.
struct NextRows {
    const uint8_t *at, *end;
    int64_t lines;

    // `units`: how often `ask` will be called for columns [from, to) of a row
    NextRows(const Weight& weight, int64_t n, int64_t from, int64_t to, int64_t units) {
        const uint8_t* next = weight.codes + (n + W) * weight.row_bytes;
        const int64_t bytes = n + 2 * W <= weight.out ? W * weight.row_bytes : 0;
        at = next + bytes * from / weight.in, end = next + bytes * to / weight.in;
        lines = ((end - at) / 64 + units) / units;
    }
    INLINE void ask() {
        for (int64_t i = 0; i < lines && at < end; i++, at += 64) __builtin_prefetch(at);
    }
};

// Four neighbouring codes of 4 bits for each half of the bytes of a word.
INLINE void store_nibbles(uint8_t* low, uint8_t* high, VI words) {
    store_codes(low, mask(words, 0x0f0f0f0f));
    store_codes(high, mask(shift_right<4>(words), 0x0f0f0f0f));
}

// ---------------------------------------------------------------------------------------------------- groups

// 4 or 8 bit codes one after the other; PIECE_ columns at a time, which divide a group.
template <int BITS, int PIECE_> struct AffineRows {
    static constexpr int PIECE = PIECE_, MIDDLE = -1;
    static constexpr bool PAIRED = BITS == 4;

    const Weight& weight;
    int64_t groups;

    explicit AffineRows(const Plan& plan) : weight(plan.weight), groups(weight.in / weight.group) {}

    // Scales [first, last) of W rows, a vector for each group.
    void turn(const void* base, int32_t type, int64_t n, int64_t g, int64_t count, float* to) const {
        float found[W * W];
        for (int r = 0; r < W; r++) store(found + r * W, load_scales(base, (n + r) * groups + g, int(count), type));
        float turned[W * W];
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

// ---------------------------------------------------------------------------------------------------- GGML: blocks of 32

// Blocks of SIZE bytes for COLUMNS_OF_BLOCK columns, one after the other.
template <class Block, int SIZE, int COLUMNS_OF_BLOCK> struct BlockRows {
    const Weight& weight;

    explicit BlockRows(const Plan& plan) : weight(plan.weight) {}

    void decode(int64_t n, int64_t from, int64_t to, const Decoded& decoded) const {
        const uint8_t* at = weight.codes + n * weight.row_bytes + from / COLUMNS_OF_BLOCK * SIZE;
        const int64_t blocks = (to - from) / COLUMNS_OF_BLOCK;
        NextRows next(weight, n, from, to, blocks);
        for (int64_t b = 0; b < blocks;) {
            next.ask();
            const int64_t scale = b * (COLUMNS_OF_BLOCK / Block::PIECE) * W;
            b += Block::blocks(at + b * SIZE, weight.row_bytes, blocks - b, decoded.codes + b * COLUMNS_OF_BLOCK * W, decoded.scales + scale, decoded.offsets + scale);
        }
    }
};

// d, 16 bytes: d * (code - 8).
struct Q40Rows : BlockRows<Q40Rows, 18, 32> {
    static constexpr int PIECE = 32, MIDDLE = 8;
    static constexpr bool PAIRED = false;
    using BlockRows::BlockRows;

    static INLINE int64_t blocks(const uint8_t* at, int64_t stride, int64_t, uint8_t* codes, float* scales, float*) {
        VI words[4];
        load_turned(at + 2, stride, words);
        for (int t = 0; t < 4; t++) store_nibbles(codes + 4 * t * W, codes + (16 + 4 * t) * W, words[t]);
        store(scales, low_halves(load_word_turned(at, stride)));
        return 1;
    }
};

// d, m, 16 bytes: d * code + m. Four blocks are five loads of 16 bytes.
struct Q41Rows : BlockRows<Q41Rows, 20, 32> {
    static constexpr int PIECE = 32, MIDDLE = -1;
    static constexpr bool PAIRED = false;
    using BlockRows::BlockRows;

    static INLINE void one(const VI* words, uint8_t* codes, float* scales, float* offsets) {
        store(scales, low_halves(words[0]));
        store(offsets, high_halves(words[0]));
        for (int t = 0; t < 4; t++) store_nibbles(codes + 4 * t * W, codes + (16 + 4 * t) * W, words[1 + t]);
    }
    static INLINE int64_t blocks(const uint8_t* at, int64_t stride, int64_t left, uint8_t* codes, float* scales, float* offsets) {
        VI words[20];
        if (left < 4) {
            words[0] = load_word_turned(at, stride);
            load_turned(at + 4, stride, words + 1);
            one(words, codes, scales, offsets);
            return 1;
        }
        unrolled<5>([&](auto i) { load_turned(at + 16 * i, stride, words + 4 * i); });
        unrolled<4>([&](auto b) { one(words + 5 * b, codes + 32 * b * W, scales + b * W, offsets + b * W); });
        return 4;
    }
};

// d, 32 signed bytes: d * byte.
struct Q8Rows : BlockRows<Q8Rows, 34, 32> {
    static constexpr int PIECE = 32, MIDDLE = 128;
    static constexpr bool PAIRED = false;
    using BlockRows::BlockRows;

    static INLINE int64_t blocks(const uint8_t* at, int64_t stride, int64_t, uint8_t* codes, float* scales, float*) {
        unrolled<2>([&](auto half) {
            VI words[4];
            load_turned(at + 2 + 16 * half, stride, words);
            for (int t = 0; t < 4; t++) store_codes(codes + (16 * half + 4 * t) * W, flip(words[t], int(0x80808080)));
        });
        store(scales, low_halves(load_word_turned(at, stride)));
        return 1;
    }
};

// ---------------------------------------------------------------------------------------------------- which is which

template <class Rows> const Packing* integer_packing() {
    static const Packing found = {setup_integer<Rows>, prepare_integer<Rows>, multiply_integer<Rows>, no_sum_floats};
    return &found;
}

template <int BITS> const Packing* affine_integer(const Weight& weight) {
    if (weight.group % 128 == 0) return integer_packing<AffineRows<BITS, 128>>();
    if (weight.group % 64 == 0) return integer_packing<AffineRows<BITS, 64>>();
    if (weight.group % 32 == 0) return integer_packing<AffineRows<BITS, 32>>();
    return nullptr;
}

// For a weight that its packing for floats accepts; null: there is none.
inline const Packing* find_integer(const Weight& weight) {
    switch (weight.packing) {
        case AFFINE4: return affine_integer<4>(weight);
        case AFFINE8: return affine_integer<8>(weight);
        case Q4_0: return integer_packing<Q40Rows>();
        case Q4_1: return integer_packing<Q41Rows>();
        case Q8_0: return integer_packing<Q8Rows>();
    }
    return nullptr;
}

}}  // namespace core_kernels
