// Decoder layers that run one after the other in one call. Mirrored field by field by core_cpu_kernels/stack.py.
//
//   x += output(attention(rotary(q_norm(q)), rotary(k_norm(k)), v))   with q, k, v of attention_norm(x)
//   x += down(activation(gate) * up)                                  with gate, up of mlp_norm(x)
//   logits = head(head_norm(x))                                       after the last layer, where they are wanted
#pragma once

#include "attention.h"

namespace core_kernels {

struct StackLayer {
    const void *q, *k, *v;  // of core_kernels_make; k and v null: q gives all three, side by side
    const void* output;
    const void *gate, *up;  // up null: gate gives both, side by side
    const void* down;
    const float *attention_norm, *mlp_norm;  // weights
    const float *q_norm, *k_norm;            // null: none
    const AttentionLayer* attention;
    int64_t step;  // index of the layer's AttentionStep
    float attention_eps, mlp_eps, q_eps, k_eps;
    int32_t activation;
};

// What a run's time is reported by.
enum StackPart : int32_t { LINEARS = 0, ATTENTION = 1, SMALL = 2, STACK_PARTS = 3 };

struct StackCall {
    float* x;                      // [tokens, hidden]
    const float *cosines, *sines;  // [tokens, k_dim], angle_stride from one token to the next
    AttentionStep* const* steps;   // one for each reach
    double* seconds;               // [STACK_PARTS], added to; null: nobody wants to know
    int64_t tokens, hidden, angle_stride;
    int64_t first, last;           // layers
    const void* head;              // of core_kernels_make; null: none
    const float* head_norm;        // weight
    float* logits;                 // [tokens, outputs of the head]
    float head_eps;
    int64_t row_count;
    const int64_t* rows;           // [row_count], tokens that go on after the last attention; null: all, as with a head
};

}  // namespace core_kernels
