// One multiplication of a longer run: the memory that it needs, x made ready, and ranges of its outputs.
#pragma once

#include "ready.h"

namespace core_kernels { namespace {

struct Product {
    const Ready* ready = nullptr;  // for so many rows
    int64_t rows = 0;
    float* memory = nullptr;  // `floats()` of them
    float* out = nullptr;     // [rows, outputs]

    int64_t outputs() const { return ready->plan.weight.out; }
    int64_t inputs() const { return ready->plan.weight.in; }
    int64_t x_floats() const { return rows * ready->plan.x_stride; }
    int64_t floats() const { return x_floats() + (rows == 1 ? ready->packing->sum_floats(ready->plan) : 0); }

    // Rows [first, last) of x [rows, inputs]: all of them, or at least two (what is one row is prepared otherwise).
    void prepare(const float* x, int64_t first, int64_t last) const {
        ready->packing->prepare(ready->plan, x + first * inputs(), last - first, memory + first * ready->plan.x_stride, memory + x_floats());
    }

    void multiply(int64_t first, int64_t last) const {
        ready->packing->multiply(ready->plan, {memory, memory + x_floats(), out, rows}, first, last);
    }
};

}}  // namespace core_kernels
