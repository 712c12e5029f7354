// Dot products of bytes, compiled for AVX-512 with VNNI; all else is that of AVX-512.
#include "integer_simd_avx512.h"
#include "elementwise.h"
#include "instruction_set.h"
#include "integer_find.h"
#include "softmax_avx512.h"
#include "screen.h"

namespace core_kernels {
extern const InstructionSet avx512_set, avx512vnni_set;
const Screen* find_screen_avx512() { return &screen; }

namespace {
template <class Rows> struct Vnni {
    static constexpr auto multiply = multiply_integer<Rows>;
    static constexpr int64_t least_rows = 1, most_rows = INTEGER_ROWS;
    static constexpr int most_piece = 64;  // with 128 GCC keeps the sums of 3 and 4 rows in memory: three times the time
};
const Packing* find_floats(int32_t packing) { return avx512_set.find(packing); }
const Packing* find_other(const Weight& weight) {
    const Packing* found = find_integer<Vnni>(weight);
    return found ? found : avx512_set.find_other(weight);
}
}  // namespace

// A constant: no code of this file may run where it was not chosen.
constexpr InstructionSet avx512vnni_set = {"avx512vnni", find_floats, {rms_norm, gate, rotate}, find_other, find_screen_avx512};
}
