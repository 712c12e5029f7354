// The loops for many rows of x on machines with tiles of bfloat16 (amx_tiles.h), over any format.
//
// Weights are decoded to floats 32 rows at a time, cut into terms and multiplied with all rows of x. With the first 32 rows
// of x both go on at once: while the tile unit multiplies one segment, the next is decoded, so that at 16 rows a step takes
// what decoding takes. x is cut once for a block of rows and columns that stays in the second cache.
#pragma once

#include "amx_tiles.h"
#include "formats.h"
#include "ggml.h"
#include "panels.h"
#include "tiled.h"

namespace core_kernels { namespace {

// Floats of four bytes, for the loops over formats.
struct FloatSegments : Halves<false> {
    struct Row { const float* at; };
    struct Segment { const float* at; int left; };

    explicit FloatSegments(const Plan& plan) : Halves<false>(plan) {}
    Row row(int64_t n, float*) const { return {reinterpret_cast<const float*>(weight.codes + n * weight.row_bytes)}; }
    INLINE Segment segment(const Row& row, int64_t s) const {
        const int64_t left = weight.in - s * SEGMENT;
        const float* at = row.at + s * SEGMENT;
        const char* ahead = reinterpret_cast<const char*>(at) + PANEL * weight.row_bytes;
        unrolled<VECTORS>([&](auto i) { __builtin_prefetch(ahead + i * 64, 0, 2); });
        return {at, int(left < SEGMENT ? left : SEGMENT)};
    }
    template <int I> INLINE VF raw(const Segment& segment) const {
        return segment.left == SEGMENT ? load(segment.at + I * W) : load_first(segment.at + I * W, segment.left - I * W);
    }
};

// Terms that a format's weights are cut into.
template <class Format> constexpr int terms = 3;
template <> constexpr int terms<Halves<true>> = 1;
template <> constexpr int terms<Halves<false>> = 2;

// Rows of x from which on tiles are worth it.
template <class Format> constexpr int TILED_ROWS = 12;
template <> constexpr int TILED_ROWS<Halves<true>> = 8;
template <> constexpr int TILED_ROWS<Halves<false>> = 20;
template <> constexpr int TILED_ROWS<FloatSegments> = 14;
template <> constexpr int TILED_ROWS<Words<4, false>> = 8;
template <int HEAD, bool TABLE> constexpr int TILED_ROWS<Nibbles<HEAD, TABLE>> = 8;
template <class Q> constexpr int TILED_ROWS<Blocks<Q>> = 20;
template <> constexpr int TILED_ROWS<Blocks<Q8>> = 8;

template <class Format> INLINE void cut_segment(const Format& format, const typename Format::Row& row, int64_t s, uint16_t* to) {
    constexpr int TERMS = terms<Format>;
    const auto segment = format.segment(row, s);
    unrolled<Format::VECTORS / 2>([&](auto step) {
        cut<TERMS>(decoded<2 * step>(format, segment), decoded<2 * step + 1>(format, segment), to + step * 2 * TERMS * TILE);
    });
}

// Rows [first row of x, + count) of the sums of a tile onto out; `low` and `high` are [16 rows of the weight][16 rows of x].
inline void write_tiles(const Plan& plan, float* low, float* high, float* out, int64_t n, int64_t last, int count, bool first_block) {
    VF rows[2][W];
    unrolled<2>([&](auto half) {
        unrolled<W>([&](auto r) { rows[half][r] = load((half ? high : low) + r * W); });
        transpose_registers<W / 2>(rows[half]);
        unrolled<W>([&](auto r) { store((half ? high : low) + r * W, rows[half][r]); });
    });
    for (int m = 0; m < count; m++) add_to(plan, out + m * plan.weight.out, n, last, load(low + m * W), load(high + m * W), first_block);
}

// Steps of 32 columns that 16 rows of x have place for: those that there are, and one more for each 32 (amx_codes.h).
inline int64_t tiles_of_x(int64_t steps) { return steps + (steps + 31) / 32; }

template <class Format> void tiled_multiply(const Plan& plan, const TiledCall& call, int64_t first, int64_t last) {
    constexpr int STEPS = Format::VECTORS / 2, TERMS = terms<Format>;
    const Format format(plan);
    const int64_t segments = call.to - call.from, steps = segments * STEPS, row_floats = format.row_floats();
    const int64_t tiles = (call.rows + W - 1) / W, x_tile = tiles_of_x(steps) * X_TERMS * TILE;
    const int64_t kept = tiles > 2 ? segments : 2;  // segments of cut weights: no more than are used, so that they stay near
    const int64_t kept_floats = kept * STEPS * 2 * TERMS * TILE / 2;
    float* memory = worker_memory(kept_floats + 4 * W * W + PANEL * row_floats);
    uint16_t* cut_weights = reinterpret_cast<uint16_t*>(memory);
    float* found = memory + kept_floats;
    float* row_memory = found + 4 * W * W;
    const Tiles registers;
    for (int64_t n = first; n < last; n += PANEL) {
        typename Format::Row rows[PANEL];
        for (int r = 0; r < PANEL; r++) rows[r] = format.row(std::min(n + r, last - 1), row_memory + r * row_floats);
        for (int64_t t = 0; t < tiles; t += 2) {
            const uint16_t* x = call.x + t * x_tile;
            const bool pair = t + 1 < tiles;
            const auto multiply = [&](int64_t step) {
                const uint16_t* weights = cut_weights + step % (kept * STEPS) * 2 * TERMS * TILE;
                const uint16_t* at = x + step * X_TERMS * TILE;
                if (pair) tile_step<TERMS>(weights, at, at + x_tile);
                else tile_step<TERMS>(weights, at);
            };
            zero_sums();
            if (t > 0) {
                for (int64_t step = 0; step < steps; step++) multiply(step);
            } else {
                for (int64_t s = 0; s <= segments; s++) {  // decodes segment s, multiplies s - 1
                    for (int step = 0; step < STEPS; step++) {
                        if (s < segments) {
                            for (int r = PANEL / STEPS * step; r < PANEL / STEPS * (step + 1); r++)
                                cut_segment(format, rows[r], call.from + s, cut_weights + s % kept * STEPS * 2 * TERMS * TILE + (r / W * TERMS * W + r % W) * 32);
                        }
                        memory_is_as_written();
                        if (s > 0) multiply((s - 1) * STEPS + step);
                    }
                }
            }
            store_sums(found);
            float* out = call.out + t * W * plan.weight.out;
            const int count = int(std::min<int64_t>(W, call.rows - t * W));
            if (pair) {
                write_tiles(plan, found, found + W * W, out, n, last, count, call.from == 0);
                write_tiles(plan, found + 2 * W * W, found + 3 * W * W, out + W * plan.weight.out, n, last,
                            int(std::min<int64_t>(W, call.rows - (t + 1) * W)), call.from == 0);
            } else {
                for (int at = 0; at < 2 * W * W; at += W) store(found + at, add(load(found + at), load(found + 2 * W * W + at)));
                write_tiles(plan, found, found + W * W, out, n, last, count, call.from == 0);
            }
        }
    }
}

// Columns [begin, end) of 16 rows of x from `row` on, turned about: a vector holds one column of all rows.
struct Turned {
    int64_t begin, missing;
    const float* columns;

    Turned(const Plan& plan, const float* x, int64_t row, int64_t rows, int64_t begin, int64_t end)
        : begin(begin), missing((end - begin + W - 1) / W * W) {
        const int64_t in = plan.weight.in;
        const int count = int(std::min<int64_t>(W, rows - row));
        float* to = worker_memory((missing + 1) * W);  // [columns][16 rows], then a row of zeros
        for (int64_t at = begin; at < end; at += W) {
            VF block[W];
            const int width = int(std::min<int64_t>(W, end - at));
            for (int r = 0; r < W; r++) block[r] = r < count ? load_first(x + (row + r) * in + at, width) : zero();
            transpose_registers<W / 2>(block);
            for (int c = 0; c < W; c++) store(to + (at - begin + c) * W, block[c]);
        }
        store(to + missing * W, zero());
        columns = to;
    }
    INLINE VF column(int64_t at) const { return load(columns + (at < 0 ? missing : at - begin) * W); }  // -1: zeros
};

// 16 rows of x from `row` on, segments [from, to), cut into tiles [steps][X_TERMS].
inline void cut_x(const Plan& plan, const float* x, int64_t row, int64_t rows, int64_t from, int64_t to, uint16_t* tiles) {
    const int64_t in = plan.weight.in, vectors = plan.vectors / plan.segments;
    const bool apart = plan.weight.order;  // else the columns of segments follow each other
    const Turned turned(plan, x, row, rows, apart ? 0 : from * vectors * W, apart ? in : std::min(in, to * vectors * W));
    const int32_t* columns = plan.columns.data() + from * vectors * W;
    for (int64_t step = 0; step < (to - from) * vectors / 2; step++)
        for (int pair = 0; pair < W; pair++)
            cut<X_TERMS>(turned.column(columns[2 * step * W + pair]), turned.column(columns[(2 * step + 1) * W + pair]),
                         tiles + step * X_TERMS * TILE + pair * 32);
}

}}  // namespace core_kernels
