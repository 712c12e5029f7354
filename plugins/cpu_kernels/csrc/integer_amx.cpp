// Dot products of bytes, compiled for machines with tiles of bytes.
#include "integer_simd_avx512.h"
#include "integer_amx.h"
#include "integer_find.h"

namespace core_kernels {

namespace {
template <class Rows> struct Amx {
    static constexpr auto multiply = multiply_amx<Rows>;
    static constexpr int64_t least_rows = 1;
    static constexpr int most_piece = 128;
    static constexpr int64_t most_rows = Rows::PIECE >= 64 ? 512 : Rows::PIECE == 32 ? 64 : 32;  // scaling is what costs
};
}  // namespace

const Packing* find_integer_amx(const Weight& weight) { return find_integer<Amx>(weight); }

}  // namespace core_kernels
