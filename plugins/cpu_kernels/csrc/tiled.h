// What the driver of tiled multiplications (tiled.cpp) and the code of an instruction set with tiles share.
#pragma once

#include "weight.h"

namespace core_kernels {

constexpr int64_t TILED_X_ROWS = 16;  // rows of x in a tile

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

// How the columns of a weight are cut into blocks, and where a block's tiles of x lie: [blocks][tiles of 16 rows].
struct TiledColumns {
    int64_t rows, blocks, segments, lanes, x_terms;  // lanes: columns of a segment

    TiledColumns(const Tiled& tiled, const Plan& plan, int64_t rows);
    int64_t from(int64_t block) const { return segments * block / blocks; }
    int64_t tiles() const { return (rows + TILED_X_ROWS - 1) / TILED_X_ROWS; }
    int64_t numbers(int64_t block) const { return numbers_between(from(block), from(block + 1)); }  // of a tile's 16 rows
    int64_t offset(int64_t block) const {  // of a block's first tile
        int64_t found = 0;
        for (int64_t b = 0; b < block; b++) found += numbers(b) * tiles();
        return found;
    }

  private:
    // Columns with place for the sums over each 32 of them.
    int64_t numbers_between(int64_t from, int64_t to) const {
        const int64_t columns = (to - from) * lanes;
        return (columns + (columns + 1023) / 1024 * 32) * x_terms * TILED_X_ROWS;
    }
};

bool machine_has_tiles();  // and this process may use them

// out[rows, out] = x[rows, in] @ weight.T + bias. False: out of memory.
bool multiply_tiled(const Tiled& tiled, const Plan& plan, const float* x, float* out, int64_t rows);

}  // namespace core_kernels
