// Which loops run for which number of rows, and which format a packing is.
#pragma once

#include "formats.h"
#include "ggml.h"
#include "matmul.h"
#include "panels.h"

namespace core_kernels { namespace {

template <class Format, int ROWS> void few_rows_of(const Plan& plan, const Call& call, int64_t first, int64_t last) {
    if constexpr (ROWS > 1) if (call.rows == ROWS) return few_rows<Format, ROWS>(plan, call, first, last);
    if constexpr (ROWS > 2) few_rows_of<Format, ROWS - 1>(plan, call, first, last);
}

template <class Format> void multiply(const Plan& plan, const Call& call, int64_t first, int64_t last) {
    if (call.rows == 1) one_row<Format>(plan, call, first, last);
    else if (call.rows <= Format::FEW) few_rows_of<Format, Format::FEW>(plan, call, first, last);
    else if (call.rows < PANEL_ROWS) many_rows<Format>(plan, call, first, last);
    else panels<Format>(plan, call, first, last);
}

template <class Format> const Packing* packing() {
    static const Packing found = {setup<Format>, prepare<Format>, multiply<Format>, sum_floats<Format>};
    return &found;
}

// Of many rows of x, panels take halves better than tiles; lanes.h takes them better still.
template <bool BRAIN> void multiply_halves(const Plan& plan, const Call& call, int64_t first, int64_t last) {
    if (call.rows < PANEL_ROWS) multiply_floats<Halves<BRAIN>>(plan, call, first, last);
    else panels<Halves<BRAIN>>(plan, call, first, last);
}

template <class Format, void (*MULTIPLY)(const Plan&, const Call&, int64_t, int64_t)> const Packing* floats_packing() {
    static const Packing found = {setup<Format>, prepare<Format>, MULTIPLY, sum_floats<Format>};
    return &found;
}

inline const Packing* find(int32_t packing_id) {
    switch (packing_id) {
        case AFFINE4: return packing<Words<4, false>>();
        case AFFINE8: return packing<Words<8, false>>();
        case TABLE4: return packing<Words<4, true>>();
        case HALF: return floats_packing<Halves<false>, multiply_halves<false>>();
        case FLOATS: return floats_packing<Floats, multiply_floats<Floats>>();
        case BRAIN_HALF: return floats_packing<Halves<true>, multiply_halves<true>>();
        case Q4_0: return packing<Nibbles<2, false>>();
        case Q4_1: return packing<Nibbles<4, false>>();
        case IQ4_NL: return packing<Nibbles<2, true>>();
        case Q5_0: return packing<Blocks<Q5<2>>>();
        case Q5_1: return packing<Blocks<Q5<4>>>();
        case Q8_0: return packing<Blocks<Q8>>();
        case Q2_K: return packing<Blocks<Q2K>>();
        case Q3_K: return packing<Blocks<Q3K>>();
        case Q4_K: return packing<Blocks<Q45K<false>>>();
        case Q5_K: return packing<Blocks<Q45K<true>>>();
        case Q6_K: return packing<Blocks<Q6K>>();
        case IQ4_XS: return packing<Blocks<IQ4XS>>();
    }
    return nullptr;
}

}}  // namespace core_kernels
