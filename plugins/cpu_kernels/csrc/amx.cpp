// AVX-512 with VNNI, and tiles (AMX) where they are faster.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "simd_avx512.h"
#include "elementwise.h"
#include "instruction_set.h"

namespace core_kernels {
extern const InstructionSet avx512_set, amx_set;
const Packing* find_integer_amx(const Weight& weight);

namespace {
const Packing* find_floats(int32_t packing) { return avx512_set.find(packing); }
}  // namespace

constexpr InstructionSet amx_set = {"amx", find_floats, {rms_norm, gate, rotate}, find_integer_amx};

// And this process may use them: Linux has to be asked, since a thread then takes 8 KB more to save.
bool machine_has_tiles() {
    constexpr unsigned NEEDED = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, int8
    constexpr long ASK = 0x1023, TILES = 18;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & NEEDED) == NEEDED && syscall(SYS_arch_prctl, ASK, TILES) == 0;
}
}  // namespace core_kernels
