// Which packing has products of integers. Functions<Rows> has the loops, `multiply`, `least_rows` to `most_rows`, and
// `most_piece`: columns whose products are added up before they are scaled.
#pragma once

#include "integer_ggml.h"
#include "integer_groups.h"

namespace core_kernels { namespace {

template <template <class> class Functions, class Rows> const Packing* integer_packing() {
    static const Packing found = {setup_integer<Rows>, prepare_integer<Rows>, Functions<Rows>::multiply, no_sum_floats, Functions<Rows>::most_rows, nullptr, Functions<Rows>::least_rows};
    return &found;
}

template <template <class> class Functions, int BITS> const Packing* affine_integer(const Weight& weight) {
    if constexpr (Functions<AffineRows<BITS, 64>>::most_piece >= 128) if (weight.group % 128 == 0) return integer_packing<Functions, AffineRows<BITS, 128>>();
    if (weight.group % 64 == 0) return integer_packing<Functions, AffineRows<BITS, 64>>();
    if (weight.group % 32 == 0) return integer_packing<Functions, AffineRows<BITS, 32>>();
    return nullptr;
}

// For a weight that its packing for floats accepts; null: there is none.
template <template <class> class Functions> const Packing* find_integer(const Weight& weight) {
    switch (weight.packing) {
        case AFFINE4: return affine_integer<Functions, 4>(weight);
        case AFFINE8: return affine_integer<Functions, 8>(weight);
        case Q4_0: return integer_packing<Functions, Nibble0Rows<false>>();
        case Q4_1: return integer_packing<Functions, Q41Rows>();
        case Q5_0: return integer_packing<Functions, Q5Rows<false>>();
        case Q5_1: return integer_packing<Functions, Q5Rows<true>>();
        case Q8_0: return integer_packing<Functions, Q8Rows>();
        case Q2_K: return integer_packing<Functions, Q2KRows>();
        case Q3_K: return integer_packing<Functions, Q3KRows>();
        case Q4_K: return integer_packing<Functions, Q45KRows<false>>();
        case Q5_K: return integer_packing<Functions, Q45KRows<true>>();
        case Q6_K: return integer_packing<Functions, Q6KRows>();
        case IQ4_NL: return integer_packing<Functions, Nibble0Rows<true>>();
        case IQ4_XS: return integer_packing<Functions, IQ4XSRows>();
    }
    return nullptr;
}

}}  // namespace core_kernels
