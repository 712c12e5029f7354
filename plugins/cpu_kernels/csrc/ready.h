// A weight that is ready to be multiplied with: what core_kernels_make gives.
#pragma once

#include "weight.h"

namespace core_kernels {

struct Ready {
    Plan plan;
    const Packing* packing = nullptr;
};

}  // namespace core_kernels
