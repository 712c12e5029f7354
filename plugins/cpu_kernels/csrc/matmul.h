// The loops over any format: out[m, n] = sum over k of x[m, k] * weight[n, k] + bias[n].
//
// Sums stay in registers only if every index of theirs is a constant, hence `unrolled` instead of plain loops.
//
// All sums run along k in the lanes of vectors and are added up across lanes at the end, so that weights are used in the
// order in which they lie and x in the order that `prepare` gives it. By the number of rows of x:
//   one            sum(raw * x) and sum(x) of a segment first, scale and offset once a segment
//   up to FEW      a vector of weights is decoded into a register and used for every row
//   more           a block of weights is decoded into the cache, then multiplied like floats, MAX_ROWS x 4 sums at a time
// Many rows of x lie in lanes instead: panels.h, and lanes.h for floats.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "weight.h"

namespace core_kernels { namespace {

constexpr int STRAIGHT_ROWS = 4;
constexpr int64_t KB = 640;
constexpr int BLOCK_COLUMNS = 32;    // decoded into the cache at a time ...
constexpr int64_t BLOCK_FLOATS = 1024;  // ... so many floats of each

template <class Format> bool setup(Plan& plan) {
    const Weight& weight = plan.weight;
    plan.segments = (weight.in + Format::SEGMENT - 1) / Format::SEGMENT;
    plan.vectors = plan.segments * Format::VECTORS;
    plan.x_stride = plan.vectors * W + 16;  // rows must not start at the same place of a cache page
    if (!Format::setup(plan)) return false;
    plan.columns.clear();
    for (int64_t s = 0; s < plan.segments; s++)
        for (int i = 0; i < Format::VECTORS; i++)
            for (int lane = 0; lane < W; lane++) {
                const int64_t column = s * Format::SEGMENT + Format::column(i, lane);
                plan.columns.push_back(column >= weight.in ? -1 : int32_t(weight.order ? weight.order[column] : column));
            }
    return true;
}

template <class Format> int64_t sum_floats(const Plan& plan) { return Format::OFFSET ? plan.segments * Format::PARTS * W : 0; }

// x [rows, in] into the order of the codes; for one row the sums that offsets are multiplied with.
template <class Format> void prepare(const Plan& plan, const float* x, int64_t rows, float* prepared, float* x_sums) {
    const int64_t whole = plan.weight.order ? 0 : plan.weight.in / Format::SEGMENT;  // segments without a gap
    for (int64_t m = 0; m < rows; m++) {
        const float* from = x + m * plan.weight.in;
        float* to = prepared + m * plan.x_stride;
        for (int64_t s = 0; s < whole; s++)
            for (int i = 0; i < Format::VECTORS; i++)
                for (int lane = 0; lane < W; lane++)
                    to[(s * Format::VECTORS + i) * W + lane] = from[s * Format::SEGMENT + Format::column(i, lane)];
        for (int64_t at = whole * Format::SEGMENT; at < plan.vectors * W; at++)
            to[at] = plan.columns[at] < 0 ? 0.0f : from[plan.columns[at]];
    }
    if (rows != 1) return;
    for (int64_t s = 0; Format::OFFSET && s < plan.segments; s++) {
        VF total[Format::PARTS];
        for (auto& one : total) one = zero();
        for (int i = 0; i < Format::VECTORS; i++)
            total[Format::part(i)] = add(total[Format::part(i)], load(prepared + (s * Format::VECTORS + i) * W));
        for (int part = 0; part < Format::PARTS; part++) store(x_sums + (s * Format::PARTS + part) * W, total[part]);
    }
    if constexpr (Format::IN_PLACE) {
        for (int64_t at = 0; at < plan.vectors; at++) {
            const float factor = 1.0f / Format::in_place(int(at % Format::VECTORS));
            store(prepared + at * W, mul(load(prepared + at * W), set1(factor)));
        }
    }
}

template <class Sums> inline void write(const Plan& plan, float* out, int64_t n, int64_t last, Sums four, bool first_block) {
    float found[COLUMNS];
    store4(found, four);
    const int count = int(std::min<int64_t>(COLUMNS, last - n));
    for (int c = 0; c < count; c++) {
        const float before = !first_block ? out[n + c] : plan.weight.bias ? plan.weight.bias[n + c] : 0.0f;
        out[n + c] = found[c] + before;
    }
}

// Memory of one worker thread, which only grows.
inline float* worker_memory(int64_t floats) {
    struct Memory {
        float* at = nullptr;
        int64_t floats = 0;
        ~Memory() { std::free(at); }
    };
    static thread_local Memory memory;
    if (floats > memory.floats) {
        std::free(memory.at);
        memory.floats = (floats + 1023) / 1024 * 1024;
        memory.at = static_cast<float*>(std::aligned_alloc(64, size_t(memory.floats) * sizeof(float)));
        if (!memory.at) std::abort();  // a few hundred kilobytes; there is nobody to tell
    }
    return memory.at;
}

// Rows n to n + COLUMNS of the weight. Those that come next are made ready meanwhile: scales that are read right after they
// were written would wait for their way through the store buffer.
template <class Format> struct RowsAhead {
    const Format& format;
    const int64_t last, floats;
    float* memory;
    typename Format::Row rows[2][COLUMNS];
    int now = 0;

    RowsAhead(const Format& format, int64_t first, int64_t last) : format(format), last(last), floats(format.row_floats()) {
        memory = worker_memory(2 * COLUMNS * floats);
        fill(first);
    }
    void fill(int64_t n) {
        for (int c = 0; c < COLUMNS; c++)
            rows[now][c] = format.row(std::min(n + c, last - 1), memory + (now * COLUMNS + c) * floats);
    }
    INLINE void next(int64_t n, typename Format::Row* row) {
        unrolled<COLUMNS>([&](auto c) { row[c] = rows[now][c]; });
        now = 1 - now;
        if (n + COLUMNS < last) fill(n + COLUMNS);
    }
};

// -------------------------------------------------------------------------------------------------- one row

template <class Format> void one_row(const Plan& plan, const Call& call, int64_t first, int64_t last) {
    const Format format(plan);
    RowsAhead<Format> ahead(format, first, last);
    for (int64_t n = first; n < last; n += COLUMNS) {
        VF total[COLUMNS];
        typename Format::Row row[COLUMNS];
        ahead.next(n, row);
        unrolled<COLUMNS>([&](auto c) { total[c] = zero(); });
        for (int64_t s = 0; s < plan.segments; s++) {
            const float* x = call.x + s * Format::VECTORS * W;
            const float* x_sum = Format::OFFSET ? call.x_sum + s * Format::PARTS * W : nullptr;
            unrolled<COLUMNS>([&](auto c) {
                const auto segment = format.segment(row[c], s);
                if constexpr (!Format::SCALED) {
                    unrolled<Format::VECTORS>([&](auto i) { total[c] = fma(format.template raw<i>(segment), load(x + i * W), total[c]); });
                } else {
                    VF part[Format::PARTS];
                    unrolled<Format::PARTS>([&](auto p) { part[p] = zero(); });
                    unrolled<Format::VECTORS>([&](auto i) {
                        constexpr int p = Format::part(i);
                        if constexpr (Format::IN_PLACE) part[p] = fma(format.template raw_in_place<i>(segment), load(x + i * W), part[p]);
                        else part[p] = fma(format.template raw<i>(segment), load(x + i * W), part[p]);
                    });
                    unrolled<Format::PARTS>([&](auto p) {
                        total[c] = fma(part[p], segment.scale[p], total[c]);
                        if constexpr (Format::OFFSET) total[c] = fma(load(x_sum + p * W), segment.offset[p], total[c]);
                    });
                }
            });
        }
        write(plan, call.out, n, last, sums(total[0], total[1], total[2], total[3]), true);
    }
}

// -------------------------------------------------------------------------------------------------- few rows

template <int I, class Format, class Segment> INLINE VF decoded(const Format& format, const Segment& segment) {
    const VF raw = format.template raw<I>(segment);
    if constexpr (!Format::SCALED) return raw;
    else if constexpr (Format::OFFSET) return fma(raw, segment.scale[Format::part(I)], segment.offset[Format::part(I)]);
    else return mul(raw, segment.scale[Format::part(I)]);
}

template <class Format, int ROWS> void few_rows(const Plan& plan, const Call& call, int64_t first, int64_t last) {
    const Format format(plan);
    RowsAhead<Format> ahead(format, first, last);
    for (int64_t n = first; n < last; n += COLUMNS) {
        VF total[ROWS][COLUMNS];
        typename Format::Row row[COLUMNS];
        ahead.next(n, row);
        unrolled<ROWS * COLUMNS>([&](auto i) { total[i / COLUMNS][i % COLUMNS] = zero(); });
        for (int64_t s = 0; s < plan.segments; s++) {
            const float* x = call.x + s * Format::VECTORS * W;
            unrolled<COLUMNS>([&](auto c) {
                asm volatile("" ::: "memory");  // read x again for each column: kept in registers it would push out the sums
                const auto segment = format.segment(row[c], s);
                unrolled<Format::VECTORS>([&](auto i) {
                    const VF weight = decoded<i>(format, segment);
                    unrolled<ROWS>([&](auto m) { total[m][c] = fma(weight, load(x + m * plan.x_stride + i * W), total[m][c]); });
                });
            });
        }
        unrolled<ROWS>([&](auto m) {
            write(plan, call.out + m * plan.weight.out, n, last, sums(total[m][0], total[m][1], total[m][2], total[m][3]), true);
        });
    }
}

// -------------------------------------------------------------------------------------------------- many rows

// weights [steps][COLUMNS][W] as decoded, x [ROWS] rows of it: ROWS x COLUMNS sums over steps.
template <int ROWS> void tile(const Plan& plan, const float* weights, const float* x, int64_t steps, float* out, int64_t n, int64_t last, bool first_block) {
    VF total[ROWS][COLUMNS];
    unrolled<ROWS * COLUMNS>([&](auto i) { total[i / COLUMNS][i % COLUMNS] = zero(); });
    for (int64_t step = 0; step < steps; step++) {
        if constexpr (ROWS > COLUMNS) {  // hold what is fewer in registers
            VF held[COLUMNS];
            unrolled<COLUMNS>([&](auto c) { held[c] = load(weights + (step * COLUMNS + c) * W); });
            unrolled<ROWS>([&](auto m) {
                const VF one = load(x + m * plan.x_stride + step * W);
                unrolled<COLUMNS>([&](auto c) { total[m][c] = fma(held[c], one, total[m][c]); });
            });
        } else {
            VF held[ROWS];
            unrolled<ROWS>([&](auto m) { held[m] = load(x + m * plan.x_stride + step * W); });
            unrolled<COLUMNS>([&](auto c) {
                const VF one = load(weights + (step * COLUMNS + c) * W);
                unrolled<ROWS>([&](auto m) { total[m][c] = fma(held[m], one, total[m][c]); });
            });
        }
    }
    unrolled<ROWS>([&](auto m) {
        write(plan, out + m * plan.weight.out, n, last, sums(total[m][0], total[m][1], total[m][2], total[m][3]), first_block);
    });
}

template <int ROWS> void tile_of(int rows, const Plan& plan, const float* weights, const float* x, int64_t steps, float* out, int64_t n, int64_t last, bool first_block) {
    if (rows == ROWS) return tile<ROWS>(plan, weights, x, steps, out, n, last, first_block);
    if constexpr (ROWS > 1) tile_of<ROWS - 1>(rows, plan, weights, x, steps, out, n, last, first_block);
}

// COLUMNS rows of the weight from n on, segments [from, to): [steps][COLUMNS][W].
template <class Format> void decode(const Format& format, int64_t n, int64_t last, int64_t from, int64_t to, float* weights, float* memory) {
    for (int c = 0; c < COLUMNS; c++) {
        const auto row = format.row(std::min(n + c, last - 1), memory);
        for (int64_t s = from; s < to; s++) {
            const auto segment = format.segment(row, s);
            float* at = weights + ((s - from) * Format::VECTORS * COLUMNS + c) * W;
            unrolled<Format::VECTORS>([&](auto i) { store(at + i * COLUMNS * W, decoded<i>(format, segment)); });
        }
    }
}

template <class Format> void many_rows(const Plan& plan, const Call& call, int64_t first, int64_t last) {
    const Format format(plan);
    float* weights = worker_memory(BLOCK_COLUMNS * BLOCK_FLOATS + format.row_floats());
    float* memory = weights + BLOCK_COLUMNS * BLOCK_FLOATS;
    const int64_t tiles = (call.rows + MAX_ROWS - 1) / MAX_ROWS;  // rows are shared out evenly: 16 as 6, 5, 5
    const int64_t per_block = std::max<int64_t>(1, BLOCK_FLOATS / Format::SEGMENT);
    const int64_t blocks = (plan.segments + per_block - 1) / per_block;
    for (int64_t n = first; n < last; n += BLOCK_COLUMNS) {
        const int64_t end = std::min<int64_t>(n + BLOCK_COLUMNS, last);
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t from = plan.segments * block / blocks, to = plan.segments * (block + 1) / blocks;
            const int64_t steps = (to - from) * Format::VECTORS, floats = steps * COLUMNS * W;
            for (int64_t c = n; c < end; c += COLUMNS) decode(format, c, end, from, to, weights + (c - n) / COLUMNS * floats, memory);
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t m = call.rows * t / tiles, rows = call.rows * (t + 1) / tiles - m;
                const float* x = call.x + m * plan.x_stride + from * Format::VECTORS * W;
                for (int64_t c = n; c < end; c += COLUMNS)
                    tile_of<MAX_ROWS>(int(rows), plan, weights + (c - n) / COLUMNS * floats, x, steps, call.out + m * plan.weight.out, c, end, block == 0);
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------- floats
//
// Floats of four and of two bytes are multiplied as they lie; a `Format` has  BYTES  of a number,  get(row, at)  the W numbers
// from a column on, and  get_first(row, at, count)  fewer, then zeros. Memory is read fastest in one stream, so whoever brings
// weights from memory asks for them in the order in which they lie, a piece ahead of where it computes.

// Lines of memory that the second cache asks for, a few at a time, while something else is computed.
struct Ahead : Stretch {
    Ahead(Stretch stretch) : Stretch(stretch) {}

    template <int LINES> INLINE void ask() {
        if (at >= end) return;
        unrolled<LINES>([&](auto i) { __builtin_prefetch(at + i * 64, 0, 2); });
        at += LINES * 64;
    }
};

// One row of the weight with ROWS rows of x; several sums each, so that none waits for the one before. `ahead` is in bytes.
template <class Format, int ROWS> INLINE void straight_row(const uint8_t* row, const float* x, int64_t x_stride, int64_t in, int64_t ahead, VF* total) {
    constexpr int PARTS = ROWS > 2 ? 2 : 4;
    VF part[ROWS][PARTS];
    unrolled<ROWS * PARTS>([&](auto i) { part[i / PARTS][i % PARTS] = zero(); });
    int64_t at = 0;
    for (; at + PARTS * W <= in; at += PARTS * W) {
        unrolled<PARTS>([&](auto p) {
            if constexpr (ROWS > 2 && p * W * Format::BYTES % 64 == 0) __builtin_prefetch(row + ahead + (at + p * W) * Format::BYTES, 0, 2);
            const VF held = Format::get(row, at + p * W);
            unrolled<ROWS>([&](auto m) { part[m][p] = fma(held, load(x + m * x_stride + at + p * W), part[m][p]); });
        });
    }
    for (; at < in; at += W) {
        const VF held = Format::get_first(row, at, int(in - at));
        unrolled<ROWS>([&](auto m) { part[m][0] = fma(held, load(x + m * x_stride + at), part[m][0]); });
    }
    unrolled<ROWS>([&](auto m) {
        total[m] = part[m][0];
        unrolled<PARTS - 1>([&](auto p) { total[m] = add(total[m], part[m][p + 1]); });
    });
}

// A row of the weight after the other, with all ROWS rows of x. One or two rows wait for memory alone, which is read fastest
// when nobody asks for more than the processor itself does.
template <class Format, int ROWS> void straight(const Plan& plan, const Call& call, int64_t first, int64_t last) {
    const int64_t in = plan.weight.in, stride = plan.weight.row_bytes;
    const uint8_t* at = plan.weight.codes + first * stride;
    VF total[COLUMNS][ROWS];
    unrolled<COLUMNS * ROWS>([&](auto i) { total[i / ROWS][i % ROWS] = zero(); });
    for (int64_t n = first; n < last; n += COLUMNS) {
        const int64_t count = std::min<int64_t>(COLUMNS, last - n);
        for (int64_t c = 0; c < count; c++, at += stride)
            straight_row<Format, ROWS>(at, call.x, plan.x_stride, in, COLUMNS * stride, total[c]);
        unrolled<ROWS>([&](auto m) {
            write(plan, call.out + m * plan.weight.out, n, last, sums(total[0][m], total[1][m], total[2][m], total[3][m]), true);
        });
    }
}

template <class Format, int ROWS> void straight_of(const Plan& plan, const Call& call, int64_t first, int64_t last) {
    if (call.rows == ROWS) return straight<Format, ROWS>(plan, call, first, last);
    if constexpr (ROWS > 1) straight_of<Format, ROWS - 1>(plan, call, first, last);
}

// ROWS x COUNT sums over columns [from, to): whole vectors and what is left.
template <class Format, int ROWS, int COUNT, int ASK>
INLINE void float_sums(const uint8_t* row, int64_t stride, const float* x, int64_t x_stride, int64_t from, int64_t to, Ahead& ahead, VF (*total)[COLUMNS]) {
    int64_t at = from;
    for (; at + W <= to; at += W) {
        ahead.ask<ASK>();
        if constexpr (ROWS > COUNT) {  // hold what is fewer in registers
            VF held[COUNT];
            unrolled<COUNT>([&](auto c) { held[c] = Format::get(row + c * stride, at); });
            unrolled<ROWS>([&](auto m) {
                const VF one = load(x + m * x_stride + at);
                unrolled<COUNT>([&](auto c) { total[m][c] = fma(held[c], one, total[m][c]); });
            });
        } else {
            VF held[ROWS];
            unrolled<ROWS>([&](auto m) { held[m] = load(x + m * x_stride + at); });
            unrolled<COUNT>([&](auto c) {
                const VF one = Format::get(row + c * stride, at);
                unrolled<ROWS>([&](auto m) { total[m][c] = fma(held[m], one, total[m][c]); });
            });
        }
    }
    if (const int left = int(to - at)) {
        VF held[COUNT];
        unrolled<COUNT>([&](auto c) { held[c] = Format::get_first(row + c * stride, at, left); });
        unrolled<ROWS>([&](auto m) {
            const VF one = load(x + m * x_stride + at);  // prepared: zeros follow
            unrolled<COUNT>([&](auto c) { total[m][c] = fma(held[c], one, total[m][c]); });
        });
    }
}

// COUNT rows of the weight from n on, columns [from, to).
template <class Format, int ROWS, int COUNT, int ASK> void float_tile(const Plan& plan, const float* x, int64_t from, int64_t to, float* out, int64_t n, Ahead& ahead) {
    VF total[ROWS][COLUMNS];
    unrolled<ROWS * COLUMNS>([&](auto i) { total[i / COLUMNS][i % COLUMNS] = zero(); });
    float_sums<Format, ROWS, COUNT, ASK>(plan.weight.codes + n * plan.weight.row_bytes, plan.weight.row_bytes, x, plan.x_stride, from, to, ahead, total);
    unrolled<ROWS>([&](auto m) {
        write(plan, out + m * plan.weight.out, n, n + COUNT, sums(total[m][0], total[m][1], total[m][2], total[m][3]), from == 0);
    });
}

template <class Format, int ROWS, int ASK> void float_tile_of(int rows, const Plan& plan, const float* x, int64_t from, int64_t to, float* out, int64_t n, int64_t last, Ahead& ahead) {
    if (rows != ROWS) {
        if constexpr (ROWS > 1) float_tile_of<Format, ROWS - 1, ASK>(rows, plan, x, from, to, out, n, last, ahead);
    } else if (n + COLUMNS <= last) {
        float_tile<Format, ROWS, COLUMNS, ASK>(plan, x, from, to, out, n, ahead);
    } else {
        for (; n < last; n++) float_tile<Format, ROWS, 1, ASK>(plan, x, from, to, out, n, ahead);
    }
}

template <class Format, int ASK> void float_tiles(const Plan& plan, const Call& call, int64_t first, int64_t last) {
    const int64_t tiles = (call.rows + MAX_ROWS - 1) / MAX_ROWS, in = plan.weight.in;
    const int64_t blocks = (in + KB - 1) / KB, block = (in + blocks * W - 1) / (blocks * W) * W;
    for (int64_t n = first; n < last; n += BLOCK_COLUMNS) {
        const int64_t end = std::min<int64_t>(n + BLOCK_COLUMNS, last);
        Ahead ahead = end < last ? codes_of(plan.weight, end, std::min<int64_t>(end + BLOCK_COLUMNS, last)) : call.after;
        for (int64_t from = 0; from < in; from += block) {
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t m = call.rows * t / tiles, rows = call.rows * (t + 1) / tiles - m;
                for (int64_t c = n; c < end; c += COLUMNS)
                    float_tile_of<Format, MAX_ROWS, ASK>(int(rows), plan, call.x + m * plan.x_stride, from, std::min(from + block, in), call.out + m * plan.weight.out, c, end, ahead);
            }
        }
    }
}

template <class Format> void multiply_floats(const Plan& plan, const Call& call, int64_t first, int64_t last) {
    constexpr int WHOLE = COLUMNS * W * Format::BYTES / 64;  // lines of a step
    if (call.rows <= STRAIGHT_ROWS) return straight_of<Format, STRAIGHT_ROWS>(plan, call, first, last);
    if (call.rows <= MAX_ROWS) return float_tiles<Format, WHOLE>(plan, call, first, last);
    return call.rows <= 3 * MAX_ROWS ? float_tiles<Format, (WHOLE + 1) / 2>(plan, call, first, last) : float_tiles<Format, 1>(plan, call, first, last);
}

}}  // namespace core_kernels
