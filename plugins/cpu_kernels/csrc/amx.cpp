// The kernels of machines that have AVX-512 with VNNI, and tiles (AMX) of bytes and of bfloat16.
#include "simd_avx512.h"
#include "amx_codes.h"
#include "elementwise.h"
#include "instruction_set.h"

namespace core_kernels {
extern const InstructionSet avx512_set, amx_set;

const Packing* find_integer_amx(const Weight& weight);
const Screen* find_screen_avx512();

namespace {

template <class Format> const Packing* tiled_packing(int32_t packing_id) {
    static const Tiled tiled = {TILED_ROWS<Format>, X_TERMS, cut_x_of<Format>, multiply_tiles<Format>};
    static const Packing found = [&] {
        Packing copy = *avx512_set.find(packing_id);
        copy.tiled = &tiled;
        return copy;
    }();
    return &found;
}

const Packing* find_tiled(int32_t packing_id) {
    switch (packing_id) {
        case AFFINE4: return tiled_packing<Words<4, false>>(packing_id);
        case AFFINE8: return tiled_packing<Words<8, false>>(packing_id);
        case TABLE4: return tiled_packing<Words<4, true>>(packing_id);
        case HALF: return tiled_packing<Halves<false>>(packing_id);
        case FLOATS: return tiled_packing<FloatSegments>(packing_id);
        case BRAIN_HALF: return tiled_packing<Halves<true>>(packing_id);
        case Q4_0: return tiled_packing<Nibbles<2, false>>(packing_id);
        case Q4_1: return tiled_packing<Nibbles<4, false>>(packing_id);
        case IQ4_NL: return tiled_packing<Nibbles<2, true>>(packing_id);
        case Q5_0: return tiled_packing<Blocks<Q5<2>>>(packing_id);
        case Q5_1: return tiled_packing<Blocks<Q5<4>>>(packing_id);
        case Q8_0: return tiled_packing<Blocks<Q8>>(packing_id);
        case Q2_K: return tiled_packing<Blocks<Q2K>>(packing_id);
        case Q3_K: return tiled_packing<Blocks<Q3K>>(packing_id);
        case Q4_K: return tiled_packing<Blocks<Q45K<false>>>(packing_id);
        case Q5_K: return tiled_packing<Blocks<Q45K<true>>>(packing_id);
        case Q6_K: return tiled_packing<Blocks<Q6K>>(packing_id);
        case IQ4_XS: return tiled_packing<Blocks<IQ4XS>>(packing_id);
    }
    return avx512_set.find(packing_id);
}

}  // namespace

constexpr InstructionSet amx_set = {"amx", find_tiled, {rms_norm, gate, rotate}, find_integer_amx, find_screen_avx512};

}  // namespace core_kernels
