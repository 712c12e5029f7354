// What a step does beside its matrices, each in one pass over float32 numbers: RMSNorm, gated activations, rotary embedding.
//
// Written on whole vectors in the compiler's own operators; what is left of a row goes through a padded copy.
#pragma once

#include <cmath>
#include <cstring>

#include "elementwise_calls.h"

namespace core_kernels { namespace {

typedef int32_t Integers __attribute__((vector_size(4 * W)));

// e^x to 1e-7: x = n ln 2 + r with |r| <= ln 2 / 2, Taylor's series in r, then n into the exponent.
INLINE VF exponential(VF x) {
    const VF lowest = set1(-87.0f), highest = set1(88.0f);
    x = x < lowest ? lowest : x;
    x = x > highest ? highest : x;
    const VF shift = set1(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
    VF shifted = fma(x, set1(1.44269504088896341f), shift);
    const VF n = shifted - shift;
    VF r = fma(n, set1(-0.693145751953125f), x);
    r = fma(n, set1(-1.42860682030941723e-6f), r);
    VF y = set1(1.0f / 5040);
    y = fma(y, r, set1(1.0f / 720));
    y = fma(y, r, set1(1.0f / 120));
    y = fma(y, r, set1(1.0f / 24));
    y = fma(y, r, set1(1.0f / 6));
    y = fma(y, r, set1(0.5f));
    y = fma(y, r, set1(1.0f));
    y = fma(y, r, set1(1.0f));
    return VF(Integers(y) + (Integers(shifted) << 23));
}

INLINE VF sigmoid(VF x) { return set1(1.0f) / (set1(1.0f) + exponential(negate(x))); }

// ------------------------------------------------------------------------------------------------ RMSNorm

void rms_norm(const NormCall& call, int64_t first, int64_t last) {
    const int64_t width = call.width, whole = width / W * W;
    for (int64_t r = first; r < last; r++) {
        const float* x = call.x + r * width;
        float* out = call.out + r * width;
        const float* residual = call.residual ? call.residual + r * width : nullptr;
        float* summed = residual ? call.summed + r * width : nullptr;
        VF squares[4] = {zero(), zero(), zero(), zero()};
        const auto sum_at = [&](int64_t at) {
            VF v = load(x + at);
            if (residual) store(summed + at, v = add(v, load(residual + at)));
            return v;
        };
        int64_t at = 0;
        for (; at + 4 * W <= whole; at += 4 * W)
            unrolled<4>([&](auto i) { const VF v = sum_at(at + i * W); squares[i] = fma(v, v, squares[i]); });
        for (; at < whole; at += W) { const VF v = sum_at(at); squares[0] = fma(v, v, squares[0]); }
        float total = sum(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
        for (; at < width; at++) {
            const float v = residual ? summed[at] = residual[at] + x[at] : x[at];
            total += v * v;
        }
        const float factor = 1.0f / std::sqrt(total / float(width) + call.eps);
        const float* from = residual ? summed : x;
        for (at = 0; at < whole; at += W) store(out + at, mul(mul(load(from + at), set1(factor)), load(call.weight + at)));
        for (; at < width; at++) out[at] = from[at] * factor * call.weight[at];
    }
}

// ------------------------------------------------------------------------------------------------ gated activations

INLINE VF activated(VF x, int32_t kind) {
    if (kind == GELU_TANH) {  // (1 + tanh(y)) / 2 = sigmoid(2 y)
        const VF y = mul(mul(set1(1.59576912160573f), x), fma(mul(x, x), set1(0.044715f), set1(1.0f)));
        return mul(x, sigmoid(y));
    }
    return mul(x, sigmoid(x));
}

void gate(const GateCall& call, int64_t first, int64_t last) {
    const int64_t width = call.width, whole = width / W * W;
    for (int64_t r = first; r < last; r++) {
        const float *gates = call.gate + r * call.gate_stride, *ups = call.up + r * call.up_stride;
        float* out = call.out + r * call.out_stride;
        for (int64_t at = 0; at < whole; at += W) store(out + at, mul(activated(load(gates + at), call.kind), load(ups + at)));
        if (whole < width) {
            float padded[W] = {};
            std::memcpy(padded, gates + whole, size_t(width - whole) * 4);
            store(padded, activated(load(padded), call.kind));
            for (int64_t at = whole; at < width; at++) out[at] = padded[at - whole] * ups[at];
        }
    }
}

// ------------------------------------------------------------------------------------------------ rotary

// Halves: (a, b) -> (a cos - b sin, b cos + a sin), with the cosines and sines of each half as they are given.
void rotate(const RotateCall& call, int64_t first, int64_t last) {
    const int64_t half = call.width / 2, whole = half / W * W;
    for (int64_t t = first; t < last; t++) {
        const float *cosines = call.cosines + t * call.angle_stride, *sines = call.sines + t * call.angle_stride;
        for (int64_t h = 0; h < call.heads; h++) {
            float *a = call.x + t * call.token_stride + h * call.head_stride, *b = a + half;
            int64_t at = 0;
            for (; at < whole; at += W) {
                const VF low = load(a + at), high = load(b + at);
                store(a + at, fma(low, load(cosines + at), negate(mul(high, load(sines + at)))));
                store(b + at, fma(high, load(cosines + half + at), mul(low, load(sines + half + at))));
            }
            for (; at < half; at++) {
                const float low = a[at], high = b[at];
                a[at] = low * cosines[at] - high * sines[at];
                b[at] = high * cosines[half + at] + low * sines[half + at];
            }
        }
    }
}

}}  // namespace core_kernels
