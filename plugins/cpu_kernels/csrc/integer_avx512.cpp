// Dot products of bytes, compiled for AVX-512 with VNNI; all else is that of AVX-512.
#include "integer_simd_avx512.h"
#include "integer_formats.h"
#include "instruction_set.h"

namespace core_kernels {
extern const InstructionSet avx512_set;
extern const InstructionSet avx512vnni_set;
const InstructionSet avx512vnni_set = {"avx512vnni", avx512_set.find, avx512_set.elementwise, find_integer, INTEGER_ROWS};
}
