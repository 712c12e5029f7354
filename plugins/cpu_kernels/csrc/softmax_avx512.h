// What softmax and rounding need of vectors beside simd_avx512.h.
#pragma once

#include "simd_avx512.h"

namespace core_kernels { namespace {

inline VF larger(VF a, VF b) { return _mm512_max_ps(a, b); }  // b if one of them is NaN
inline float largest(VF v) { return _mm512_reduce_max_ps(v); }
inline VF minus(VF a, VF b) { return _mm512_sub_ps(a, b); }
inline VF over(VF a, VF b) { return _mm512_div_ps(a, b); }
inline VF magnitude(VF v) { return _mm512_abs_ps(v); }
inline VF nearest(VF v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline VF times_power_of_two(VF v, VF n) { return _mm512_scalef_ps(v, n); }  // n whole, at least -127
inline VF lane_numbers() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline VF where_less(VF a, VF b, VF then, VF otherwise) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, then); }

// Lanes [first, last) of v, the others of `otherwise`.
inline VF keep_lanes(VF v, int first, int last, VF otherwise) {
    return _mm512_mask_blend_ps(first_lanes(last) & ~first_lanes(first), otherwise, v);
}

inline uint16_t to_half(float f) { return uint16_t(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT)); }

}}  // namespace core_kernels
