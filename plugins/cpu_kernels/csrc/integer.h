// Few rows of x times weights of at most 8 bits, by dot products of integers.
//
// x is brought to 16 bits once a call: x = scale * q with one scale for X_BLOCK columns of a row and |q| <= LARGEST. Codes are
// unsigned bytes and stay exact. Where there are dot products of bytes, q is cut into two signed ones, 256 * high + low, so that
//     sum(code * x) = scale * (256 * sum(code * high) + sum(code * low))
// with two sums that are exact integers; elsewhere q is multiplied as it is, in products of words, and there is one. The error
// is that of q alone: at most scale / 2 a column.
//
// A weight is decoded 16 rows (the lanes of a vector) and at most CHUNK columns at a time into the first cache, four columns
// of every row side by side, as instructions for dot products want them: [columns / 4][rows][4]. Then it is multiplied with
// all rows of x. No sum runs across lanes.
//
// A `Rows` knows a packing:
//   PIECE              columns that share a scale; the sums of so many are scaled at once
//   MIDDLE             what codes stand for zero; -1: there is an offset for each scale
//   PAIRED             four columns of a step are every second one: 0 2 4 6, then 1 3 5 7
//   fits(weight)       whether there is a kernel for it
//   decode(n, from, to, decoded)   16 rows from n on, columns [from, to)
#pragma once

#include <algorithm>
#include <cstring>

#include "matmul.h"

namespace core_kernels { namespace {

constexpr int64_t X_BLOCK = 128, CHUNK = 1024;
constexpr float LARGEST = 127 * 256 + 127;
constexpr float SMALL = 0x1p-64f, UP = 0x1p64f;

// One row of a prepared x: X_PARTS parts of the same shape, `half` bytes apart: the high and the low bytes of q, or all of q.
struct IntegerX {
    int64_t bytes, blocks, pieces, half;  // bytes: of a part's numbers

    IntegerX(const Weight& weight, int64_t piece)
        : bytes((weight.in + 63) / 64 * 64 * X_NUMBER), blocks((weight.in + X_BLOCK - 1) / X_BLOCK), pieces(weight.in / piece) {
        half = (bytes + 4 * (X_PARTS == 2 ? std::max(blocks, pieces) : blocks + pieces) + 63) / 64 * 64 + 64;
        if (half % 1024 == 0) half += 64;  // rows must not start at the same place of a cache page
    }
    int64_t stride() const { return X_PARTS * half / 4; }  // floats from one row to the next

    static int8_t* at(const float* row) { return reinterpret_cast<int8_t*>(const_cast<float*>(row)); }
    int8_t* numbers(const float* row, int64_t column) const { return at(row) + column * X_NUMBER; }  // of the first part
    float* scales(const float* row) const { return reinterpret_cast<float*>(at(row) + bytes); }      // [blocks]
    float* sums(const float* row) const {  // [pieces]: of x, or as integers those of q times minus the middle code
        return reinterpret_cast<float*>(at(row) + bytes + (X_PARTS == 2 ? half : 4 * blocks));
    }
};

struct Decoded {
    uint8_t* codes;           // [columns / 4][W][4]
    float *scales, *offsets;  // [columns / PIECE][W]
};

// ---------------------------------------------------------------------------------------------------- what packings share

// The bytes of the W rows that come next, asked for a little at a time while these are decoded.
struct NextRows {
    const uint8_t *at, *end;
    int64_t lines;

    // `units`: how often `ask` will be called for columns [from, to) of a row
    NextRows(const Weight& weight, int64_t n, int64_t from, int64_t to, int64_t units) {
        const uint8_t* next = weight.codes + (n + W) * weight.row_bytes;
        const int64_t bytes = n + 2 * W <= weight.out ? W * weight.row_bytes : 0;
        at = next + bytes * from / weight.in, end = next + bytes * to / weight.in;
        lines = ((end - at) / 64 + units) / units;
    }
    INLINE void ask() {
        for (int64_t i = 0; i < lines && at < end; i++, at += 64) __builtin_prefetch(at, 0, 2);
    }
};

template <int BYTE> INLINE VI byte_of(VI words) { return mask(shift_right<8 * BYTE>(words), 255); }

// Four neighbouring codes of 4 bits for each half of the bytes of a word.
INLINE void store_nibbles(uint8_t* low, uint8_t* high, VI words) {
    store_codes(low, mask(words, 0x0f0f0f0f));
    store_codes(high, mask(shift_right<4>(words), 0x0f0f0f0f));
}

// ---------------------------------------------------------------------------------------------------- x

template <class Rows> bool setup_integer(Plan& plan) {
    plan.x_stride = IntegerX(plan.weight, Rows::PIECE).stride();
    return plan.weight.out >= W && plan.weight.in % Rows::PIECE == 0;
}

inline int64_t no_sum_floats(const Plan&) { return 0; }

// One block of a row. What is not finite gives a scale of NaN, and so NaN.
template <class Rows> INLINE void prepare_block(const float* x, int64_t columns, int8_t* numbers, int64_t half, float* scale, float* sums) {
    const float most = largest_magnitude(x, columns);
    const float up = most < SMALL ? UP : 1.0f;  // what is so small has no finite reciprocal
    *scale = most / LARGEST;
    const VF first = set1(up), factor = set1(most > 0 ? LARGEST / (most * up) : 0);
    constexpr int VECTORS = Rows::PIECE < W ? 1 : Rows::PIECE / W;
    for (int64_t k = 0; k < columns; k += VECTORS * W) {
        VI sum = no_dots();
        for (int v = 0; v < VECTORS; v++) {
            const VI q = rounded(mul(mul(load(x + k + v * W), first), factor));
            sum = plus(sum, q);
            store_numbers(q, numbers + (k + v * W) * X_NUMBER, half, Rows::PAIRED);
        }
        const int32_t found = total(sum);
        if constexpr (Rows::MIDDLE < 0) {
            sums[k / Rows::PIECE] = *scale * float(found);
        } else {
            const int32_t minus = -Rows::MIDDLE * found;
            memcpy(sums + k / Rows::PIECE, &minus, 4);
        }
    }
}

template <class Rows> void prepare_integer(const Plan& plan, const float* x, int64_t rows, float* prepared, float*) {
    const Weight& weight = plan.weight;
    const IntegerX to(weight, Rows::PIECE);
    float* ordered = weight.order ? worker_memory(weight.in) : nullptr;
    for (int64_t m = 0; m < rows; m++) {
        const float* from = x + m * weight.in;
        float* row = prepared + m * plan.x_stride;
        if (weight.order) {
            for (int64_t k = 0; k < weight.in; k++) ordered[k] = from[weight.order[k]];
            from = ordered;
        }
        for (int64_t k = 0; k < weight.in; k += X_BLOCK)
            prepare_block<Rows>(from + k, std::min(X_BLOCK, weight.in - k), to.numbers(row, k), to.half, to.scales(row) + k / X_BLOCK, to.sums(row) + k / Rows::PIECE);
    }
}

// ---------------------------------------------------------------------------------------------------- products

// Where a tile of sums goes: lanes [skip, W) of out[row * stride].
struct Target {
    float* out;
    int64_t stride;
    const float* before;  // what is added; null: nothing
    int64_t before_stride;
    int skip;
};

// Sums of one piece, for ROWS rows of x.
template <class Rows, int ROWS> PIECE_CALL void integer_piece(const uint8_t* codes, const int8_t* x, int64_t half, VI* sums) {
    VI parts[X_PARTS][ROWS];  // by part: of structures by row GCC keeps some in memory
    unrolled<X_PARTS>([&](auto part) { unrolled<ROWS>([&](auto r) { parts[part][r] = no_dots(); }); });
    unrolled<Rows::PIECE / 4>([&](auto step) {
        const Codes four = load_codes(codes + step * 4 * W);
        unrolled<ROWS>([&](auto r) {
            unrolled<X_PARTS>([&](auto part) {
                parts[part][r] = dots(parts[part][r], four, x + (X_PARTS * r + part) * half + step * 4 * X_NUMBER);
            });
        });
    });
    unrolled<ROWS>([&](auto r) { sums[r] = X_PARTS == 2 ? plus(times_256(parts[0][r]), parts[X_PARTS - 1][r]) : parts[0][r]; });
}

// Scales the sums of the piece at column `at` and adds them up: sum_of(r) for row r of x.
template <class Rows, int ROWS, class Sums>
INLINE void scale_piece(const Decoded& decoded, const IntegerX& x, const float* row, int64_t from, int64_t at, const Sums& sum_of, VF* block, VF* all) {
    const int64_t stride = x.stride(), piece = (at - from) / Rows::PIECE * W;
    const float* x_sums = x.sums(row) + at / Rows::PIECE;
    const VF scale = load(decoded.scales + piece);
    if constexpr (Rows::MIDDLE < 0) {
        const VF offset = load(decoded.offsets + piece);
        unrolled<ROWS>([&](auto r) {
            block[r] = fma(to_float(sum_of(r)), scale, block[r]);
            all[r] = fma(set1(x_sums[r * stride]), offset, all[r]);
        });
    } else {
        unrolled<ROWS>([&](auto r) {
            int32_t centre;
            memcpy(&centre, x_sums + r * stride, 4);
            block[r] = fma(to_float(plus(sum_of(r), set1_integer(centre))), scale, block[r]);
        });
    }
}

// Scales what a block of x with one scale came to, from column k on, and adds it to all.
template <int ROWS> INLINE void scale_block(const IntegerX& x, const float* row, int64_t k, const VF* block, VF* all) {
    unrolled<ROWS>([&](auto r) { all[r] = fma(block[r], set1(x.scales(row)[r * x.stride() + k / X_BLOCK]), all[r]); });
}

template <int ROWS> INLINE void add_rows(const Target& target, const VF* all) {
    unrolled<ROWS>([&](auto r) {
        const float* before = target.before ? target.before + r * target.before_stride : nullptr;
        add_lanes(target.out + r * target.stride, before, target.skip, all[r]);
    });
}

// ROWS rows of x from `row` on, columns [from, to), which start where `decoded` does.
template <class Rows, int ROWS> struct IntegerTile {
    static void run(const Decoded& decoded, const IntegerX& x, const float* row, int64_t from, int64_t to, const Target& target) {
        VF all[ROWS];
        unrolled<ROWS>([&](auto r) { all[r] = zero(); });
        for (int64_t k = from; k < to; k += X_BLOCK) {
            const int64_t end = std::min(k + X_BLOCK, to);
            VF block[ROWS];
            unrolled<ROWS>([&](auto r) { block[r] = zero(); });
            for (int64_t at = k; at < end; at += Rows::PIECE) {
                VI sums[ROWS];
                integer_piece<Rows, ROWS>(decoded.codes + (at - from) * W, x.numbers(row, at), x.half, sums);
                scale_piece<Rows, ROWS>(decoded, x, row, from, at, [&](auto r) { return sums[r]; }, block, all);
            }
            scale_block<ROWS>(x, row, k, block, all);
        }
        add_rows<ROWS>(target, all);
    }
};

template <template <class, int> class Tile, class Rows, int ROWS>
void tile_of_rows(int rows, const Decoded& decoded, const IntegerX& x, const float* row, int64_t from, int64_t to, const Target& target) {
    if (rows == ROWS) return Tile<Rows, ROWS>::run(decoded, x, row, from, to, target);
    if constexpr (ROWS > 1) tile_of_rows<Tile, Rows, ROWS - 1>(rows, decoded, x, row, from, to, target);
}

// MOST rows of x at a time; `before(rows)` is called for each such tile.
template <class Rows, template <class, int> class Tile, int MOST, class Before>
void multiply_tiles(const Plan& plan, const Call& call, int64_t first, int64_t last, const Before& before) {
    const Weight& weight = plan.weight;
    const Rows rows(plan);
    const IntegerX x(weight, Rows::PIECE);
    const int64_t chunks = (weight.in + CHUNK - 1) / CHUNK, chunk = (weight.in + chunks * 256 - 1) / (chunks * 256) * 256;
    const int64_t pieces = chunk / Rows::PIECE, tiles = (call.rows + MOST - 1) / MOST;
    float* memory = worker_memory(chunk * W / 4 + 2 * pieces * W);
    const Decoded decoded{reinterpret_cast<uint8_t*>(memory), memory + chunk * W / 4, memory + chunk * W / 4 + pieces * W};
    for (int64_t start = first; start < last; start += W) {
        const int64_t n = std::min(start, weight.out - W);  // the last vector may repeat rows, and leaves out what it repeats
        for (int64_t from = 0; from < weight.in; from += chunk) {
            const int64_t to = std::min(from + chunk, weight.in);
            rows.decode(n, from, to, decoded);
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t m = call.rows * t / tiles, count = call.rows * (t + 1) / tiles - m;
                float* out = call.out + m * weight.out + n;
                Target target{out, weight.out, out, weight.out, int(start - n)};
                if (from == 0) target.before = weight.bias ? weight.bias + n : nullptr, target.before_stride = 0;
                before(int(count));
                tile_of_rows<Tile, Rows, MOST>(int(count), decoded, x, call.x + m * plan.x_stride, from, to, target);
            }
        }
    }
}

template <class Rows> void multiply_integer(const Plan& plan, const Call& call, int64_t first, int64_t last) {
    multiply_tiles<Rows, IntegerTile, ROWS_AT_ONCE>(plan, call, first, last, [](int) {});
}

}}  // namespace core_kernels
