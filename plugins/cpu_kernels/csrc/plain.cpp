// The kernels compiled for one instruction set; setup.py gives this file its own compiler flags.
#include "simd_plain.h"
#include "formats.h"
#include "ggml.h"
#include "matmul.h"
#include "elementwise.h"
#include "instruction_set.h"

namespace core_kernels {
extern const InstructionSet plain_set;
const InstructionSet plain_set = {"plain", find, {rms_norm, gate, rotate}};
}
