// Floats of four or two bytes times many rows of x: rows of x lie in the lanes of vectors, numbers of the weight are spread
// over them.
//
// Each step multiplies one column of up to VECTORS x W rows of x with numbers of several rows of the weight, which are read
// where they lie, or a block of them where it was brought to four bytes. No sums across lanes: sums are turned back, W x W at a
// time, when a block of columns of out is whole. W rows of x lie column after column, so `prepare` takes them together; of a
// last group that is far from full each row lies by itself, and is multiplied as few rows are. Goto and van de Geijn 2008, with x packed instead of the weight.
#pragma once

#include "find.h"
#include "turned.h"

namespace core_kernels { namespace {

constexpr int LANES_BLOCK = 32;          // columns of out at a time: the first cache has a place for their sums
constexpr int64_t LANES_DEPTH = 32 * W;  // columns of the weight at a time, about

// Groups of W rows that lie in lanes; the rows after them lie one by one.
inline int64_t lane_groups(int64_t rows) { return rows / W + (rows % W >= LANES_LEAST); }

// Rows [0, rows) of x, of which only the last may be no whole group.
template <class Format> void prepare_lanes(const Plan& plan, const float* x, int64_t rows, float* prepared, float* sums) {
    const int64_t in = plan.weight.in, groups = lane_groups(rows);
    for (int64_t g = 0; g < groups; g++) {
        float* to = prepared + g * W * plan.x_stride;
        const float* from = x + g * W * in;
        const int count = int(std::min<int64_t>(W, rows - g * W));
        for (int64_t j = 0; j < in; j += W) {
            const int columns = int(std::min<int64_t>(W, in - j));
            VF held[W];
            unrolled<W>([&](auto r) { held[r] = r < count ? load_first(from + r * in + j, columns) : zero(); });
            transpose_registers<W / 2>(held);
            unrolled<W>([&](auto c) { if (c < columns) store(to + (j + c) * W, held[c]); });
        }
    }
    if (groups * W < rows) prepare<Format>(plan, x + groups * W * in, rows - groups * W, prepared + groups * W * plan.x_stride, sums);
}

// VECTORS x COUNT vectors of sums over columns [0, depth), put into sums [COUNT][LANES_VECTORS][W] or added to them.
template <int VECTORS, int COUNT, int ASK>
void lanes_tile(const float* weights, int64_t stride, const float* x, int64_t x_group, int64_t depth, float* sums, bool first, Ahead& ahead) {
    constexpr int PARTS = VECTORS == 1 ? LANES_PARTS : 1;  // so many sums that none waits for the one before
    VF part[PARTS][COUNT][VECTORS];
    unrolled<PARTS * COUNT * VECTORS>([&](auto i) { part[i / VECTORS / COUNT][i / VECTORS % COUNT][i % VECTORS] = zero(); });
    const auto step = [&](int64_t k, auto p) __attribute__((always_inline)) {
        VF held[VECTORS];
        unrolled<VECTORS>([&](auto v) { held[v] = load(x + v * x_group + k * W); });
        unrolled<COUNT>([&](auto c) {
            const VF one = set1(weights[c * stride + k]);
            unrolled<VECTORS>([&](auto v) { part[p][c][v] = fma(held[v], one, part[p][c][v]); });
        });
    };
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) {
        ahead.ask<ASK>();
        unrolled<4>([&](auto i) { step(k + i, std::integral_constant<int, i % PARTS>{}); });
    }
    for (; k < depth; k++) step(k, std::integral_constant<int, 0>{});
    VF total[COUNT][VECTORS];
    unrolled<COUNT * VECTORS>([&](auto i) {
        VF& found = total[i / VECTORS][i % VECTORS];
        found = part[0][i / VECTORS][i % VECTORS];
        unrolled<PARTS - 1>([&](auto p) { found = add(found, part[p + 1][i / VECTORS][i % VECTORS]); });
    });
    unrolled<COUNT * VECTORS>([&](auto i) {
        float* at = sums + (i / VECTORS * LANES_VECTORS + i % VECTORS) * W;
        store(at, first ? total[i / VECTORS][i % VECTORS] : add(load(at), total[i / VECTORS][i % VECTORS]));
    });
}

// Some rows of the weight, as floats of four bytes.
struct FloatRows {
    const float* at;
    int64_t stride;
};

inline FloatRows float_rows(const Plan& plan, Floats*, int64_t n, int64_t) {
    const int64_t stride = plan.weight.row_bytes / 4;
    return {reinterpret_cast<const float*>(plan.weight.codes) + n * stride, stride};
}

template <class Format> FloatRows float_rows(const Plan& plan, Format*, int64_t n, int64_t end) {
    const Format format(plan);
    const int64_t stride = plan.x_stride;  // of whole vectors, and no multiple of a cache page
    float* memory = worker_memory(LANES_BLOCK * stride);
    for (int64_t c = n; c < end; c++) {
        const auto row = format.row(c, nullptr);
        for (int64_t s = 0; s < plan.segments; s++) {
            const auto segment = format.segment(row, s);
            unrolled<Format::VECTORS>([&](auto i) { store(memory + (c - n) * stride + (s * Format::VECTORS + i) * W, format.template raw<i>(segment)); });
        }
    }
    return {memory, stride};
}

// Columns [n, end) of out for VECTORS groups of rows.
template <int VECTORS, bool ONCE> void lanes_block(const Plan& plan, FloatRows weights, const float* x, float* out, int64_t rows, int64_t n, int64_t end, Ahead& ahead) {
    constexpr int COUNT = LANES_COLUMNS[VECTORS - 1], ASK = ONCE ? COUNT / 4 : 1;  // lines of memory for four columns of the weight
    alignas(64) float sums[LANES_BLOCK * LANES_VECTORS * W];
    const int64_t stride = weights.stride, in = plan.weight.in, x_group = W * plan.x_stride;
    const int64_t blocks = (in + LANES_DEPTH - 1) / LANES_DEPTH;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t from = in * block / blocks, depth = in * (block + 1) / blocks - from;
        int64_t c = n;
        for (; c + COUNT <= end; c += COUNT)
            lanes_tile<VECTORS, COUNT, ASK>(weights.at + (c - n) * stride + from, stride, x + from * W, x_group, depth, sums + (c - n) * LANES_VECTORS * W, block == 0, ahead);
        for (; c < end; c++)
            lanes_tile<VECTORS, 1, ASK>(weights.at + (c - n) * stride + from, stride, x + from * W, x_group, depth, sums + (c - n) * LANES_VECTORS * W, block == 0, ahead);
    }
    for (int64_t c = n; c < end; c += W) {
        const int columns = int(std::min<int64_t>(W, end - c));
        const VF bias = plan.weight.bias ? load_first(plan.weight.bias + c, columns) : zero();
        for (int v = 0; v < VECTORS; v++) {
            VF held[W];
            unrolled<W>([&](auto i) { held[i] = i < columns ? load(sums + ((c - n + i) * LANES_VECTORS + v) * W) : zero(); });
            transpose_registers<W / 2>(held);
            const int count = int(std::min<int64_t>(W, rows - v * W));
            unrolled<W>([&](auto r) { if (r < count) store_first(out + (v * W + r) * plan.weight.out + c, add(held[r], bias), columns); });
        }
    }
}

template <int VECTORS, bool ONCE> void lanes_block_of(int64_t vectors, const Plan& plan, FloatRows weights, const float* x, float* out, int64_t rows, int64_t n, int64_t end, Ahead& ahead) {
    if (vectors == VECTORS) return lanes_block<VECTORS, ONCE>(plan, weights, x, out, rows, n, end, ahead);
    if constexpr (VECTORS > 1) lanes_block_of<VECTORS - 1, ONCE>(vectors, plan, weights, x, out, rows, n, end, ahead);
}

template <class Format, bool ONCE> void lanes(const Plan& plan, const Call& call, int64_t first, int64_t last) {
    const int64_t groups = lane_groups(call.rows), in_lanes = std::min(call.rows, groups * W), passes = (groups + LANES_VECTORS - 1) / LANES_VECTORS;
    const Call rest{call.x + groups * W * plan.x_stride, nullptr, call.out + in_lanes * plan.weight.out, call.rows - in_lanes, {}};
    for (int64_t n = first; n < last; n += LANES_BLOCK) {
        const int64_t end = std::min<int64_t>(n + LANES_BLOCK, last);
        Ahead ahead = end < last ? codes_of(plan.weight, end, std::min<int64_t>(end + LANES_BLOCK, last)) : call.after;
        const FloatRows weights = float_rows(plan, static_cast<Format*>(nullptr), n, end);
        for (int64_t pass = 0; pass < passes; pass++) {
            const int64_t group = groups * pass / passes, m = group * W;
            lanes_block_of<LANES_VECTORS, ONCE>(groups * (pass + 1) / passes - group, plan, weights, call.x + m * plan.x_stride, call.out + m * plan.weight.out, in_lanes - m, n, end, ahead);
        }
        if (rest.rows > 0) multiply_floats<Format>(plan, rest, n, end);
    }
}

template <class Format> void multiply_lanes(const Plan& plan, const Call& call, int64_t first, int64_t last) {
    if (call.rows <= LANES_VECTORS * W) lanes<Format, true>(plan, call, first, last);
    else lanes<Format, false>(plan, call, first, last);
}

template <class Format> const Packing* lanes_packing() {
    static const Packing found = {setup<Format>, prepare_lanes<Format>, multiply_lanes<Format>, sum_floats<Format>, INT64_MAX, nullptr, LANES_LEAST, W};
    return &found;
}

inline const Packing* find_lanes(const Weight& weight) {
    switch (weight.packing) {
        case FLOATS: return lanes_packing<Floats>();
        case HALF: return lanes_packing<Halves<false>>();
        case BRAIN_HALF: return lanes_packing<Halves<true>>();
        default: return nullptr;
    }
}

}}  // namespace core_kernels
