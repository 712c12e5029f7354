// What integer.h needs beside simd_avx2.h: products of words of 16 bits, 8 rows of a weight in the lanes of a vector.
#pragma once

#include "simd_avx2.h"

namespace core_kernels { namespace {

constexpr int ROWS_AT_ONCE = 6;  // rows of x over a vector of codes
constexpr int64_t INTEGER_ROWS = 512;
constexpr int SCREEN_SUMS = 6;  // vectors of sums at once, in screen.h
constexpr int64_t X_PARTS = 1, X_NUMBER = 2;  // all of q in one word
#define PIECE_CALL __attribute__((noinline))  // so that 16 registers are those of one piece alone

inline VI no_dots() { return _mm256_setzero_si256(); }
inline VI set1_integer(int32_t v) { return _mm256_set1_epi32(v); }
inline VI times_256(VI v) { return _mm256_slli_epi32(v, 8); }
inline VF as_floats(VI bits) { return _mm256_castsi256_ps(bits); }
inline VI plus(VI a, VI b) { return _mm256_add_epi32(a, b); }
inline VI either(VI a, VI b) { return _mm256_or_si256(a, b); }
inline VI flip(VI a, int bits) { return _mm256_xor_si256(a, _mm256_set1_epi32(bits)); }
inline void store_codes(uint8_t* to, VI v) { _mm256_store_si256(reinterpret_cast<VI*>(to), v); }
template <int SHIFT> inline VI shift_left(VI v) { return _mm256_slli_epi32(v, SHIFT); }
template <int SHIFT> inline VI shift_signed(VI v) { return _mm256_srai_epi32(v, SHIFT); }

using Codes = VI;
inline Codes load_codes(const uint8_t* from) { return _mm256_load_si256(reinterpret_cast<const VI*>(from)); }

// Sums of each lane's products of four codes and four numbers of x, which stand in the order first, third, second, fourth.
INLINE VI dots(VI before, Codes codes, const int8_t* x) {  // what all rows of x have in common is computed once
    const auto two = [](const int8_t* words) {
        int32_t both;
        __builtin_memcpy(&both, words, 4);
        return _mm256_set1_epi32(both);
    };
    before = plus(before, _mm256_madd_epi16(mask(codes, 0x00ff00ff), two(x)));
    before = plus(before, _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), two(x + 4)));
    asm("" : "+x"(before));  // one sum after the other: GCC would make all products first, and keep them in memory
    return before;
}

// 16 bytes of each of 8 rows: word t of every row in the lanes of four[t].
INLINE void load_turned(const uint8_t* at, int64_t stride, VI* four) {
    VI rows[4];
    for (int r = 0; r < 4; r++) {
        const auto part = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + row * stride)); };
        rows[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(part(r)), part(r + 4), 1);
    }
    const VI a = _mm256_unpacklo_epi32(rows[0], rows[1]), b = _mm256_unpackhi_epi32(rows[0], rows[1]);
    const VI c = _mm256_unpacklo_epi32(rows[2], rows[3]), d = _mm256_unpackhi_epi32(rows[2], rows[3]);
    four[0] = _mm256_unpacklo_epi64(a, c), four[1] = _mm256_unpackhi_epi64(a, c);
    four[2] = _mm256_unpacklo_epi64(b, d), four[3] = _mm256_unpackhi_epi64(b, d);
}
// 4 bytes of each row.
INLINE VI load_word_turned(const uint8_t* at, int64_t stride) {
    const auto word = [&](int row) { int32_t v; memcpy(&v, at + row * stride, 4); return v; };
    return _mm256_setr_epi32(word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7));
}
INLINE VF words_as_halves(VI words) {  // none above 65535
    const VI packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
INLINE VF low_halves(VI v) { return words_as_halves(mask(v, 0xffff)); }
INLINE VF high_halves(VI v) { return words_as_halves(_mm256_srli_epi32(v, 16)); }

// 16 in byte j of a lane where its bit j is set, of 4; other bits are ignored.
INLINE VI sixteens(VI bits) {
    const VI bytes = _mm256_shuffle_epi8(bits, _mm256_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12,
                                                                0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    const VI each = _mm256_set1_epi32(0x08040201), set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, each), each);
    return mask(set, 0x10101010);
}
// For each byte below 16 the byte of a table.
INLINE VI look_up_bytes(const uint8_t* table, VI codes) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), codes);
}

// Lanes [skip, W) of a sum, onto what `before` has there.
INLINE void add_lanes(float* out, const float* before, int skip, VF v) {
    const VI lanes = _mm256_cmpgt_epi32(_mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8), _mm256_set1_epi32(skip));
    if (before) v = add(v, _mm256_maskload_ps(before, lanes));
    _mm256_maskstore_ps(out, lanes, v);
}

// Of whole vectors; NaN where there is an infinity or a NaN.
INLINE float largest_magnitude(const float* x, int64_t count) {
    VI bits = _mm256_setzero_si256();
    for (int64_t k = 0; k < count; k += W) bits = _mm256_max_epu32(bits, mask(_mm256_castps_si256(load(x + k)), 0x7fffffff));
    uint32_t lanes[W], most = 0;
    _mm256_storeu_si256(reinterpret_cast<VI*>(lanes), bits);
    for (uint32_t one : lanes) most = one > most ? one : most;
    float found;
    memcpy(&found, &most, 4);
    return most < 0x7f800000u ? found : __builtin_nanf("");
}
INLINE VI rounded(VF v) { return _mm256_cvtps_epi32(v); }
INLINE int32_t total(VI v) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
// q as words, every four in the order that `dots` wants; four are every second of 8 where `paired`, else neighbours.
INLINE void store_numbers(VI q, int8_t* to, int64_t, bool paired) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    const __m128i order = paired ? _mm_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, 2, 3, 10, 11, 6, 7, 14, 15)
                                 : _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(words, order));
}

}}  // namespace core_kernels
