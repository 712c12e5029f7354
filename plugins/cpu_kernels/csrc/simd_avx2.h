// Vectors of 8 floats: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "weight.h"

namespace core_kernels { namespace {

constexpr int W = 8;
constexpr int MAX_ROWS = 3;  // rows of x at once: 3 x 4 sums, 3 x and one weight are all 16 registers
constexpr int FEW_ROWS = 2;  // beside weights that are being decoded

constexpr int PANEL_TILE = 6;  // rows of x at once over a panel: two sums each
constexpr int PANEL_ROWS = 12;  // of x, from which on panels are worth it

constexpr int LANES_VECTORS = 3;                          // of rows of x in lanes, at once, at the most ...
constexpr int LANES_COLUMNS[LANES_VECTORS] = {8, 4, 4};  // ... with so many rows of the weight
constexpr int LANES_PARTS = 1;                            // of a sum, where one vector of rows is all there is
constexpr int LANES_LEAST = 7;                            // rows that are worth all W lanes

using VF = __m256;
using VI = __m256i;

inline VF zero() { return _mm256_setzero_ps(); }
inline VF set1(float value) { return _mm256_set1_ps(value); }
inline VF load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, VF v) { _mm256_storeu_ps(p, v); }
inline VF fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
inline VF mul(VF a, VF b) { return _mm256_mul_ps(a, b); }
inline VF add(VF a, VF b) { return _mm256_add_ps(a, b); }
inline VF negate(VF a) { return _mm256_sub_ps(zero(), a); }
inline __m128 sums(VF a, VF b, VF c, VF d) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
inline void store4(float* p, __m128 v) { _mm_storeu_ps(p, v); }
inline float sum(VF v) { return _mm_cvtss_f32(sums(v, v, v, v)); }

inline VI first_lanes(int count) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
inline VF load_first(const float* p, int count) { return _mm256_maskload_ps(p, first_lanes(count)); }
inline void store_first(float* p, VF v, int count) { _mm256_maskstore_ps(p, first_lanes(count), v); }
inline VI load_words(const uint8_t* p) { return _mm256_loadu_si256((const VI*)p); }
inline VI load_words_first(const uint8_t* p, int count) { return _mm256_maskload_epi32((const int*)p, first_lanes(count)); }

template <int SHIFT> inline VI shift_right(VI v) {
    if constexpr (SHIFT == 0) return v; else return _mm256_srli_epi32(v, SHIFT);
}
inline VI mask(VI v, int bits) { return _mm256_and_si256(v, _mm256_set1_epi32(bits)); }
inline VF to_float(VI v) { return _mm256_cvtepi32_ps(v); }

struct Table { VF low, high; };
inline Table load_table(const float* p) { return {load(p), load(p + 8)}; }
inline VF look_up(const Table& table, VI low4) {  // a permutation looks at three bits; the fourth chooses between two
    const VF low = _mm256_permutevar8x32_ps(table.low, low4), high = _mm256_permutevar8x32_ps(table.high, low4);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(low4, 28)));
}
constexpr bool TABLE_IS_FREE = false;

using Lanes = VI;
inline Lanes load_lanes(const int32_t* p) { return _mm256_loadu_si256((const VI*)p); }
inline VF permute(VF v, Lanes lanes) { return _mm256_permutevar8x32_ps(v, lanes); }
constexpr bool HAS_PERMUTE = true;

inline float half(uint16_t h) { return _cvtsh_ss(h); }

inline VF load_halves(const uint16_t* p, int count) {
    if (count >= W) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    uint16_t part[W] = {};
    for (int i = 0; i < count; i++) part[i] = p[i];
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)part));
}
inline VF brain(__m128i raw) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16)); }
inline VF load_brain_halves(const uint16_t* p, int count) {
    if (count >= W) return brain(_mm_loadu_si128((const __m128i*)p));
    uint16_t part[W] = {};
    for (int i = 0; i < count; i++) part[i] = p[i];
    return brain(_mm_loadu_si128((const __m128i*)part));
}
// `count` numbers of `size` bytes, at most 16 bytes in all, the rest zero.
inline __m128i load_few(const void* p, int count, int size) {
    switch (count * size) {
        case 16: return _mm_loadu_si128((const __m128i*)p);
        case 8: return _mm_loadl_epi64((const __m128i*)p);
        case 4: { int32_t v; memcpy(&v, p, 4); return _mm_cvtsi32_si128(v); }
        case 2: { uint16_t v; memcpy(&v, p, 2); return _mm_cvtsi32_si128(v); }
    }
    uint8_t part[16] = {};
    for (int i = 0; i < count * size; i++) part[i] = static_cast<const uint8_t*>(p)[i];
    return _mm_loadu_si128((const __m128i*)part);
}
inline VF load_scales(const void* base, int64_t index, int count, int32_t type) {
    if (type == FLOAT32) return load_first(static_cast<const float*>(base) + index, count);
    if (type == UINT8) return to_float(_mm256_cvtepu8_epi32(load_few(static_cast<const uint8_t*>(base) + index, count, 1)));
    const __m128i raw = load_few(static_cast<const uint16_t*>(base) + index, count, 2);
    return type == FLOAT16 ? _mm256_cvtph_ps(raw) : brain(raw);
}


// ---- GGML's blocks

using Bytes = __m256i;  // 32 codes
template <int FROM> inline VF signed_bytes(Bytes v) {
    const __m128i half = _mm256_extracti128_si256(v, FROM / 16);
    return to_float(_mm256_cvtepi8_epi32(FROM % 16 ? _mm_srli_si128(half, 8) : half));
}
constexpr int BLOCKS = 2;  // of 4 words

// 16 bytes of each of the `count` blocks of `size` bytes; the words of missing ones are zero.
inline VI load_blocks(const uint8_t* at, int size, int count) {
    const __m128i second = count > 1 ? _mm_loadu_si128((const __m128i*)(at + size)) : _mm_setzero_si128();
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)at)), second, 1);
}
// Two halves at the start of each block: the first and the second of block b in lanes 4b to 4b + 3.
inline void load_block_halves(const uint8_t* at, int size, int count, VF& first, VF& second) {
    int pairs[2] = {0, 0};
    memcpy(&pairs[0], at, 4);
    if (count > 1) memcpy(&pairs[1], at + size, 4);
    const VF found = _mm256_castps128_ps256(_mm_cvtph_ps(_mm_setr_epi32(pairs[0], pairs[1], 0, 0)));
    first = permute(found, _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2));
    second = permute(found, _mm256_setr_epi32(1, 1, 1, 1, 3, 3, 3, 3));
}

}}  // namespace core_kernels
