// A weight that is ready to be multiplied with: what core_kernels_make gives.
#pragma once

#include <memory>

#include "weight.h"

namespace core_kernels {

struct Ready {
    Plan plan;
    const Packing* packing = nullptr;
    std::unique_ptr<Ready> other;  // the same weight for least_rows to most_rows of x, which it prepares otherwise
    int64_t least_rows = 0, most_rows = -1;

    const Ready& of(int64_t rows) const { return rows >= least_rows && rows <= most_rows ? *other : *this; }
};

}  // namespace core_kernels
