// What integer.h needs beside simd_avx512.h: AVX-512 with VNNI, 16 rows of a weight in the lanes of a vector.
#pragma once

#include "simd_avx512.h"

namespace core_kernels { namespace {

constexpr int ROWS_AT_ONCE = 4;  // rows of x over a vector of codes
constexpr int64_t INTEGER_ROWS = 512;
constexpr int SCREEN_SUMS = 16;  // vectors of sums at once, in screen.h
constexpr int64_t X_PARTS = 2, X_NUMBER = 1;  // high and low bytes
#define PIECE_CALL INLINE

inline VI no_dots() { return _mm512_setzero_si512(); }
inline VI set1_integer(int32_t v) { return _mm512_set1_epi32(v); }
inline VI times_256(VI v) { return _mm512_slli_epi32(v, 8); }
inline VF as_floats(VI bits) { return _mm512_castsi512_ps(bits); }
inline VI plus(VI a, VI b) { return _mm512_add_epi32(a, b); }
inline VI either(VI a, VI b) { return _mm512_or_si512(a, b); }
inline VI flip(VI a, int bits) { return _mm512_xor_si512(a, _mm512_set1_epi32(bits)); }
inline void store_codes(uint8_t* to, VI v) { _mm512_store_si512(to, v); }
using Codes = VI;
inline Codes load_codes(const uint8_t* from) { return _mm512_load_si512(from); }
template <int SHIFT> inline VI shift_left(VI v) { return _mm512_slli_epi32(v, SHIFT); }
template <int SHIFT> inline VI shift_signed(VI v) { return _mm512_srai_epi32(v, SHIFT); }

// 16 bytes of each of 16 rows: word t of every row in the lanes of four[t].
INLINE void load_turned(const uint8_t* at, int64_t stride, VI* four) {
    VI rows[4];
    for (int r = 0; r < 4; r++) {
        const uint8_t* one = at + r * stride;
        const auto part = [&](int lane) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(one + 4 * lane * stride)); };
        VI v = _mm512_castsi128_si512(part(0));
        v = _mm512_inserti32x4(v, part(1), 1);
        v = _mm512_inserti32x4(v, part(2), 2);
        rows[r] = _mm512_inserti32x4(v, part(3), 3);
    }
    const VI a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const VI c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
    four[0] = _mm512_unpacklo_epi64(a, c), four[1] = _mm512_unpackhi_epi64(a, c);
    four[2] = _mm512_unpacklo_epi64(b, d), four[3] = _mm512_unpackhi_epi64(b, d);
}
// 4 bytes of each row.
INLINE VI load_word_turned(const uint8_t* at, int64_t stride) {
    const VI rows = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_i32gather_epi32(_mm512_mullo_epi32(rows, _mm512_set1_epi32(int32_t(stride))), at, 1);
}
INLINE VF low_halves(VI v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
INLINE VF high_halves(VI v) { return low_halves(_mm512_srli_epi32(v, 16)); }

// 16 in byte j of a lane where its bit j is set, of 4.
INLINE VI sixteens(VI bits) {
    const VI found = _mm512_setr_epi32(0, 0x10, 0x1000, 0x1010, 0x100000, 0x100010, 0x101000, 0x101010, 0x10000000, 0x10000010,
                                       0x10001000, 0x10001010, 0x10100000, 0x10100010, 0x10101000, 0x10101010);
    return _mm512_permutexvar_epi32(bits, found);
}
// For each byte below 16 the byte of a table.
INLINE VI look_up_bytes(const uint8_t* table, VI codes) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), codes);
}

// sum of each lane's four products of unsigned codes and four signed bytes of x, onto `before`
INLINE VI dots(VI before, Codes codes, const int8_t* four) {
    int32_t x;
    __builtin_memcpy(&x, four, 4);
    return _mm512_dpbusd_epi32(before, codes, _mm512_set1_epi32(x));
}

// Lanes [skip, W) of a sum, onto what `before` has there.
INLINE void add_lanes(float* out, const float* before, int skip, VF v) {
    const __mmask16 lanes = __mmask16(0xffffu << skip);
    if (before) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(lanes, before));
    _mm512_mask_storeu_ps(out, lanes, v);
}

// Of whole vectors; NaN where there is an infinity or a NaN.
INLINE float largest_magnitude(const float* x, int64_t count) {
    VI bits = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += W) bits = _mm512_max_epu32(bits, mask(_mm512_castps_si512(load(x + k)), 0x7fffffff));
    const uint32_t most = _mm512_reduce_max_epu32(bits);
    float found;
    __builtin_memcpy(&found, &most, 4);
    return most < 0x7f800000u ? found : __builtin_nanf("");
}
INLINE VI rounded(VF v) { return _mm512_cvtps_epi32(v); }
INLINE int32_t total(VI v) { return _mm512_reduce_add_epi32(v); }
// q = 256 * high + low as bytes; neighbours by parity in every 8 where `paired`.
INLINE void store_numbers(VI q, int8_t* high, int64_t half, bool paired) {
    const VI top = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
    const VI rest = _mm512_sub_epi32(q, _mm512_slli_epi32(top, 8));
    __m128i h = _mm512_cvtepi32_epi8(top), l = _mm512_cvtepi32_epi8(rest);
    if (paired) {
        const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
        h = _mm_shuffle_epi8(h, order), l = _mm_shuffle_epi8(l, order);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), h);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high + half), l);
}

}}  // namespace core_kernels
