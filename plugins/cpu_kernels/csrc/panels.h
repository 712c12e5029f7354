// The loops for many rows of x, over any format: weights are decoded into panels [depth][PANEL columns], sums run over
// columns in the lanes of vectors.
//
// Each step multiplies one number of each of ROWS rows of x with a panel's row: 2 loads of weights and ROWS of x for
// 2 ROWS multiplications, no sums across lanes, and a panel that is read once for every ROWS rows may come from the second
// cache. Goto and van de Geijn 2008, with decoding in the place of packing. Worth it from PANEL_ROWS rows of x on.
#pragma once

#include "matmul.h"
#include "turned.h"

namespace core_kernels { namespace {

constexpr int PANEL = 2 * W;          // columns of out, that is rows of the weight
constexpr int64_t PANEL_DEPTH = 512;  // columns of the weight at a time, about

// PANEL rows of the weight from n on, segments [from, to): [columns][PANEL]. Rows that are not there repeat the last.
template <class Format>
void decode_panel(const Format& format, int64_t n, int64_t last, int64_t from, int64_t to, float* panel, float* memory) {
    constexpr int VECTORS = Format::VECTORS;
    float* decoded_rows = memory;  // [VECTORS][W rows][W]
    float* row_memory = memory + VECTORS * W * W;
    for (int half = 0; half < PANEL; half += W) {
        typename Format::Row rows[W];
        for (int r = 0; r < W; r++) rows[r] = format.row(std::min(n + half + r, last - 1), row_memory + r * format.row_floats());
        for (int64_t s = from; s < to; s++) {
            for (int r = 0; r < W; r++) {
                const auto segment = format.segment(rows[r], s);
                unrolled<VECTORS>([&](auto i) { store(decoded_rows + (i * W + r) * W, decoded<i>(format, segment)); });
            }
            for (int i = 0; i < VECTORS; i++)
                transpose(decoded_rows + i * W * W, panel + ((s - from) * VECTORS + i) * W * PANEL + half, PANEL);
        }
    }
}

INLINE void add_to(const Plan& plan, float* out, int64_t n, int64_t last, VF low, VF high, bool first_block) {
    const float* before = first_block ? plan.weight.bias : out;
    if (n + PANEL <= last) {
        if (before) { low = add(low, load(before + n)); high = add(high, load(before + n + W)); }
        store(out + n, low);
        store(out + n + W, high);
        return;
    }
    float found[PANEL];
    store(found, low);
    store(found + W, high);
    for (int64_t c = 0; n + c < last; c++) out[n + c] = found[c] + (before ? before[n + c] : 0.0f);
}

template <int ROWS>
void panel_tile(const Plan& plan, const float* panel, const float* x, int64_t depth, float* out, int64_t n, int64_t last, bool first_block) {
    VF total[ROWS][2];
    unrolled<ROWS>([&](auto m) { total[m][0] = zero(); total[m][1] = zero(); });
    for (int64_t k = 0; k < depth; k++) {
        const VF low = load(panel + k * PANEL), high = load(panel + k * PANEL + W);
        unrolled<ROWS>([&](auto m) {
            const VF one = set1(x[m * plan.x_stride + k]);
            total[m][0] = fma(low, one, total[m][0]);
            total[m][1] = fma(high, one, total[m][1]);
        });
    }
    unrolled<ROWS>([&](auto m) { add_to(plan, out + m * plan.weight.out, n, last, total[m][0], total[m][1], first_block); });
}

template <int ROWS>
void panel_tile_of(int rows, const Plan& plan, const float* panel, const float* x, int64_t depth, float* out, int64_t n, int64_t last, bool first_block) {
    if (rows == ROWS) return panel_tile<ROWS>(plan, panel, x, depth, out, n, last, first_block);
    if constexpr (ROWS > 1) panel_tile_of<ROWS - 1>(rows, plan, panel, x, depth, out, n, last, first_block);
}

template <class Format> void panels(const Plan& plan, const Call& call, int64_t first, int64_t last) {
    const Format format(plan);
    const int64_t per_block = std::max<int64_t>(1, PANEL_DEPTH / Format::SEGMENT);
    const int64_t blocks = (plan.segments + per_block - 1) / per_block, longest = (plan.segments + blocks - 1) / blocks;
    float* panel = worker_memory(longest * Format::SEGMENT * PANEL + Format::VECTORS * W * W + W * format.row_floats());
    float* memory = panel + longest * Format::SEGMENT * PANEL;
    const int64_t tiles = (call.rows + PANEL_TILE - 1) / PANEL_TILE;
    for (int64_t n = first; n < last; n += PANEL) {
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t from = plan.segments * block / blocks, to = plan.segments * (block + 1) / blocks;
            decode_panel(format, n, last, from, to, panel, memory);
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t m = call.rows * t / tiles, rows = call.rows * (t + 1) / tiles - m;
                panel_tile_of<PANEL_TILE>(int(rows), plan, panel, call.x + m * plan.x_stride + from * Format::SEGMENT,
                                          (to - from) * Format::SEGMENT, call.out + m * plan.weight.out, n, last, block == 0);
            }
        }
    }
}

}}  // namespace core_kernels
