// GGML's blocks of 32 and of 256 columns, as integer.h wants them. What a block means is written in ggml.h; here its words of
// 4 bytes are turned, so that a vector holds the same word of W rows, and all of them are decoded at once.
#pragma once

#include "integer.h"

namespace core_kernels { namespace {

// Blocks of SIZE bytes for COLUMNS_OF_BLOCK columns, one after the other. Block::blocks decodes one or more, of `left`, and
// returns how many.
template <class Block, int SIZE, int COLUMNS_OF_BLOCK> struct BlockRows {
    static constexpr bool PAIRED = false;
    const Weight& weight;

    explicit BlockRows(const Plan& plan) : weight(plan.weight) {}

    void decode(int64_t n, int64_t from, int64_t to, const Decoded& decoded) const {
        const uint8_t* at = weight.codes + n * weight.row_bytes + from / COLUMNS_OF_BLOCK * SIZE;
        const int64_t blocks = (to - from) / COLUMNS_OF_BLOCK;
        NextRows next(weight, n, from, to, blocks);
        for (int64_t b = 0; b < blocks;) {
            const int64_t scale = b * (COLUMNS_OF_BLOCK / Block::PIECE) * W;
            const int64_t done = Block::blocks(at + b * SIZE, weight.row_bytes, blocks - b, decoded.codes + b * COLUMNS_OF_BLOCK * W, decoded.scales + scale, decoded.offsets + scale);
            for (const int64_t end = b + done; b < end; b++) next.ask();
        }
    }
};

template <int BYTE> INLINE VF signed_byte_of(VI words) { return to_float(shift_signed<24>(shift_left<24 - 8 * BYTE>(words))); }
template <int BITS> INLINE VI bits_at_four(VI bytes, int bits) { return shift_left<4>(mask(shift_right<BITS>(bytes), bits * 0x01010101)); }

// The values of IQ4's codes, and 128.
INLINE void store_values(uint8_t* low, uint8_t* high, VI words) {
    alignas(16) static constexpr uint8_t values[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
    store_codes(low, look_up_bytes(values, mask(words, 0x0f0f0f0f)));
    store_codes(high, look_up_bytes(values, mask(shift_right<4>(words), 0x0f0f0f0f)));
}

// ---------------------------------------------------------------------------------------------------- blocks of 32

// d, 16 bytes: d * (code - 8), or d * value of the code.
template <bool TABLE> struct Nibble0Rows : BlockRows<Nibble0Rows<TABLE>, 18, 32> {
    static constexpr int PIECE = 32, MIDDLE = TABLE ? 128 : 8;
    using Nibble0Rows::BlockRows::BlockRows;

    static INLINE int64_t blocks(const uint8_t* at, int64_t stride, int64_t, uint8_t* codes, float* scales, float*) {
        VI words[4];
        load_turned(at + 2, stride, words);
        unrolled<4>([&](auto t) {
            if constexpr (TABLE) store_values(codes + 4 * t * W, codes + (16 + 4 * t) * W, words[t]);
            else store_nibbles(codes + 4 * t * W, codes + (16 + 4 * t) * W, words[t]);
        });
        store(scales, low_halves(load_word_turned(at, stride)));
        return 1;
    }
};

// d, m, 16 bytes: d * code + m. Four blocks are five loads of 16 bytes.
struct Q41Rows : BlockRows<Q41Rows, 20, 32> {
    static constexpr int PIECE = 32, MIDDLE = -1;
    using BlockRows::BlockRows;

    static INLINE void one(const VI* words, uint8_t* codes, float* scales, float* offsets) {
        store(scales, low_halves(words[0]));
        store(offsets, high_halves(words[0]));
        unrolled<4>([&](auto t) { store_nibbles(codes + 4 * t * W, codes + (16 + 4 * t) * W, words[1 + t]); });
    }
    static INLINE int64_t blocks(const uint8_t* at, int64_t stride, int64_t left, uint8_t* codes, float* scales, float* offsets) {
        VI words[20];
        if (W < 16 || left < 4) {  // 20 vectors of words want more than 16 registers
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

// d, [m,] 32 fifth bits, 16 bytes: d * (code - 16), or d * code + m.
template <bool MIN> struct Q5Rows : BlockRows<Q5Rows<MIN>, MIN ? 24 : 22, 32> {
    static constexpr int PIECE = 32, MIDDLE = MIN ? -1 : 16;
    using Q5Rows::BlockRows::BlockRows;

    static INLINE int64_t blocks(const uint8_t* at, int64_t stride, int64_t, uint8_t* codes, float* scales, float* offsets) {
        constexpr int HEAD = MIN ? 4 : 2;
        VI words[4];
        const VI head = load_word_turned(at, stride), fifth = load_word_turned(at + HEAD, stride);
        load_turned(at + HEAD + 4, stride, words);
        unrolled<4>([&](auto t) {
            store_codes(codes + 4 * t * W, either(mask(words[t], 0x0f0f0f0f), sixteens(shift_right<4 * t>(fifth))));
            store_codes(codes + (16 + 4 * t) * W, either(mask(shift_right<4>(words[t]), 0x0f0f0f0f), sixteens(shift_right<16 + 4 * t>(fifth))));
        });
        store(scales, low_halves(head));
        if constexpr (MIN) store(offsets, high_halves(head));
        return 1;
    }
};

// d, 32 signed bytes: d * byte.
struct Q8Rows : BlockRows<Q8Rows, 34, 32> {
    static constexpr int PIECE = 32, MIDDLE = 128;
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

// ---------------------------------------------------------------------------------------------------- blocks of 256

INLINE void load_32_turned(const uint8_t* at, int64_t stride, VI* eight) {
    load_turned(at, stride, eight);
    load_turned(at + 16, stride, eight + 4);
}

// d, dmin, 12 bytes of 6-bit scales and mins, [32 bytes of fifth bits,] 128 bytes: d * scale * code - dmin * min.
template <bool FIVE> struct Q45KRows : BlockRows<Q45KRows<FIVE>, FIVE ? 176 : 144, 256> {
    static constexpr int PIECE = 32, MIDDLE = -1;
    using Q45KRows::BlockRows::BlockRows;

    static INLINE int64_t blocks(const uint8_t* at, int64_t stride, int64_t, uint8_t* codes, float* scales, float* offsets) {
        VI head[4];
        load_turned(at, stride, head);
        const VF d = low_halves(head[0]), dmin = negate(high_halves(head[0]));
        const VI scale[2] = {mask(head[1], 0x3f3f3f3f), either(mask(head[3], 0x0f0f0f0f), bits_at_four<6>(head[1], 3))};
        const VI min[2] = {mask(head[2], 0x3f3f3f3f), either(mask(shift_right<4>(head[3]), 0x0f0f0f0f), bits_at_four<6>(head[2], 3))};
        unrolled<8>([&](auto g) {
            store(scales + g * W, mul(d, to_float(byte_of<g % 4>(scale[g / 4]))));
            store(offsets + g * W, mul(dmin, to_float(byte_of<g % 4>(min[g / 4]))));
        });
        VI fifth[8];
        if constexpr (FIVE) load_32_turned(at + 16, stride, fifth);
        unrolled<4>([&](auto p) {
            VI words[8];
            load_32_turned(at + (FIVE ? 48 : 16) + 32 * p, stride, words);
            unrolled<8>([&](auto t) {
                VI low = mask(words[t], 0x0f0f0f0f), high = mask(shift_right<4>(words[t]), 0x0f0f0f0f);
                if constexpr (FIVE) low = either(low, bits_at_four<2 * p>(fifth[t], 1)), high = either(high, bits_at_four<2 * p + 1>(fifth[t], 1));
                store_codes(codes + (64 * p + 4 * t) * W, low);
                store_codes(codes + (64 * p + 32 + 4 * t) * W, high);
            });
        });
        return 1;
    }
};

// 128 bytes of low halves, 64 bytes of high bits, 16 signed scales, d: d * scale * (code - 32).
struct Q6KRows : BlockRows<Q6KRows, 210, 256> {
    static constexpr int PIECE = 16, MIDDLE = 32;
    using BlockRows::BlockRows;

    static INLINE int64_t blocks(const uint8_t* at, int64_t stride, int64_t, uint8_t* codes, float* scales, float*) {
        const VF d = high_halves(load_word_turned(at + 206, stride));
        VI scale[4];
        load_turned(at + 192, stride, scale);
        unrolled<16>([&](auto g) { store(scales + g * W, mul(d, signed_byte_of<g % 4>(scale[g / 4]))); });
        for (int p = 0; p < 2; p++) {
            VI first[8], second[8], high[8];
            load_32_turned(at + 64 * p, stride, first);
            load_32_turned(at + 64 * p + 32, stride, second);
            load_32_turned(at + 128 + 32 * p, stride, high);
            uint8_t* to = codes + 128 * p * W;
            unrolled<8>([&](auto t) {
                store_codes(to + 4 * t * W, either(mask(first[t], 0x0f0f0f0f), bits_at_four<0>(high[t], 3)));
                store_codes(to + (32 + 4 * t) * W, either(mask(second[t], 0x0f0f0f0f), bits_at_four<2>(high[t], 3)));
                store_codes(to + (64 + 4 * t) * W, either(mask(shift_right<4>(first[t]), 0x0f0f0f0f), bits_at_four<4>(high[t], 3)));
                store_codes(to + (96 + 4 * t) * W, either(mask(shift_right<4>(second[t]), 0x0f0f0f0f), bits_at_four<6>(high[t], 3)));
            });
        }
        return 1;
    }
};

// 16 bytes of scale (low) and min (high), 64 bytes of 2-bit codes, d, dmin: d * scale * code - dmin * min.
struct Q2KRows : BlockRows<Q2KRows, 84, 256> {
    static constexpr int PIECE = 16, MIDDLE = -1;
    using BlockRows::BlockRows;

    static INLINE int64_t blocks(const uint8_t* at, int64_t stride, int64_t, uint8_t* codes, float* scales, float* offsets) {
        const VI both = load_word_turned(at + 80, stride);
        const VF d = low_halves(both), dmin = negate(high_halves(both));
        VI packed[4];
        load_turned(at, stride, packed);
        unrolled<16>([&](auto g) {
            store(scales + g * W, mul(d, to_float(mask(shift_right<g % 4 * 8>(packed[g / 4]), 15))));
            store(offsets + g * W, mul(dmin, to_float(mask(shift_right<g % 4 * 8 + 4>(packed[g / 4]), 15))));
        });
        for (int p = 0; p < 2; p++) {
            VI words[8];
            load_32_turned(at + 16 + 32 * p, stride, words);
            unrolled<8>([&](auto t) {
                unrolled<4>([&](auto j) { store_codes(codes + (128 * p + 32 * j + 4 * t) * W, mask(shift_right<2 * j>(words[t]), 0x03030303)); });
            });
        }
        return 1;
    }
};

// 32 bytes of third bits, 64 bytes of 2-bit codes as in Q2_K, 12 bytes of 6-bit scales, d:
// d * (scale - 32) * (code - 4), where the third bit is the code's.
struct Q3KRows : BlockRows<Q3KRows, 110, 256> {
    static constexpr int PIECE = 16, MIDDLE = 4;
    using BlockRows::BlockRows;

    static INLINE int64_t blocks(const uint8_t* at, int64_t stride, int64_t, uint8_t* codes, float* scales, float*) {
        VI tail[4], packed[3];
        load_turned(at + 94, stride, tail);  // two bytes of codes, the scales, d: nothing behind the block is read
        for (int i = 0; i < 3; i++) packed[i] = either(shift_right<16>(tail[i]), shift_left<16>(tail[i + 1]));
        const VF d = high_halves(tail[3]), middle = set1(-32.0f);
        unrolled<4>([&](auto four) {
            const VI low = mask(shift_right<four / 2 * 4>(packed[four % 2]), 0x0f0f0f0f);
            const VI six = either(low, bits_at_four<2 * four>(packed[2], 3));
            unrolled<4>([&](auto g) { store(scales + (4 * four + g) * W, mul(d, add(to_float(byte_of<g>(six)), middle))); });
        });
        VI third[8];
        load_32_turned(at, stride, third);
        unrolled<2>([&](auto p) {
            VI words[8];
            load_32_turned(at + 32 + 32 * p, stride, words);
            unrolled<8>([&](auto t) {
                unrolled<4>([&](auto j) {
                    const VI bit = shift_left<2>(mask(shift_right<4 * p + j>(third[t]), 0x01010101));
                    store_codes(codes + (128 * p + 32 * j + 4 * t) * W, either(mask(shift_right<2 * j>(words[t]), 0x03030303), bit));
                });
            });
        });
        return 1;
    }
};

// d, 16 high bits of scales, 4 bytes of their low halves, 128 bytes: d * (scale - 32) * value of the code.
struct IQ4XSRows : BlockRows<IQ4XSRows, 136, 256> {
    static constexpr int PIECE = 32, MIDDLE = 128;
    using BlockRows::BlockRows;

    static INLINE int64_t blocks(const uint8_t* at, int64_t stride, int64_t, uint8_t* codes, float* scales, float*) {
        const VI head = load_word_turned(at, stride), low = load_word_turned(at + 4, stride);
        const VF d = low_halves(head), middle = set1(-32.0f);
        unrolled<8>([&](auto g) {
            const VI six = either(mask(shift_right<4 * g>(low), 15), shift_left<4>(mask(shift_right<16 + 2 * g>(head), 3)));
            store(scales + g * W, mul(d, add(to_float(six), middle)));
            VI words[4];
            load_turned(at + 8 + 16 * g, stride, words);
            uint8_t* to = codes + 32 * g * W;
            unrolled<4>([&](auto t) { store_values(to + 4 * t * W, to + (16 + 4 * t) * W, words[t]); });
        });
        return 1;
    }
};

}}  // namespace core_kernels
