// Vectors of 16 floats: AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include "weight.h"

namespace core_kernels { namespace {

constexpr int W = 16;
constexpr int MAX_ROWS = 6;  // rows of x at once: 6 x 4 sums, 4 weights and one x are 29 of 32 registers
constexpr int FEW_ROWS = 2;  // beside weights that are being decoded

constexpr int PANEL_TILE = 12;  // rows of x at once over a panel: two sums each
constexpr int PANEL_ROWS = 24;  // of x, from which on panels are worth it

constexpr int LANES_VECTORS = 3;                          // of rows of x in lanes, at once, at the most ...
constexpr int LANES_COLUMNS[LANES_VECTORS] = {8, 8, 8};  // ... with so many rows of the weight
constexpr int LANES_PARTS = 2;                            // of a sum, where one vector of rows is all there is
constexpr int LANES_LEAST = 12;                           // rows that are worth all W lanes

using VF = __m512;
using VI = __m512i;

inline VF zero() { return _mm512_setzero_ps(); }
inline VF set1(float value) { return _mm512_set1_ps(value); }
inline VF load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, VF v) { _mm512_storeu_ps(p, v); }
inline VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
inline VF mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
inline VF add(VF a, VF b) { return _mm512_add_ps(a, b); }
inline VF negate(VF a) { return _mm512_sub_ps(zero(), a); }
inline float sum(VF v) { return _mm512_reduce_add_ps(v); }

inline __m256 fold(VF v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }

// The sums of four vectors.
inline __m128 sums(VF a, VF b, VF c, VF d) {
    const __m256 ab = _mm256_hadd_ps(fold(a), fold(b)), cd = _mm256_hadd_ps(fold(c), fold(d));
    const __m256 all = _mm256_hadd_ps(ab, cd);
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
inline void store4(float* p, __m128 v) { _mm_storeu_ps(p, v); }

inline __mmask16 first_lanes(int count) { return count >= W ? __mmask16(0xffff) : __mmask16((1u << (count < 0 ? 0 : count)) - 1); }
inline VF load_first(const float* p, int count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline void store_first(float* p, VF v, int count) { _mm512_mask_storeu_ps(p, first_lanes(count), v); }
inline VI load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline VI load_words_first(const uint8_t* p, int count) { return _mm512_maskz_loadu_epi32(first_lanes(count), p); }

template <int SHIFT> inline VI shift_right(VI v) {
    if constexpr (SHIFT == 0) return v; else return _mm512_srli_epi32(v, SHIFT);
}
inline VI mask(VI v, int bits) { return _mm512_and_si512(v, _mm512_set1_epi32(bits)); }
inline VF to_float(VI v) { return _mm512_cvtepi32_ps(v); }

struct Table { VF values; };
inline Table load_table(const float* p) { return {load(p)}; }
inline VF look_up(const Table& table, VI low4) { return _mm512_permutexvar_ps(low4, table.values); }  // other bits are ignored
constexpr bool TABLE_IS_FREE = true;  // a look-up costs no more than masking and converting a code

using Lanes = VI;
inline Lanes load_lanes(const int32_t* p) { return _mm512_loadu_si512(p); }
inline VF permute(VF v, Lanes lanes) { return _mm512_permutexvar_ps(lanes, v); }
constexpr bool HAS_PERMUTE = true;

inline float half(uint16_t h) { return _cvtsh_ss(h); }

// `count` scales of a type, from the given index on; the other lanes are zero.
inline VF load_scales(const void* base, int64_t index, int count, int32_t type) {
    const __mmask16 k = first_lanes(count);
    if (type == FLOAT32) return _mm512_maskz_loadu_ps(k, static_cast<const float*>(base) + index);
    if (type == UINT8) return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(k, static_cast<const uint8_t*>(base) + index)));
    const __m256i raw = _mm256_maskz_loadu_epi16(k, static_cast<const uint16_t*>(base) + index);
    if (type == FLOAT16) return _mm512_cvtph_ps(raw);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

inline VF load_halves(const uint16_t* p, int count) {
    return _mm512_cvtph_ps(count >= W ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16(first_lanes(count), p));
}
inline VF load_brain_halves(const uint16_t* p, int count) {
    const __m256i raw = count >= W ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16(first_lanes(count), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// ---- GGML's blocks

using Bytes = __m256i;  // 32 codes
template <int FROM> inline VF signed_bytes(Bytes v) { return to_float(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(v, FROM / 16))); }
constexpr int BLOCKS = 4;  // of 4 words

// 16 bytes of each of the `count` blocks of `size` bytes; the words of missing ones are zero.
inline VI load_blocks(const uint8_t* at, int size, int count) {
    const auto one = [&](int b) { return b < count ? _mm_loadu_si128((const __m128i*)(at + b * size)) : _mm_setzero_si128(); };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(one(0)), one(1), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(one(2)), one(3), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
// Two halves at the start of each block: the first and the second of block b in lanes 4b to 4b + 3.
inline void load_block_halves(const uint8_t* at, int size, int count, VF& first, VF& second) {
    const auto one = [&](int b) { int v = 0; if (b < count) __builtin_memcpy(&v, at + b * size, 4); return v; };
    const VF pairs = _mm512_castps256_ps512(_mm256_cvtph_ps(_mm_setr_epi32(one(0), one(1), one(2), one(3))));
    first = permute(pairs, _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6));
    second = permute(pairs, _mm512_setr_epi32(1, 1, 1, 1, 3, 3, 3, 3, 5, 5, 5, 5, 7, 7, 7, 7));
}

}}  // namespace core_kernels
