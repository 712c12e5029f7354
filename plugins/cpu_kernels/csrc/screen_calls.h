// The arguments of screen.h: which outputs of a head cannot be the highest, by what a copy of it in bytes says.
#pragma once

#include "weight.h"

namespace core_kernels {

constexpr int64_t SCREEN_STEP = 16;  // columns: `in` is a multiple of it

// Rows of a float weight in bytes, row = scale * code + a rest. Mirrored field by field by core_cpu_kernels/screen.py.
// W is the width of the instruction set; rows are filled up to a multiple of it.
struct ScreenWeight {
    int64_t out, in;
    uint8_t* codes;      // [out / W][in / 4][W][4], 128 more than the code
    float* scales;       // [out]
    float* rests;        // [out]: lengths of the rests
    float* lengths;      // [out]: of the rows
    float* code_length;  // [out / W]: of the longest row of codes of each W
    const float* bias;   // [out] and no more, or null
    float longest;       // row of codes
};

// A row of x in whole numbers, x = scale * q + a rest.
struct ScreenRow {
    float scale, length, rest;  // lengths of x and of its rest, the latter with what floats round
    int32_t sums[2];            // of q, or of its high and its low bytes
};

struct ScreenCall {
    const ScreenWeight* weight;
    const ScreenRow* rows;
    const int8_t* numbers;  // [count][row_bytes]
    int64_t count, row_bytes;
    float* out;  // [count, out]
};

struct Screen {
    int64_t width;  // W
    int64_t (*row_bytes)(int64_t in);
    void (*fill)(const ScreenWeight&, const Weight& floats, int64_t first, int64_t last);  // [first, last) of W rows each
    void (*prepare)(const ScreenWeight&, const float* x, int64_t rows, int8_t* numbers, ScreenRow* made);
    // Fills columns of W each, [first, last), of `out`; lower and upper [count] are the highest that is sure to be reached
    // there, and that may be.
    void (*multiply)(const ScreenCall&, int64_t first, int64_t last, float* lower, float* upper);
    // Sets marks[n - first * W] for columns n that may reach `goal` in one row.
    void (*mark)(const ScreenCall&, int64_t row, float goal, int64_t first, int64_t last, uint8_t* marks);
};

}  // namespace core_kernels
