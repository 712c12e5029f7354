// Squares of W x W floats, turned about their diagonal in registers.
#pragma once

#include "weight.h"

namespace core_kernels { namespace {

typedef int32_t Indices __attribute__((vector_size(4 * W)));

// Swaps the half of each 2 * STEP lanes that the other row of a pair should have: log2(W) times makes a transposition.
template <int STEP> INLINE void swap_halves(VF* rows) {
    Indices low, high;
    for (int lane = 0; lane < W; lane++) {
        low[lane] = lane & STEP ? lane - STEP + W : lane;
        high[lane] = lane & STEP ? lane + W : lane + STEP;
    }
    unrolled<W>([&](auto r) {
        if constexpr (!(r & STEP)) {
            const VF a = rows[r], b = rows[r + STEP];
            rows[r] = __builtin_shuffle(a, b, low);
            rows[r + STEP] = __builtin_shuffle(a, b, high);
        }
    });
}

template <int STEP> INLINE void transpose_registers(VF* rows) {
    swap_halves<STEP>(rows);
    if constexpr (STEP > 1) transpose_registers<STEP / 2>(rows);
}

// [W][W] floats, `stride` apart, turned about their diagonal on the way from one place to another.
INLINE void transpose(const float* from, float* to, int64_t to_stride) {
    VF rows[W];
    unrolled<W>([&](auto r) { rows[r] = load(from + r * W); });
    transpose_registers<W / 2>(rows);
    unrolled<W>([&](auto r) { store(to + r * to_stride, rows[r]); });
}

}}  // namespace core_kernels
