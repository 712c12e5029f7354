// Products of words of 16 bits, compiled for AVX2; all else is in avx2.cpp.
#include "integer_simd_avx2.h"
#include "integer_find.h"
#include "softmax_avx2.h"
#include "screen.h"

namespace core_kernels {

namespace {
// One row of bytes is as quickly made floats as it is turned.
template <class Rows> constexpr int64_t FROM_ROWS = 1;
template <> constexpr int64_t FROM_ROWS<Q8Rows> = 2;
template <int PIECE> constexpr int64_t FROM_ROWS<AffineRows<8, PIECE>> = 2;

template <class Rows> struct Avx2 {
    static constexpr auto multiply = multiply_integer<Rows>;
    static constexpr int64_t least_rows = FROM_ROWS<Rows>, most_rows = INTEGER_ROWS;
    static constexpr int most_piece = 64;
};
}  // namespace

const Packing* find_integer_avx2(const Weight& weight) { return find_integer<Avx2>(weight); }
const Screen* find_screen_avx2() { return &screen; }

}  // namespace core_kernels
