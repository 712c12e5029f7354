// Numbers of the cache as vectors of floats, and the functions that softmax is made of.
#pragma once

#include <limits>

#include "weight.h"

namespace core_kernels { namespace {

struct Half { uint16_t bits; };
struct BrainHalf { uint16_t bits; };

INLINE VF load_floats(const float* p) { return load(p); }
INLINE VF load_floats(const Half* p) { return load_halves(&p->bits, W); }
INLINE VF load_floats(const BrainHalf* p) { return load_brain_halves(&p->bits, W); }

INLINE float to_number(float from) { return from; }
INLINE float to_number(Half from) { return half(from.bits); }
INLINE float to_number(BrainHalf from) { return brain_half_to_float(from.bits); }

INLINE void put(float* to, float from) { *to = from; }
INLINE void put(Half* to, float from) { to->bits = to_half(from); }
INLINE void put(BrainHalf* to, float from) {  // rounded to the nearest, ties to even
    union { float f; uint32_t i; } u = {from};
    to->bits = from != from ? 0x7fc0 : uint16_t((u.i + 0x7fff + ((u.i >> 16) & 1)) >> 16);
}

template <class Body> INLINE void with_type(int32_t type, Body&& body) {
    if (type == FLOAT32) body(static_cast<float*>(nullptr));
    else if (type == FLOAT16) body(static_cast<Half*>(nullptr));
    else body(static_cast<BrainHalf*>(nullptr));
}

constexpr float LEAST_EXPONENT = -87.3f;  // exp of less is not told from exp of this: 1e-38, the least normal number
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

// e^x for x <= 0, to 1e-7 of it: 2^n * 2^f with |f| <= 1/2; the polynomial's own error is 2e-9. NaN stays NaN.
INLINE VF exp_of(VF x) {
    x = larger(set1(LEAST_EXPONENT), x);
    const VF n = nearest(mul(x, set1(1.44269504f)));
    const VF f = fma(x, set1(1.925962989e-8f), fma(x, set1(1.44269502f), negate(n)));  // log2(e) in two parts
    VF p = fma(set1(0.00015353361813f), f, set1(0.0013398874445f));
    p = fma(p, f, set1(0.0096184373583f));
    p = fma(p, f, set1(0.05550332471f));
    p = fma(p, f, set1(0.24022647914f));
    p = fma(p, f, set1(0.69314720286f));
    return times_power_of_two(fma(p, f, set1(1.0f)), n);
}

// By a polynomial near zero (its own error is 3e-9), by exp elsewhere.
INLINE VF tanh_of(VF x) {
    const VF z = mul(x, x), size = magnitude(x);
    VF p = fma(set1(-0.005895157652f), z, set1(0.020795971275f));
    p = fma(p, z, set1(-0.053783830153f));
    p = fma(p, z, set1(0.133319241251f));
    p = fma(p, z, set1(-0.33333298002f));
    const VF e = exp_of(mul(size, set1(-2.0f)));
    const VF far = over(minus(set1(1.0f), e), add(set1(1.0f), e));
    return where_less(size, set1(0.6f), fma(mul(p, z), x, x), where_less(x, zero(), negate(far), far));
}

inline float exp_of_one(float x) {
    float found[W];
    store(found, exp_of(set1(x)));
    return found[0];
}

}}  // namespace core_kernels
