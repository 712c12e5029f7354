// What softmax and rounding need of vectors beside simd_plain.h.
#pragma once

#include <cmath>

#include "simd_plain.h"

namespace core_kernels { namespace {

inline VF larger(VF a, VF b) { return a > b ? a : b; }  // b if one of them is NaN
inline float largest(VF v) { return std::fmax(std::fmax(v[0], v[1]), std::fmax(v[2], v[3])); }
inline VF minus(VF a, VF b) { return a - b; }
inline VF over(VF a, VF b) { return a / b; }
inline VF magnitude(VF v) { return VF(VI(v) & 0x7fffffff); }
inline VF nearest(VF v) {  // by adding 1.5 * 2^23, at which floats are whole; |v| < 2^22
    const VF whole = set1(12582912.0f);
    VF moved = v + whole;
    asm("" : "+m"(moved));  // or the compiler might take the two for nothing
    return moved - whole;
}
inline VF lane_numbers() { return VF{0, 1, 2, 3}; }
inline VF where_less(VF a, VF b, VF then, VF otherwise) { return a < b ? then : otherwise; }
inline VF times_power_of_two(VF v, VF n) { return v * VF((__builtin_convertvector(n, VI) + 127) << 23); }  // n whole, at least -127

// Lanes [first, last) of v, the others of `otherwise`.
inline VF keep_lanes(VF v, int first, int last, VF otherwise) {
    const VI lane = {0, 1, 2, 3};
    return (lane >= first) & (lane < last) ? v : otherwise;
}

inline uint16_t to_half(float f) {
    union { float f; uint32_t i; } u = {f};
    const uint16_t sign = uint16_t((u.i >> 16) & 0x8000);
    u.i &= 0x7fffffff;
    if (u.i > 0x7f800000) return uint16_t(sign | 0x7e00);   // NaN
    if (u.i >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
    if (u.i < 0x38800000) {                                 // subnormal: the addition rounds to a multiple of 2^-24
        u.f += 0.5f;
        return uint16_t(sign | (u.i - 0x3f000000));
    }
    return uint16_t(sign | ((u.i + 0xc8000fff + ((u.i >> 13) & 1)) >> 13));
}

}}  // namespace core_kernels
