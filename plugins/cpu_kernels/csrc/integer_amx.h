// Products of bytes by AMX: tiles of 16 rows of 64 bytes, 16 x 16 sums of 32 bits from one instruction.
//
// A tile of x holds up to 8 rows: the high bytes of each, then its low ones, as they lie in a prepared x. A tile of weights is
// 4 to 16 steps of what integer.h decodes, which have its layout already. So an instruction gives the sums of a piece, or of
// 64 columns of it, for 8 rows of x and 16 of the weight; scales are applied to them as in integer.h, from memory.
#pragma once

#include "integer.h"

namespace core_kernels { namespace {

constexpr int TILE_ROWS = 8;  // of x
// Rows of x from which on tiles are worth it: each of their sums goes through memory.
template <class Rows> constexpr int64_t AMX_ROWS = Rows::PIECE < 32 ? 10 : 4;
constexpr int SUMS = 4, X_TILE = 4, WEIGHT_TILE = 5;  // numbers of registers; sums have 0 to 3

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};

    TileShapes(int x_rows, int columns) {
        for (int i = 0; i < SUMS; i++) bytes[i] = 64, rows[i] = uint8_t(2 * x_rows);
        bytes[X_TILE] = uint16_t(columns), rows[X_TILE] = uint8_t(2 * x_rows);
        bytes[WEIGHT_TILE] = 64, rows[WEIGHT_TILE] = uint8_t(columns / 4);
    }
    void use() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
};

template <int TILE> INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(TILE)); }
template <int TILE> INLINE void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE> INLINE void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE> INLINE void tile_dots() {  // signed bytes of x with unsigned codes
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(TILE), "i"(X_TILE), "i"(WEIGHT_TILE));
}
inline void tiles_done() { asm volatile("tilerelease"); }

// The sums of one piece of ROWS rows of x: [2 * ROWS][W], high and low by turns.
template <class Rows, int TILE> INLINE void amx_piece(const uint8_t* codes, const int8_t* x, int64_t half, int32_t* sums) {
    constexpr int STEP = Rows::PIECE < 64 ? Rows::PIECE : 64;
    tile_zero<TILE>();
    for (int k = 0; k < Rows::PIECE; k += STEP) {
        tile_load<X_TILE>(x + k, half);
        tile_load<WEIGHT_TILE>(codes + k * W, 4 * W);
        tile_dots<TILE>();
    }
    tile_store<TILE>(sums, 4 * W);
}

template <class Rows, int ROWS> struct AmxTile {
    static void run(const Decoded& decoded, const IntegerX& x, const float* row, int64_t from, int64_t to, const Target& target) {
        constexpr int PIECES = int(X_BLOCK) / Rows::PIECE;
        alignas(64) int32_t sums[PIECES][2 * ROWS][W];
        VF all[ROWS];
        unrolled<ROWS>([&](auto r) { all[r] = zero(); });
        for (int64_t k = from; k < to; k += X_BLOCK) {
            const int64_t pieces = (std::min(k + X_BLOCK, to) - k) / Rows::PIECE;
            unrolled<PIECES>([&](auto p) {
                if (p < pieces) amx_piece<Rows, p % SUMS>(decoded.codes + (k - from + p * Rows::PIECE) * W, x.numbers(row, k + p * Rows::PIECE), x.half, sums[p][0]);
            });
            VF block[ROWS];
            unrolled<ROWS>([&](auto r) { block[r] = zero(); });
            for (int64_t p = 0; p < pieces; p++) {
                const auto sum_of = [&](int r) { return plus(times_256(load_words((const uint8_t*)sums[p][2 * r])), load_words((const uint8_t*)sums[p][2 * r + 1])); };
                scale_piece<Rows, ROWS>(decoded, x, row, from, k + p * Rows::PIECE, sum_of, block, all);
            }
            scale_block<ROWS>(x, row, k, block, all);
        }
        add_rows<ROWS>(target, all);
    }
};

template <class Rows> void multiply_amx(const Plan& plan, const Call& call, int64_t first, int64_t last) {
    if (call.rows < AMX_ROWS<Rows>) return multiply_integer<Rows>(plan, call, first, last);
    int configured = 0;
    multiply_tiles<Rows, AmxTile, TILE_ROWS>(plan, call, first, last, [&](int rows) {
        if (rows == configured) return;
        TileShapes(rows, Rows::PIECE < 64 ? Rows::PIECE : 64).use();
        configured = rows;
    });
    tiles_done();
}

}}  // namespace core_kernels
