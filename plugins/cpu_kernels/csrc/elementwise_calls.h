// The arguments of elementwise.h, which the C ABI fills. All numbers are float32, all strides count floats.
#pragma once

#include "weight.h"

namespace core_kernels {

// out = s / sqrt(mean(s^2) + eps) * weight, with s = x, or residual + x, which then goes into `summed`.
struct NormCall {
    const float* x;        // [rows, width]
    const float* residual; // [rows, width] or null
    float* summed;         // [rows, width] or null; may be the residual
    const float* weight;   // [width]
    float* out;            // [rows, width]
    int64_t rows, width;
    float eps;
};

enum Activation : int32_t { SILU = 1, GELU_TANH = 2 };

// out = activation(gate) * up
struct GateCall {
    const float *gate, *up;  // [rows, width]
    float* out;              // [rows, width]
    int64_t rows, width, gate_stride, up_stride, out_stride;
    int32_t kind;
};

// x [tokens, heads, width], turned where it lies.
struct RotateCall {
    float* x;
    const float *cosines, *sines;  // [tokens, width]
    int64_t tokens, heads, width, token_stride, head_stride, angle_stride;
};

struct Elementwise {
    void (*rms_norm)(const NormCall&, int64_t first, int64_t last);  // rows [first, last)
    void (*gate)(const GateCall&, int64_t first, int64_t last);
    void (*rotate)(const RotateCall&, int64_t first, int64_t last);
};

}  // namespace core_kernels
