// GGML's blocks, as they lie in a GGUF file. What a block means is written beside each format.
//
// Blocks of 32 codes of 4 bits are read as 32-bit words, four of a block, so that one shift gives a code of each word.
// All others are first brought to 32 signed bytes for 32 neighbouring columns, with a scale for 16 or 32 of them.
#pragma once

#include <cstring>

#include "weight.h"

namespace core_kernels { namespace {

constexpr int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

inline float half_at(const uint8_t* p) {
    uint16_t raw;
    memcpy(&raw, p, 2);
    return half(raw);
}

// HEAD 2: d, 16 bytes (Q4_0: d * (code - 8); IQ4_NL: d * value of the code); HEAD 4: d, m, 16 bytes (Q4_1: d * code + m).
// The low half of byte j is column j, the high half column j + 16.
template <int HEAD, bool TABLE> struct Nibbles {
    static constexpr int VECTORS = 8, PARTS = 1, SEGMENT = 32 * BLOCKS, SIZE = HEAD + 16, FEW = FEW_ROWS;
    static constexpr bool SCALED = true, OFFSET = !TABLE, IN_PLACE = !TABLE;

    const Weight& weight;
    Table table;

    struct Row { const uint8_t* at; };
    struct Segment { VI words; VF scale[1], offset[1]; };

    explicit Nibbles(const Plan& plan) : weight(plan.weight) {
        float values[16];
        for (int code = 0; code < 16; code++) values[code] = TABLE ? float(IQ4_VALUES[code]) : float(code);
        table = load_table(values);
    }
    static bool setup(Plan& plan) { return plan.weight.in % 32 == 0 && plan.weight.row_bytes == plan.weight.in / 32 * SIZE; }
    static constexpr int column(int i, int lane) { return lane / 4 * 32 + lane % 4 * 4 + i / 2 + i % 2 * 16; }
    static constexpr int part(int) { return 0; }
    int64_t row_floats() const { return 0; }
    Row row(int64_t n, float*) const { return {weight.codes + n * weight.row_bytes}; }

    INLINE Segment segment(const Row& row, int64_t s) const {
        Segment found;
        const uint8_t* at = row.at + s * BLOCKS * SIZE;
        const int64_t left = weight.in / 32 - s * BLOCKS;
        const int count = left < BLOCKS ? int(left) : BLOCKS;
        __builtin_prefetch(at + COLUMNS * weight.row_bytes);
        if (count == BLOCKS) load_block_halves(at, SIZE, BLOCKS, found.scale[0], found.offset[0]);
        else load_block_halves(at, SIZE, count, found.scale[0], found.offset[0]);
        if constexpr (HEAD == 2) found.offset[0] = mul(found.scale[0], set1(-8.0f));
        found.words = count == BLOCKS ? load_blocks(at + HEAD, SIZE, BLOCKS) : load_blocks(at + HEAD, SIZE, count);
        return found;
    }
    template <int I> INLINE VF raw(const Segment& segment) const {
        const VI shifted = shift_right<I * 4>(segment.words);
        if constexpr (TABLE || TABLE_IS_FREE) return look_up(table, shifted);
        else return to_float(I == 7 ? shifted : mask(shifted, 15));
    }
    static constexpr float in_place(int i) { return in_place_factor<4>(i); }
    template <int I> INLINE VF raw_in_place(const Segment& segment) const { return code_in_place<4, I>(segment.words); }
};

// Any format that comes as signed bytes. Q has SIZE bytes for COLUMNS_OF_BLOCK columns in PIECES segments, a scale (and an
// offset) for GROUP columns; read_scales(block, scales, offsets) for all of a block, read(block, piece, bytes).
template <class Q> struct Blocks {
    static constexpr int SEGMENT = Q::COLUMNS_OF_BLOCK / Q::PIECES, VECTORS = SEGMENT / W;
    static constexpr int PARTS = SEGMENT / Q::GROUP, FEW = Q::FEW, GROUPS = Q::COLUMNS_OF_BLOCK / Q::GROUP;
    static constexpr bool SCALED = true, OFFSET = Q::OFFSET, IN_PLACE = false;

    const Weight& weight;

    struct Row { const uint8_t* at; const float *scales, *offsets; };
    struct Segment { Bytes bytes[SEGMENT / 32]; VF scale[PARTS], offset[PARTS]; };

    explicit Blocks(const Plan& plan) : weight(plan.weight) {}

    static bool setup(Plan& plan) {
        return plan.weight.in % Q::COLUMNS_OF_BLOCK == 0 && plan.weight.row_bytes == plan.weight.in / Q::COLUMNS_OF_BLOCK * Q::SIZE;
    }
    static constexpr int column(int i, int lane) { return i * W + lane; }
    static constexpr int part(int i) { return i * W / Q::GROUP; }
    int64_t row_floats() const { return 2 * weight.in / Q::GROUP; }

    Row row(int64_t n, float* memory) const {
        const uint8_t* at = weight.codes + n * weight.row_bytes;
        float* offsets = memory + weight.in / Q::GROUP;
        for (int64_t b = 0; b < weight.in / Q::COLUMNS_OF_BLOCK; b++)
            Q::read_scales(at + b * Q::SIZE, memory + b * GROUPS, offsets + b * GROUPS);
        return {at, memory, offsets};
    }
    INLINE Segment segment(const Row& row, int64_t s) const {
        Segment found;
        const uint8_t* at = row.at + s / Q::PIECES * Q::SIZE;
        __builtin_prefetch(at + COLUMNS * weight.row_bytes);
        Q::read(at, int(s % Q::PIECES), found.bytes);
        unrolled<PARTS>([&](auto part) {
            found.scale[part] = set1(row.scales[s * PARTS + part]);
            if constexpr (OFFSET) found.offset[part] = set1(row.offsets[s * PARTS + part]);
        });
        return found;
    }
    template <int I> INLINE VF raw(const Segment& segment) const { return signed_bytes<I * W % 32>(segment.bytes[I * W / 32]); }
};

// Vectors of 32 bytes in the compiler's own terms: it knows their instructions in every set.
typedef uint8_t U8x32 __attribute__((vector_size(32)));

template <class To> INLINE void put(To& to, const U8x32& bytes) { memcpy(&to, &bytes, 32); }
INLINE U8x32 bytes_at(const uint8_t* p) { U8x32 v; memcpy(&v, p, 32); return v; }

// The low halves of 16 bytes, then the high halves.
INLINE U8x32 nibbles_of(const uint8_t* p) {
    U8x32 twice;
    memcpy(&twice, p, 16);
    memcpy(reinterpret_cast<uint8_t*>(&twice) + 16, p, 16);
    constexpr U8x32 shifts = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4};
    const U8x32 high = twice >> 4, low = twice & 15;
    return shifts == 4 ? high : low;
}
// 16 in byte j where bit j of 32 is set.
INLINE U8x32 fifth_bits(uint32_t bits) {
    U8x32 v;
    const uint8_t* four = reinterpret_cast<const uint8_t*>(&bits);
    for (int j = 0; j < 32; j++) v[j] = four[j / 8];
    constexpr U8x32 bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const U8x32 none = {}, sixteen = none + 16;
    return (v & bit) != none ? sixteen : none;
}

// d, 32 signed bytes: d * byte.
struct Q8 {
    static constexpr int SIZE = 34, COLUMNS_OF_BLOCK = 32, PIECES = 1, GROUP = 32, FEW = FEW_ROWS;
    static constexpr bool OFFSET = false;
    static INLINE void read_scales(const uint8_t* block, float* scales, float*) { scales[0] = half_at(block); }
    static INLINE void read(const uint8_t* block, int, Bytes* bytes) { put(bytes[0], bytes_at(block + 2)); }
};

// HEAD 2: d, 32 fifth bits, 16 bytes: d * (code - 16). HEAD 4: d, m, bits, bytes: d * code + m.
template <int HEAD> struct Q5 {
    static constexpr int SIZE = HEAD + 20, COLUMNS_OF_BLOCK = 32, PIECES = 1, GROUP = 32, FEW = 1;
    static constexpr bool OFFSET = HEAD == 4;
    static INLINE void read_scales(const uint8_t* block, float* scales, float* offsets) {
        scales[0] = half_at(block);
        if constexpr (OFFSET) offsets[0] = half_at(block + 2);
    }
    static INLINE void read(const uint8_t* block, int, Bytes* bytes) {
        uint32_t bits;
        memcpy(&bits, block + HEAD, 4);
        U8x32 codes = nibbles_of(block + HEAD + 4) | fifth_bits(bits);
        if constexpr (HEAD == 2) codes -= 16;
        put(bytes[0], codes);
    }
};

// 16 bytes of scale (low) and min (high), 64 bytes of 2-bit codes, d, dmin: d * scale * code - dmin * min.
// Piece p of 128 columns has 32 bytes, whose bits 2j are columns 32j to 32j + 31.
struct Q2K {
    static constexpr int SIZE = 84, COLUMNS_OF_BLOCK = 256, PIECES = 2, GROUP = 16, FEW = 1;
    static constexpr bool OFFSET = true;
    static INLINE void read_scales(const uint8_t* block, float* scales, float* offsets) {
        const float d = half_at(block + 80), dmin = half_at(block + 82);
        for (int g = 0; g < 16; g++) scales[g] = d * float(block[g] & 15);
        for (int g = 0; g < 16; g++) offsets[g] = -(dmin * float(block[g] >> 4));
    }
    static INLINE void read(const uint8_t* block, int piece, Bytes* bytes) {
        const U8x32 codes = bytes_at(block + 16 + 32 * piece);
        put(bytes[0], codes & 3), put(bytes[1], codes >> 2 & 3), put(bytes[2], codes >> 4 & 3), put(bytes[3], codes >> 6);
    }
};

// 32 bytes of third bits, 64 bytes of 2-bit codes as in Q2_K, 12 bytes of 6-bit scales, d:
// d * (scale - 32) * (code - 4 where the third bit is not set).
struct Q3K {
    static constexpr int SIZE = 110, COLUMNS_OF_BLOCK = 256, PIECES = 2, GROUP = 16, FEW = 1;
    static constexpr bool OFFSET = false;
    static INLINE void read_scales(const uint8_t* block, float* scales, float*) {
        const uint8_t* packed = block + 96;
        const float d = half_at(block + 108);
        for (int g = 0; g < 16; g++) {
            const int four = packed[g % 8] >> (g / 8 * 4) & 15, two = packed[8 + g % 4] >> (g / 4 * 2) & 3;
            scales[g] = d * float((four | two << 4) - 32);
        }
    }
    static INLINE void read(const uint8_t* block, int piece, Bytes* bytes) {
        const U8x32 low = bytes_at(block + 32 + 32 * piece), high = bytes_at(block) >> (4 * piece);
        put(bytes[0], (low & 3) + (high << 2 & 4) - 4), put(bytes[1], (low >> 2 & 3) + (high << 1 & 4) - 4);
        put(bytes[2], (low >> 4 & 3) + (high & 4) - 4), put(bytes[3], (low >> 6) + (high >> 1 & 4) - 4);
    }
};

// d, dmin, 12 bytes of 6-bit scales and mins, [32 bytes of fifth bits,] 128 bytes: d * scale * code - dmin * min.
// Piece p of 64 columns has 32 bytes: the low halves, then the high halves; their fifth bits are bits 2p and 2p + 1.
template <bool FIVE> struct Q45K {
    static constexpr int SIZE = FIVE ? 176 : 144, COLUMNS_OF_BLOCK = 256, PIECES = 4, GROUP = 32, FEW = FIVE ? 1 : FEW_ROWS;
    static constexpr bool OFFSET = true;
    static INLINE void read_scales(const uint8_t* block, float* scales, float* offsets) {
        uint32_t packed[3], scale[2], min[2];  // four numbers at a time
        memcpy(packed, block + 4, 12);
        scale[0] = packed[0] & 0x3f3f3f3f, scale[1] = (packed[2] & 0x0f0f0f0f) | (packed[0] >> 6 & 0x03030303) << 4;
        min[0] = packed[1] & 0x3f3f3f3f, min[1] = (packed[2] >> 4 & 0x0f0f0f0f) | (packed[1] >> 6 & 0x03030303) << 4;
        const float d = half_at(block), dmin = half_at(block + 2);
        for (int g = 0; g < 8; g++) scales[g] = d * float(scale[g / 4] >> (g % 4 * 8) & 63);
        for (int g = 0; g < 8; g++) offsets[g] = -(dmin * float(min[g / 4] >> (g % 4 * 8) & 63));
    }
    static INLINE void read(const uint8_t* block, int piece, Bytes* bytes) {
        const U8x32 codes = bytes_at(block + (FIVE ? 48 : 16) + 32 * piece);
        U8x32 low = codes & 15, high = codes >> 4;
        if constexpr (FIVE) {
            const U8x32 fifth = bytes_at(block + 16) >> (2 * piece);
            low |= (fifth & 1) << 4, high |= (fifth & 2) << 3;
        }
        put(bytes[0], low), put(bytes[1], high);
    }
};

// 128 bytes of low halves, 64 bytes of high bits, 16 signed scales, d: d * scale * (code - 32).
// Piece p of 128 columns has 64 and 32 bytes: columns 0 to 63 are low halves, 64 to 127 high ones; bits 2j belong to 32j.
struct Q6K {
    static constexpr int SIZE = 210, COLUMNS_OF_BLOCK = 256, PIECES = 2, GROUP = 16, FEW = FEW_ROWS;
    static constexpr bool OFFSET = false;
    static INLINE void read_scales(const uint8_t* block, float* scales, float*) {
        const float d = half_at(block + 208);
        for (int g = 0; g < 16; g++) scales[g] = d * float(int8_t(block[192 + g]));
    }
    static INLINE void read(const uint8_t* block, int piece, Bytes* bytes) {
        const U8x32 first = bytes_at(block + 64 * piece), second = bytes_at(block + 64 * piece + 32);
        const U8x32 high = bytes_at(block + 128 + 32 * piece);
        put(bytes[0], ((first & 15) | (high & 3) << 4) - 32), put(bytes[1], ((second & 15) | (high >> 2 & 3) << 4) - 32);
        put(bytes[2], (first >> 4 | (high >> 4 & 3) << 4) - 32), put(bytes[3], (second >> 4 | (high >> 6) << 4) - 32);
    }
};

// d, 16 high bits of scales, 4 bytes of their low halves, 128 bytes: d * (scale - 32) * value of the code.
// Piece p of 32 columns has 16 bytes: low halves, then high halves.
struct IQ4XS {
    static constexpr int SIZE = 136, COLUMNS_OF_BLOCK = 256, PIECES = 8, GROUP = 32, FEW = 1;
    static constexpr bool OFFSET = false;
    static INLINE void read_scales(const uint8_t* block, float* scales, float*) {
        uint16_t high;
        memcpy(&high, block + 2, 2);
        const float d = half_at(block);
        for (int g = 0; g < 8; g++) scales[g] = d * float(((block[4 + g / 2] >> (g % 2 * 4) & 15) | (high >> (2 * g) & 3) << 4) - 32);
    }
    static INLINE void read(const uint8_t* block, int piece, Bytes* bytes) {
        uint8_t codes[32];
        const U8x32 packed = nibbles_of(block + 8 + 16 * piece);
        memcpy(codes, &packed, 32);
        U8x32 values;
        for (int j = 0; j < 32; j++) values[j] = uint8_t(IQ4_VALUES[codes[j]]);
        put(bytes[0], values);
    }
};

}}  // namespace core_kernels
