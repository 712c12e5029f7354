// A weight that is ready to be multiplied with: what core_kernels_make gives.
#pragma once

#include <memory>

#include "weight.h"

namespace core_kernels {

struct Ready {
    Plan plan;
    const Packing* packing = nullptr;
    std::unique_ptr<Ready> few;  // the same weight for few_from to few_rows rows of x, which it prepares otherwise
    int64_t few_from = 0, few_rows = 0;

    const Ready& of(int64_t rows) const { return rows >= few_from && rows <= few_rows ? *few : *this; }
};

}  // namespace core_kernels
