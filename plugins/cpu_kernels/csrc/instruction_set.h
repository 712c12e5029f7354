// The code of one instruction set, as library.cpp chooses it.
#pragma once

#include "elementwise_calls.h"
#include "screen_calls.h"
#include "weight.h"

namespace core_kernels {

struct InstructionSet {
    const char* name;
    const Packing* (*find)(int32_t packing);  // null: none
    Elementwise elementwise;
    const Packing* (*find_other)(const Weight&) = nullptr;  // faster for some numbers of rows of x; null, or answers null: none
    const Screen* (*find_screen)() = nullptr;
};

}  // namespace core_kernels
