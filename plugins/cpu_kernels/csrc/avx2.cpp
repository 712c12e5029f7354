// The kernels compiled for one instruction set; setup.py gives this file its own compiler flags.
#include "simd_avx2.h"
#include "find.h"
#include "lanes.h"
#include "elementwise.h"
#include "instruction_set.h"

namespace core_kernels {
extern const InstructionSet avx2_set;
const Packing* find_integer_avx2(const Weight& weight);
const Screen* find_screen_avx2();

static const Packing* find_other(const Weight& weight) {
    const Packing* found = find_lanes(weight);
    return found ? found : find_integer_avx2(weight);
}

const InstructionSet avx2_set = {"avx2", find, {rms_norm, gate, rotate}, find_other, find_screen_avx2};
}
