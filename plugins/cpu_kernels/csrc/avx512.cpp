// The kernels compiled for one instruction set; setup.py gives this file its own compiler flags.
#include "simd_avx512.h"
#include "find.h"
#include "lanes.h"
#include "elementwise.h"
#include "instruction_set.h"

namespace core_kernels {
extern const InstructionSet avx512_set;
const Screen* find_screen_avx2();
const InstructionSet avx512_set = {"avx512", find, {rms_norm, gate, rotate}, find_lanes, find_screen_avx2};
}
