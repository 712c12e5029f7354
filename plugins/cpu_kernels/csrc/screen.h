// Screening a head: the highest output of each row of x, exactly, without a float product of most of the head.
//
// With row = scale * code + rest and x = x_scale * q + x_rest, where codes are bytes and q whole numbers,
//     |row x - scale * x_scale * code q| <= |rest| |x| + |row| |x_rest|        (Cauchy and Schwarz)
// so that most outputs are seen to lie below one that is sure to be reached. The products of whole numbers are exact: they
// are taken modulo 2^32, and x_scale is chosen so that no result is beyond 2^31.
//
// The bytes lie as instructions for dot products want them, W rows (the lanes of a vector) side by side.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "screen_calls.h"

namespace core_kernels { namespace {

constexpr float LARGEST_CODE = 127, LARGEST_Q = 127 * 256 + 127;
constexpr int64_t MIDDLE_CODE = 128, ROW_SLACK = 64;
constexpr float MOST_PRODUCT = 0x1p30f;  // of lengths: of q and of a row of codes
constexpr float LEAST_NUMBER = 0x1p-40f;  // of a row whose numbers are all smaller everything is rest: squares must not vanish
constexpr float FLOAT_ERROR = 0x1p-24f, MORE = 1.001f;  // a rounding; for those of the bounds themselves

inline int64_t part_bytes(int64_t in) { return in * X_NUMBER + ROW_SLACK; }
inline int64_t screen_row_bytes(int64_t in) { return X_PARTS * part_bytes(in); }
inline int64_t blocks_of(const ScreenWeight& weight) { return (weight.out + W - 1) / W; }

// ---------------------------------------------------------------------------------------------------- the weight

// Row r of block b; returns the square of its codes' length.
inline float fill_row(const ScreenWeight& weight, const Weight& floats, float* row, int64_t b, int64_t r) {
    const int64_t n = b * W + r, in = weight.in;
    const int32_t type = floats.packing == HALF ? FLOAT16 : floats.packing == BRAIN_HALF ? BFLOAT16 : FLOAT32;
    for (int64_t k = 0; k < in; k += W) store(row + k, load_scales(floats.codes + n * floats.row_bytes, k, W, type));
    const float most = largest_magnitude(row, in), scale = most / LARGEST_CODE;
    const bool none = most < LEAST_NUMBER;  // a NaN goes on as one
    const VF factor = set1(none ? 0 : 1 / scale), one = set1(none ? 0 : scale);
    VF length = zero(), rest = zero(), code_length = zero();
    for (int64_t k = 0; k < in; k += W) {
        const VF v = load(row + k);
        const VI q = rounded(mul(v, factor));
        const VF back = to_float(q), left = fma(negate(back), one, v);
        length = fma(v, v, length), rest = fma(left, left, rest), code_length = fma(back, back, code_length);
        int32_t lanes[W];
        memcpy(lanes, &q, sizeof lanes);
        for (int64_t i = 0; i < W; i += 4) {
            uint32_t four = 0;
            for (int64_t j = 0; j < 4; j++) four |= uint32_t(uint8_t(lanes[i + j] + MIDDLE_CODE)) << 8 * j;
            memcpy(weight.codes + ((b * in + k + i) / 4 * W + r) * 4, &four, 4);
        }
    }
    weight.scales[n] = none ? 0 : scale;
    weight.lengths[n] = MORE * (none ? most * std::sqrt(float(in)) : std::sqrt(sum(length)));
    weight.rests[n] = none ? weight.lengths[n] : MORE * std::sqrt(sum(rest));
    return sum(code_length);
}

void fill_screen(const ScreenWeight& weight, const Weight& floats, int64_t first, int64_t last) {
    float* row = worker_memory(weight.in);
    for (int64_t b = first; b < last; b++) {
        float longest = 0;
        for (int64_t r = 0; r < W; r++) {
            if (b * W + r < weight.out) longest = std::max(longest, fill_row(weight, floats, row, b, r));
            else weight.scales[b * W + r] = weight.rests[b * W + r] = weight.lengths[b * W + r] = 0;
        }
        weight.code_length[b] = std::sqrt(longest) * MORE;
    }
}

// ---------------------------------------------------------------------------------------------------- x

void prepare_screen(const ScreenWeight& weight, const float* x, int64_t rows, int8_t* numbers, ScreenRow* made) {
    const int64_t in = weight.in;
    for (int64_t m = 0; m < rows; m++, x += in, numbers += screen_row_bytes(in)) {
        VF squares = zero(), rest = zero();
        for (int64_t k = 0; k < in; k += W) squares = fma(load(x + k), load(x + k), squares);
        const float most = largest_magnitude(x, in);
        const bool none = most < LEAST_NUMBER;  // a NaN goes on as one
        const float length = MORE * (none ? most * std::sqrt(float(in)) : std::sqrt(sum(squares)));
        const float scale = none ? 0 : std::max(most / LARGEST_Q, length * weight.longest / MOST_PRODUCT);
        const VF factor = set1(none ? 0 : 1 / scale);
        VI all = no_dots(), highs = no_dots();
        for (int64_t k = 0; k < in; k += W) {
            const VF v = load(x + k);
            const VI q = rounded(mul(v, factor));
            const VF left = fma(negate(to_float(q)), set1(scale), v);
            rest = fma(left, left, rest);
            store_numbers(q, numbers + k * X_NUMBER, part_bytes(in), false);
            all = plus(all, q), highs = plus(highs, shift_signed<8>(plus(q, set1_integer(128))));
        }
        const float found = none ? length : MORE * std::sqrt(sum(rest)), rounding = float(in + 16) * FLOAT_ERROR;
        made[m] = {most == most ? scale : most, length, found + rounding * length, {total(all), 0}};
        if (X_PARTS == 2) made[m].sums[0] = total(highs), made[m].sums[1] = total(all) - 256 * total(highs);
    }
}

// ---------------------------------------------------------------------------------------------------- products

INLINE VF slack_of(const ScreenWeight& weight, const ScreenRow& row, int64_t n) {
    return fma(set1(row.length), load(weight.rests + n), mul(set1(row.rest), load(weight.lengths + n)));
}

// The lanes of block b that are no outputs become -infinity.
INLINE VF outputs_only(const ScreenWeight& weight, int64_t b, VF v) {
    if ((b + 1) * W <= weight.out) return v;
    float lanes[W];
    store(lanes, v);
    for (int64_t i = weight.out - b * W; i < W; i++) lanes[i] = -std::numeric_limits<float>::infinity();
    return load(lanes);
}

// ROWS rows of x from m on, BLOCKS blocks from b on.
template <int ROWS, int BLOCKS, bool ASK> void screen_tile(const ScreenCall& call, int64_t m, int64_t b, VF* lower, VF* upper) {
    const ScreenWeight& weight = *call.weight;
    const int64_t in = weight.in, half = part_bytes(in);
    const uint8_t* codes = weight.codes + b * in * W;
    const int8_t* x = call.numbers + m * call.row_bytes;
    VI sums[X_PARTS][BLOCKS * ROWS];
    unrolled<X_PARTS>([&](auto part) {
        unrolled<BLOCKS * ROWS>([&](auto i) { sums[part][i] = set1_integer(int32_t(0u - uint32_t(MIDDLE_CODE) * uint32_t(call.rows[m + i % ROWS].sums[part]))); });
    });
    for (int64_t k = 0; k < in; k += SCREEN_STEP) {
        unrolled<SCREEN_STEP / 4>([&](auto step) {
            unrolled<BLOCKS>([&](auto block) {
                const uint8_t* at = codes + block * in * W + (k + step * 4) * W;
                if (ASK && (step * 4 * W) % 64 == 0) __builtin_prefetch(at + BLOCKS * in * W, 0, 2);
                const Codes four = load_codes(at);
                unrolled<ROWS>([&](auto r) {
                    unrolled<X_PARTS>([&](auto part) {
                        VI& sum = sums[part][block * ROWS + r];
                        sum = dots(sum, four, x + r * call.row_bytes + part * half + (k + step * 4) * X_NUMBER);
                    });
                });
            });
        });
    }
    unrolled<BLOCKS * ROWS>([&](auto i) {
        const int64_t block = b + i / ROWS, n = block * W;
        const ScreenRow& row = call.rows[m + i % ROWS];
        VF v = to_float(sums[X_PARTS - 1][i]);
        if (X_PARTS == 2) v = fma(set1(256), to_float(sums[0][i]), v);
        v = mul(mul(v, load(weight.scales + n)), set1(row.scale));
        if (weight.bias) v = add(v, load_first(weight.bias + n, int(std::min<int64_t>(W, weight.out - n))));
        float* out = call.out + (m + i % ROWS) * weight.out + n;
        if (n + W <= weight.out) store(out, v);
        else store_first(out, v, int(weight.out - n));
        const VF slack = slack_of(weight, row, n), sure = outputs_only(weight, block, v);
        lower[i % ROWS] = larger(add(sure, negate(slack)), lower[i % ROWS]);
        upper[i % ROWS] = larger(add(sure, slack), upper[i % ROWS]);
    });
}

template <int ROWS> void screen_rows(const ScreenCall& call, int64_t m, int64_t first, int64_t last, VF* lower, VF* upper) {
    constexpr int MOST = SCREEN_SUMS / (int(X_PARTS) * ROWS), BLOCKS = MOST >= 4 ? 4 : MOST >= 2 ? 2 : 1;
    int64_t b = first;
    for (; b + BLOCKS <= last; b += BLOCKS) {
        if (m == 0) screen_tile<ROWS, BLOCKS, true>(call, m, b, lower, upper);
        else screen_tile<ROWS, BLOCKS, false>(call, m, b, lower, upper);
    }
    for (; b < last; b++) screen_tile<ROWS, 1, false>(call, m, b, lower, upper);
}

template <int ROWS> void screen_rows_of(int rows, const ScreenCall& call, int64_t m, int64_t first, int64_t last, VF* lower, VF* upper) {
    if (rows == ROWS) return screen_rows<ROWS>(call, m, first, last, lower, upper);
    if constexpr (ROWS > 1) screen_rows_of<ROWS - 1>(rows, call, m, first, last, lower, upper);
}

constexpr int64_t SCREEN_ROWS = 4, TOGETHER = 8;  // blocks that stay in the first cache for all rows

void multiply_screen(const ScreenCall& call, int64_t first, int64_t last, float* lower, float* upper) {
    const int64_t tiles = (call.count + SCREEN_ROWS - 1) / SCREEN_ROWS;
    VF bounds[2 * SCREEN_ROWS];
    const VF least = set1(-std::numeric_limits<float>::infinity());
    for (int64_t m = 0; m < call.count; m++) lower[m] = upper[m] = -std::numeric_limits<float>::infinity();
    for (int64_t b = first; b < last; b += TOGETHER) {
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t m = call.count * t / tiles, rows = call.count * (t + 1) / tiles - m;
            for (int64_t r = 0; r < 2 * SCREEN_ROWS; r++) bounds[r] = least;
            screen_rows_of<SCREEN_ROWS>(int(rows), call, m, b, std::min(b + TOGETHER, last), bounds, bounds + SCREEN_ROWS);
            for (int64_t r = 0; r < rows; r++) {
                lower[m + r] = std::max(lower[m + r], largest(bounds[r]));
                upper[m + r] = std::max(upper[m + r], largest(bounds[SCREEN_ROWS + r]));
            }
        }
    }
}

void mark_screen(const ScreenCall& call, int64_t row, float goal, int64_t first, int64_t last, uint8_t* marks) {
    const ScreenWeight& weight = *call.weight;
    for (int64_t b = first; b < last; b++) {
        const int64_t n = b * W, count = std::min<int64_t>(W, weight.out - n);
        const VF may = add(load_first(call.out + row * weight.out + n, int(count)), slack_of(weight, call.rows[row], n));
        if (!(largest(outputs_only(weight, b, may)) >= goal)) continue;
        float lanes[W];
        store(lanes, may);
        for (int64_t i = 0; i < count; i++) marks[n - first * W + i] |= lanes[i] >= goal;
    }
}

const Screen screen = {W, screen_row_bytes, fill_screen, prepare_screen, multiply_screen, mark_screen};

}}  // namespace core_kernels
