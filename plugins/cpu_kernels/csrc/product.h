// One multiplication of a longer run: the memory that it needs, x made ready, and ranges of its outputs.
#pragma once

#include "ready.h"
#include "tiled.h"

namespace core_kernels { namespace {

struct Product {
    const Ready* ready = nullptr;  // for so many rows
    int64_t rows = 0;
    float* memory = nullptr;  // `floats()` of them
    float* out = nullptr;     // [rows, outputs]

    Product at(int64_t offset) const { return {ready, rows, memory + offset, out}; }
    int64_t outputs() const { return ready->plan.weight.out; }
    int64_t inputs() const { return ready->plan.weight.in; }
    const Tiled* tiled() const {
        const Tiled* found = ready->packing->tiled;
        return found && rows >= found->from_rows ? found : nullptr;
    }
    int64_t x_floats() const {
        if (!tiled()) return ready->packing->x_floats(ready->plan, rows);
        const TiledColumns columns(*tiled(), ready->plan, rows);
        return (columns.offset(columns.blocks) + 1) / 2;
    }
    int64_t floats() const { return x_floats() + (rows == 1 ? ready->packing->sum_floats(ready->plan) : 0); }

    int64_t x_rows() const { return tiled() ? TILED_X_ROWS : ready->packing->x_rows; }  // that are prepared together

    // Rows [first, last) of x [rows, inputs]: all of them, or at least two (what is one row is prepared otherwise). `first`
    // is a multiple of x_rows(), and so is `last` but for the last rows.
    void prepare(const float* x, int64_t first, int64_t last) const {
        const auto cut = [&](const Tiled& tiled, const TiledColumns& columns, int64_t block, int64_t t) {
            tiled.cut_x(ready->plan, x, t * TILED_X_ROWS, rows, columns.from(block), columns.from(block + 1), tiles(columns, block) + t * columns.numbers(block));
        };
        if (!tiled()) return ready->packing->prepare(ready->plan, x + first * inputs(), last - first, memory + first * ready->plan.x_stride, memory + x_floats());
        const TiledColumns columns(*tiled(), ready->plan, rows);
        for (int64_t block = 0; block < columns.blocks; block++)
            for (int64_t t = first / TILED_X_ROWS; t * TILED_X_ROWS < last; t++) cut(*tiled(), columns, block, t);
    }

    void multiply(int64_t first, int64_t last, Stretch after) const {
        if (!tiled()) return ready->packing->multiply(ready->plan, {memory, memory + x_floats(), out, rows, after}, first, last);
        const TiledColumns columns(*tiled(), ready->plan, rows);
        for (int64_t block = 0; block < columns.blocks; block++)
            tiled()->multiply(ready->plan, {tiles(columns, block), out, rows, columns.from(block), columns.from(block + 1)}, first, last);
    }

  private:
    uint16_t* tiles(const TiledColumns& columns, int64_t block) const { return reinterpret_cast<uint16_t*>(memory) + columns.offset(block); }
};

}}  // namespace core_kernels
