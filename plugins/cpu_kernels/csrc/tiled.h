// What the driver of tiled multiplications (tiled.cpp) and the code of an instruction set with tiles share.
#pragma once

#include "weight.h"

namespace core_kernels {

// out[rows, n] (+)= x[rows, columns of segments from to to] @ weight.T, for a block of rows and columns.
struct TiledCall {
    const uint16_t* x;  // cut into tiles
    float* out;         // the block's first row
    int64_t rows, from, to;
};

// How an instruction set multiplies many rows of x with tiles of 16 rows and 32 columns.
struct Tiled {
    int64_t from_rows;  // of x, from which on it is used
    int64_t x_terms;    // of two bytes, that a number of x is cut into
    void (*cut_x)(const Plan&, const float* x, int64_t row, int64_t rows, int64_t from, int64_t to, uint16_t* tiles);
    void (*multiply)(const Plan&, const TiledCall&, int64_t first, int64_t last);  // rows [first, last) of the weight
};

bool machine_has_tiles();  // and this process may use them

// out[rows, out] = x[rows, in] @ weight.T + bias. False: out of memory.
bool multiply_tiled(const Tiled& tiled, const Plan& plan, const float* x, float* out, int64_t rows);

}  // namespace core_kernels
