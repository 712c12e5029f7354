// What softmax and rounding need of vectors beside simd_avx2.h.
#pragma once

#include "simd_avx2.h"

namespace core_kernels { namespace {

inline VF larger(VF a, VF b) { return _mm256_max_ps(a, b); }  // b if one of them is NaN
inline VF minus(VF a, VF b) { return _mm256_sub_ps(a, b); }
inline VF over(VF a, VF b) { return _mm256_div_ps(a, b); }
inline VF magnitude(VF v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
inline VF nearest(VF v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline VF lane_numbers() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
inline VF where_less(VF a, VF b, VF then, VF otherwise) { return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }

inline float largest(VF v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline VF times_power_of_two(VF v, VF n) {  // n whole, at least -127, which gives 0
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)));
}

// Lanes [first, last) of v, the others of `otherwise`.
inline VF keep_lanes(VF v, int first, int last, VF otherwise) {
    return _mm256_blendv_ps(otherwise, v, _mm256_castsi256_ps(_mm256_andnot_si256(first_lanes(first), first_lanes(last))));
}

inline uint16_t to_half(float f) { return uint16_t(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT)); }

}}  // namespace core_kernels
