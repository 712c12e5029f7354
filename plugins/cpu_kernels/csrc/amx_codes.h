// The loops for many rows of x over weights that are whole numbers with a scale for 32 columns or more (and an offset): the
// numbers themselves are multiplied, by tiles of bfloat16.
//
// A code of up to 8 bits is exactly one bfloat16, x is three of them (amx_tiles.h): three products, and next to nothing to
// decode. After each group of columns the sums of a tile are multiplied with the scales of its rows and added up. What the
// offsets add, offset * sum of x over the group, is a product of floats over groups instead of columns, cut into terms as any.
#pragma once

#include "amx.h"

namespace core_kernels { namespace {

constexpr int STEP = 32;                   // columns of a tile
constexpr int64_t STEPS_OF_SUMS = 32;      // steps whose sums of x are the columns of one more tile

// Rows of 32 bfloat16 from whole numbers in a byte: by a table for those of five bits, signed or not, else through floats.
INLINE __m512i five_bits(const float* values) {
    alignas(64) uint16_t table[32];
    for (int i = 0; i < 32; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, 4);
        table[i] = uint16_t(bits >> 16);
    }
    return _mm512_load_si512(table);
}
INLINE void put_floats(__m512 a, __m512 b, uint16_t* to) { cut<1>(a, b, to); }  // a0 b0 a1 b1 ...

// How the codes of a format become rows of tiles: `put` writes those of one segment of a row, STEPS steps `stride` apart, and
// their scales and offsets, a step's `PANEL` apart. `column` is where number j of a step's row stands in it.
template <class Format> struct Codes { static constexpr bool KNOWN = false; };

// Four bits: 16 bytes are 32 columns. The low halves come first.
struct HalfBytes {
    __m512i table;
    INLINE void put(const uint8_t* at, uint16_t* to) const {
        const __m512i twice = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)at)));
        const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
        _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_srlv_epi16(twice, shifts), table));  // only five bits count
    }
};

template <int BITS> struct Codes<Words<BITS, false>> {
    using Format = Words<BITS, false>;
    static constexpr bool KNOWN = true, OFFSET = true;
    static constexpr int STEPS = Format::SEGMENT / STEP;
    HalfBytes halves;

    explicit Codes(const Plan&) {
        float values[32];
        for (int i = 0; i < 32; i++) values[i] = float(i % 16);
        halves.table = five_bits(values);
    }
    static bool fits(const Plan& plan) { return plan.weight.group % STEP == 0; }
    static int64_t group(const Plan& plan) { return plan.weight.group / STEP; }
    static int column(int j) { return BITS == 4 ? j % 16 * 2 + j / 16 : j / 2 + j % 2 * 16; }

    INLINE void put(const Plan& plan, const typename Format::Row& row, int64_t step, uint16_t* to, float& scale, float& offset) const {
        const uint8_t* at = row.codes + step * STEP * BITS / 8;
        __builtin_prefetch(at + PANEL * plan.weight.row_bytes);
        const int64_t g = step * STEP / plan.weight.group;
        scale = row.scales[g], offset = row.offsets[g];
        if constexpr (BITS == 4) return halves.put(at, to);
        const __m128i first = _mm_loadu_si128((const __m128i*)at), second = _mm_loadu_si128((const __m128i*)(at + 16));
        put_floats(to_float(_mm512_cvtepu8_epi32(first)), to_float(_mm512_cvtepu8_epi32(second)), to);
    }
};

template <int HEAD, bool TABLE> struct Codes<Nibbles<HEAD, TABLE>> {
    using Format = Nibbles<HEAD, TABLE>;
    static constexpr bool KNOWN = true, OFFSET = HEAD == 4;
    static constexpr int STEPS = Format::SEGMENT / STEP;
    HalfBytes halves;

    explicit Codes(const Plan&) {
        float values[32];
        for (int i = 0; i < 32; i++) values[i] = TABLE ? float(IQ4_VALUES[i % 16]) : float(i % 16 - (HEAD == 2 ? 8 : 0));
        halves.table = five_bits(values);
    }
    static bool fits(const Plan&) { return true; }
    static int64_t group(const Plan&) { return 1; }
    static int column(int j) { return j; }

    INLINE void put(const Plan& plan, const typename Format::Row& row, int64_t step, uint16_t* to, float& scale, float& offset) const {
        const uint8_t* at = row.at + step * Format::SIZE;
        __builtin_prefetch(at + PANEL * plan.weight.row_bytes);
        scale = half_at(at);
        if constexpr (OFFSET) offset = half_at(at + 2);
        halves.put(at + HEAD, to);
    }
};

template <class Q> struct Codes<Blocks<Q>> {
    using Format = Blocks<Q>;
    static constexpr bool KNOWN = Q::GROUP == STEP, OFFSET = Q::OFFSET;
    static constexpr bool WIDE = std::is_same_v<Q, Q8> || std::is_same_v<Q, IQ4XS>;  // more than five bits
    static constexpr int STEPS = Format::SEGMENT / STEP;
    __m512i table;

    explicit Codes(const Plan&) {
        float values[32];
        for (int i = 0; i < 32; i++) values[i] = float(Q::OFFSET || i < 16 ? i : i - 32);
        table = five_bits(values);
    }
    static bool fits(const Plan&) { return true; }
    static int64_t group(const Plan&) { return 1; }
    static int column(int j) { return WIDE ? j / 2 + j % 2 * 16 : j; }

    INLINE void put(const Plan& plan, const typename Format::Row& row, int64_t step, uint16_t* to, float& scale, float& offset) const {
        const int64_t s = step / STEPS;
        const uint8_t* block = row.at + s / Q::PIECES * Q::SIZE;
        __builtin_prefetch(block + PANEL * plan.weight.row_bytes);
        Bytes bytes[STEPS];
        Q::read(block, int(s % Q::PIECES), bytes);
        scale = row.scales[step];
        if constexpr (OFFSET) offset = row.offsets[step];
        const Bytes codes = bytes[step % STEPS];
        if constexpr (WIDE) put_floats(signed_bytes<0>(codes), signed_bytes<16>(codes), to);
        else _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table));
    }
};

// Tiles of x that a block has: those of its columns, and those of the sums over 32 of them.
inline int64_t sum_steps(int64_t steps) { return (steps + STEPS_OF_SUMS - 1) / STEPS_OF_SUMS; }

// 16 rows of x from `row` on: [steps][X_TERMS] tiles, then those of the sums of each step.
template <class Format> void cut_x_for_codes(const Plan& plan, const float* x, int64_t row, int64_t rows, int64_t from, int64_t to, uint16_t* tiles) {
    using C = Codes<Format>;
    const int64_t first = from * C::STEPS, steps = (to - from) * C::STEPS, in = plan.weight.in;
    const Turned turned(plan, x, row, rows, plan.weight.order ? 0 : first * STEP, plan.weight.order ? in : std::min(in, (first + steps) * STEP));
    uint16_t* sums = tiles + steps * X_TERMS * TILE;
    for (int64_t base = 0; base < steps; base += STEPS_OF_SUMS, sums += X_TERMS * TILE) {
        VF total[STEPS_OF_SUMS];
        for (int64_t at = 0; at < STEPS_OF_SUMS; at++) {
            total[at] = zero();
            const int64_t step = base + at;
            if (step >= steps) continue;
            const auto column = [&](int j) {
                const int64_t found = (first + step) * STEP + C::column(j);
                return turned.column(found >= in ? -1 : plan.weight.order ? plan.weight.order[found] : found);
            };
            for (int pair = 0; pair < W; pair++) {
                const VF a = column(2 * pair), b = column(2 * pair + 1);
                cut<X_TERMS>(a, b, tiles + step * X_TERMS * TILE + pair * STEP);
                total[at] = add(total[at], add(a, b));
            }
        }
        for (int pair = 0; pair < W; pair++) cut<X_TERMS>(total[pair], total[pair + W], sums + pair * STEP);
    }
}

// Adds the sums of four tiles, each row of the weight times its scale, to those of the groups before.
template <bool PAIR> INLINE void add_scaled(const float* found, const float* scales, float* total) {
    for (int r = 0; r < PANEL; r++) {
        const VF scale = set1(scales[r]);
        const float *first = found + r * W, *second = first + PANEL * W;
        if constexpr (PAIR) {
            store(total + r * W, fma(load(first), scale, load(total + r * W)));
            store(total + PANEL * W + r * W, fma(load(second), scale, load(total + PANEL * W + r * W)));
        } else {
            store(total + r * W, fma(add(load(first), load(second)), scale, load(total + r * W)));
        }
    }
}

template <class Format> struct CodeBlock {
    using C = Codes<Format>;
    const Plan& plan;
    const TiledCall& call;
    const C codes{plan};
    const Format format{plan};
    const int64_t first = call.from * C::STEPS, steps = (call.to - call.from) * C::STEPS, there = plan.weight.in / STEP - first;
    const int64_t group = C::group(plan), tiles = (call.rows + W - 1) / W, x_tile = tiles_of_x(steps) * X_TERMS * TILE;
    const int64_t row_floats = format.row_floats();
    const int64_t kept = tiles > 2 ? steps : 2;  // steps of codes: no more than are used, so that they stay near
    uint16_t *weights, *offset_tiles;
    float *found, *total, *scales, *offsets, *row_memory;

    CodeBlock(const Plan& plan, const TiledCall& call) : plan(plan), call(call) {
        const int64_t offset_floats = sum_steps(steps) * STEPS_OF_SUMS * PANEL;
        float* at = worker_memory(kept * TILE + sum_steps(steps) * X_TERMS * TILE + 12 * W * W + steps * PANEL + offset_floats + PANEL * row_floats);
        weights = reinterpret_cast<uint16_t*>(at), at += kept * TILE;
        offset_tiles = reinterpret_cast<uint16_t*>(at), at += sum_steps(steps) * X_TERMS * TILE;
        found = at, at += 8 * W * W;
        total = at, at += 4 * W * W;
        scales = at, at += steps * PANEL;
        offsets = at, at += offset_floats;  // [PANEL][steps, rounded up]
        row_memory = at;
    }

    INLINE uint16_t* tiles_of(int64_t step) const { return weights + (kept == 2 ? step & 1 : step) * 2 * TILE; }

    INLINE void put(const typename Format::Row* rows, int64_t step) {
        uint16_t* to = tiles_of(step);
        const int64_t stride = sum_steps(steps) * STEPS_OF_SUMS;
        if (step >= there) {  // columns that the weight does not have
            memset(to, 0, 2 * TILE * sizeof(uint16_t));
            memset(scales + step * PANEL, 0, PANEL * sizeof(float));
            for (int r = 0; r < PANEL; r++) offsets[r * stride + step] = 0.0f;
            return;
        }
        for (int r = 0; r < PANEL; r++) codes.put(plan, rows[r], first + step, to + r * STEP, scales[step * PANEL + r], offsets[r * stride + step]);
    }

    void put_offsets() {
        const int64_t stride = sum_steps(steps) * STEPS_OF_SUMS;
        for (int64_t q = 0; q < sum_steps(steps); q++)
            for (int r = 0; r < PANEL; r++) {
                const float* at = offsets + r * stride + q * STEPS_OF_SUMS;
                cut<X_TERMS>(load(at), load(at + W), offset_tiles + (q * 2 * X_TERMS + r / W * X_TERMS) * TILE + r % W * STEP);
            }
    }

    // Rows of x of one or two tiles. The first of them bring the codes into tiles, a step ahead of the products.
    template <bool PAIR> void multiply(const typename Format::Row* rows, int64_t t) {
        const uint16_t *x = call.x + t * x_tile, *second = x + x_tile;
        for (int at = 0; at < 4 * W * W; at += W) store(total + at, zero());
        if (t == 0) put(rows, 0);
        const float* waiting = nullptr;  // scales of the group whose sums are stored, but not yet added
        int now = 0;
        zero_sums();
        for (int64_t step = 0; step < steps; step++) {
            memory_is_as_written();
            if constexpr (PAIR) tile_step<1>(tiles_of(step), x + step * X_TERMS * TILE, second + step * X_TERMS * TILE);
            else tile_step<1>(tiles_of(step), x + step * X_TERMS * TILE);
            const bool last = (first + step + 1) % group == 0 || step + 1 == steps;
            if (last) store_sums(found + now * 4 * W * W), zero_sums();
            if (t == 0 && step + 1 < steps) put(rows, step + 1);
            if (!last) continue;
            if (waiting) add_scaled<PAIR>(found + (1 - now) * 4 * W * W, waiting, total);
            waiting = scales + step * PANEL;
            now = 1 - now;
        }
        add_scaled<PAIR>(found + (1 - now) * 4 * W * W, waiting, total);
        if constexpr (C::OFFSET) {
            if (t == 0) put_offsets();
            memory_is_as_written();
            for (int64_t q = 0; q < sum_steps(steps); q++) {
                const int64_t at = (steps + q) * X_TERMS * TILE;
                if constexpr (PAIR) tile_step<X_TERMS>(offset_tiles + q * 2 * X_TERMS * TILE, x + at, second + at);
                else tile_step<X_TERMS>(offset_tiles + q * 2 * X_TERMS * TILE, x + at);
            }
            store_sums(found);
            for (int at = 0; at < (PAIR ? 4 : 2) * W * W; at += W)
                store(total + at, add(load(total + at), PAIR ? load(found + at) : add(load(found + at), load(found + 2 * W * W + at))));
        }
    }

    void write(int64_t t, int half, int64_t n, int64_t last) {
        const int64_t m = (t + half) * W;
        float* low = total + half * 2 * W * W;
        write_tiles(plan, low, low + W * W, call.out + m * plan.weight.out, n, last, int(std::min<int64_t>(W, call.rows - m)), call.from == 0);
    }

    void run(int64_t n, int64_t last) {
        typename Format::Row rows[PANEL];
        for (int r = 0; r < PANEL; r++) rows[r] = format.row(std::min(n + r, last - 1), row_memory + r * row_floats);
        for (int64_t t = 0; t < tiles; t += 2) {
            if (t + 1 < tiles) multiply<true>(rows, t), write(t, 1, n, last);
            else multiply<false>(rows, t);
            write(t, 0, n, last);
        }
    }
};

template <class Format> void multiply_codes(const Plan& plan, const TiledCall& call, int64_t first, int64_t last) {
    const Tiles registers;
    CodeBlock<Format> block(plan, call);
    for (int64_t n = first; n < last; n += PANEL) block.run(n, last);
}

// By codes where a format and its groups allow it, else by floats.
template <class Format> void multiply_tiles(const Plan& plan, const TiledCall& call, int64_t first, int64_t last) {
    if constexpr (Codes<Format>::KNOWN) if (Codes<Format>::fits(plan)) return multiply_codes<Format>(plan, call, first, last);
    tiled_multiply<Format>(plan, call, first, last);
}
template <class Format> void cut_x_of(const Plan& plan, const float* x, int64_t row, int64_t rows, int64_t from, int64_t to, uint16_t* tiles) {
    if constexpr (Codes<Format>::KNOWN) if (Codes<Format>::fits(plan)) return cut_x_for_codes<Format>(plan, x, row, rows, from, to, tiles);
    cut_x(plan, x, row, rows, from, to, tiles);
}

}}  // namespace core_kernels
