// Products of bfloat16 tiles (AMX) that keep what float32 knows.
//
// A float32 has 24 bits of fraction, a bfloat16 has 8 and the same exponents: cut off three times, a float32 is exactly the
// sum of three bfloat16, high + middle + low. Of the nine products of two such sums the six of order 2^-16 and more are added
// up, in float32; what is left out is 2^-24 of each product, the size of float32's own rounding. Henry, Tang and Heinecke,
// "Leveraging the bfloat16 Artificial Intelligence Datatype for Higher-Precision Computations" (ARITH 2019). A weight that
// needs fewer terms (a bfloat16 is one, a float16 two) needs fewer products. Numbers below 2^-126 count as zero in a tile.
//
// A tile of weights [16 rows][32 columns] is as the weights lie. Columns may stand in any order if x has the same: two
// vectors of floats are cut into a tile's row by one shift and one blend a term, a0 b0 a1 b1 ... A tile of x has such pairs
// down its rows and 16 rows of x across: [16 pairs][16 rows of x][2].
#pragma once

#include <immintrin.h>

#include "weight.h"

namespace core_kernels { namespace {

constexpr int TILE = 512;   // numbers of a tile
constexpr int X_TERMS = 3;  // x is any float32

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// While it lives, the eight tile registers of this thread are 16 rows of 64 bytes.
struct Tiles {
    Tiles() {
        static const TileShapes shapes;
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

// The first TERMS terms of a0 b0 a1 b1 ..., each a row of 32 numbers of a tile; terms lie a tile apart. Of three terms
// nothing is lost; of fewer the last is rounded.
template <int TERMS> INLINE void cut(__m512 a, __m512 b, uint16_t* to) {
    const __m512i high = _mm512_set1_epi32(int(0xffff0000));
    unrolled<TERMS>([&](auto term) {
        __m512i a_bits = _mm512_castps_si512(a), b_bits = _mm512_castps_si512(b);
        if constexpr (TERMS == 2 && term == 1) {
            const __m512i half = _mm512_set1_epi32(0x8000);
            a_bits = _mm512_add_epi32(a_bits, half), b_bits = _mm512_add_epi32(b_bits, half);
        }
        _mm512_store_si512(to + term * TILE, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a_bits, 16), b_bits));
        if constexpr (term + 1 < TERMS) {
            a = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_and_si512(a_bits, high)));
            b = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_and_si512(b_bits, high)));
        }
    });
}

// The compiler does not know that a tile is read from memory: what was stored before must be there, and stay before.
INLINE void memory_is_as_written() { asm volatile("" ::: "memory"); }

// Tile registers: sums 0 and 1 (two tiles of weight rows) by the first tile of x, 2 and 3 by the second; weights 4, 5; x 6, 7.
INLINE void load_weights(const uint16_t* first, const uint16_t* second) {
    _tile_loadd(4, first, 64);
    _tile_loadd(5, second, 64);
}
INLINE void load_first_x(const uint16_t* x) { _tile_loadd(6, x, 64); }
INLINE void load_second_x(const uint16_t* x) { _tile_loadd(7, x, 64); }
INLINE void multiply_first() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
}
INLINE void multiply_second() {
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
}

// Asks for a tile of the next step: tiles are loaded line by line, and each line would wait for the second cache.
INLINE void ask_for(const uint16_t* tile) {
    unrolled<16>([&](auto line) { _mm_prefetch(reinterpret_cast<const char*>(tile) + line * 64, _MM_HINT_T0); });
}

// 32 columns of 32 rows of the weight, [2][TERMS] tiles, times 32 rows of x: `first` and `second`, [X_TERMS] tiles each.
// The smallest products come first, and each tile is loaded as seldom as eight registers allow.
template <int TERMS> INLINE void tile_step(const uint16_t* weights, const uint16_t* first, const uint16_t* second) {
    const auto load_term = [&](int term) { load_weights(weights + term * TILE, weights + (TERMS + term) * TILE); };
    const auto load_x = [&](int term) { load_first_x(first + term * TILE), load_second_x(second + term * TILE); };
    const auto multiply = [&](int part) {
        multiply_first(), multiply_second();
        if (part < X_TERMS) ask_for(first + (X_TERMS + part) * TILE), ask_for(second + (X_TERMS + part) * TILE);
        if (part < TERMS) ask_for(weights + (2 * TERMS + part) * TILE), ask_for(weights + (3 * TERMS + part) * TILE);
    };
    load_term(0), load_x(2), multiply(0);
    load_x(1), multiply(1);
    if constexpr (TERMS > 1) load_term(1), multiply(2);
    load_x(0), multiply(TERMS > 1 ? 3 : 2);
    if constexpr (TERMS > 2) load_term(2), multiply(4);
    if constexpr (TERMS > 1) load_term(0), multiply(5);
}

// The same for 16 rows of x. Each product has to wait for the one before it, so they are added to two sums in turn: 2 and 3
// are to be added to 0 and 1.
template <int TERMS> INLINE void tile_step(const uint16_t* weights, const uint16_t* x) {
    const auto load_term = [&](int term) { load_weights(weights + term * TILE, weights + (TERMS + term) * TILE); };
    load_term(0), load_first_x(x + 2 * TILE), multiply_first();
    load_second_x(x + TILE), multiply_second();
    load_first_x(x), multiply_first();
    if constexpr (TERMS > 1) {
        load_term(1), multiply_second(), multiply_first();
        if constexpr (TERMS > 2) load_second_x(x), load_term(2), multiply_second();
    }
}

INLINE void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// [4][16 rows of the weight][16 rows of x]
INLINE void store_sums(float* to) {
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 256, 64);
    _tile_stored(2, to + 512, 64);
    _tile_stored(3, to + 768, 64);
    memory_is_as_written();
}

}}  // namespace core_kernels
