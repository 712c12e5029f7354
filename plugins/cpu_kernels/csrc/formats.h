// The packings of core.layers.quant_formats, and plain halves: how a segment of a row is decoded.
//
// A format has
//   VECTORS    vectors of a segment; SEGMENT = VECTORS * W columns
//   PARTS      how many pairs of scale and offset a segment has; vector i goes by pair part(i)
//   SCALED     weight = raw * scale + offset, the offset only where OFFSET
//   FEW        rows of x up to which decoding in registers is worth its code
//   column     where lane `lane` of vector `i` lies in its segment
//   row        row n of the weight, with its scales as floats in memory of row_floats()
//   segment    the bytes and scales of segment s of a row
//   raw<I>     vector I of it
//   IN_PLACE   one row only: raw_in_place<I> leaves a code where it stands in its word, that is times in_place(I), which is
//              a power of two and is taken out of x instead; so no bit of the result changes, and a shift is saved
#pragma once

#include "weight.h"

namespace core_kernels { namespace {

// The scales of a row's groups as floats, and of one segment's lanes, whatever the size of the groups.
struct GroupScales {
    const Plan& plan;
    Lanes lanes;

    explicit GroupScales(const Plan& plan) : plan(plan), lanes(load_lanes(plan.lanes.data())) {}

    // Whole vectors, and one more of zeros: what stands beyond the last group multiplies zeros and must not be NaN.
    int64_t floats() const { return (plan.groups + W - 1) / W * W + W; }

    void fill(const void* base, int32_t type, int64_t n, float* to) const {
        int64_t g = 0;
        for (; g < plan.groups; g += W)
            store(to + g, load_scales(base, n * plan.groups + g, int(plan.groups - g < W ? plan.groups - g : W), type));
        store(to + g, zero());
    }
    INLINE VF get(const float* values, int64_t s) const {
        if (plan.mode == BROADCAST) return set1(values[plan.group_of[s]]);
        if (plan.mode == PERMUTE) return permute(load(values + s * plan.groups_per_segment), lanes);
        float found[W];
        for (int lane = 0; lane < W; lane++) found[lane] = values[plan.group_of[s * W + lane]];
        return load(found);
    }

    // Groups are whole units of `unit` neighbouring columns, one unit a lane.
    static bool setup(Plan& plan, int unit) {
        const int64_t group = plan.weight.group, in = plan.weight.in, segment = int64_t(W) * unit;
        if (group <= 0 || in % group || group % unit) return false;
        plan.groups = in / group;
        plan.lanes.assign(W, 0);
        plan.group_of.clear();
        if (group % segment == 0 || plan.groups == 1) {
            plan.mode = BROADCAST;
            for (int64_t s = 0; s < plan.segments; s++) plan.group_of.push_back(int32_t(s * segment / group));
        } else if (HAS_PERMUTE && segment % group == 0) {
            plan.mode = PERMUTE;
            plan.groups_per_segment = segment / group;
            for (int lane = 0; lane < W; lane++) plan.lanes[lane] = int32_t(lane * unit / group);
        } else {
            plan.mode = BY_LANE;
            for (int64_t at = 0; at < plan.segments * segment; at += unit)
                plan.group_of.push_back(int32_t(at < in ? at / group : plan.groups));
        }
        return true;
    }
};

// The last code of a word would be negative where it stands, so that one is shifted after all.
template <int BITS> constexpr float in_place_factor(int i) { return i == 32 / BITS - 1 ? 1.0f : float(uint32_t(1) << (BITS * i)); }
template <int BITS, int I> INLINE VF code_in_place(VI words) {
    if constexpr (I == 32 / BITS - 1) return to_float(shift_right<I * BITS>(words));
    else return to_float(mask(words, int(((1u << BITS) - 1) << (I * BITS))));
}

// 4 or 8 bit codes that lie one after the other. A lane is a 32-bit word of the row: 8 or 4 neighbouring codes.
template <int BITS, bool TABLE> struct Words {
    static constexpr int VECTORS = 32 / BITS, PARTS = 1, SEGMENT = W * VECTORS;
    static constexpr bool SCALED = true, OFFSET = !TABLE;
    static constexpr int FEW = BITS == 4 ? 2 : FEW_ROWS;  // four bits take more registers
    static constexpr bool IN_PLACE = !TABLE;

    const Weight& weight;
    GroupScales scales;
    Table table;
    int64_t words;  // of a row

    struct Row { const uint8_t* codes; const float *scales, *offsets; };
    struct Segment { VI words; VF scale[1], offset[1]; };

    explicit Words(const Plan& plan) : weight(plan.weight), scales(plan), table(load_table(table_of(plan))), words(weight.in / VECTORS) {}

    static const float* table_of(const Plan& plan) {
        static const float codes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        return TABLE ? plan.weight.table : codes;
    }
    static bool setup(Plan& plan) {
        return plan.weight.in % VECTORS == 0 && plan.weight.row_bytes >= plan.weight.in * BITS / 8 && GroupScales::setup(plan, VECTORS);
    }
    static constexpr int column(int i, int lane) { return lane * VECTORS + i; }
    static constexpr int part(int) { return 0; }

    int64_t row_floats() const { return 2 * scales.floats(); }

    Row row(int64_t n, float* memory) const {
        float* offsets = memory + scales.floats();
        scales.fill(weight.scales, weight.scale_type, n, memory);
        if constexpr (OFFSET) {
            if (weight.extra_type == NONE || weight.extra_type == UINT8) {  // offset = -zero * scale
                if (weight.extra_type == UINT8) scales.fill(weight.extra, UINT8, n, offsets);
                for (int64_t g = 0; g < scales.floats(); g += W) {
                    const VF zeros = weight.extra_type == UINT8 ? load(offsets + g) : set1(float(1 << (BITS - 1)));
                    store(offsets + g, negate(mul(zeros, load(memory + g))));
                }
            } else {
                scales.fill(weight.extra, weight.extra_type, n, offsets);
            }
        }
        return {weight.codes + n * weight.row_bytes, memory, offsets};
    }
    INLINE Segment segment(const Row& row, int64_t s) const {
        Segment found;
        const uint8_t* at = row.codes + s * W * 4;
        const int64_t left = words - s * W;
        __builtin_prefetch(at + COLUMNS * weight.row_bytes);  // the same place of the row that comes after these
        found.words = left >= W ? load_words(at) : load_words_first(at, int(left));
        found.scale[0] = scales.get(row.scales, s);
        if constexpr (OFFSET) found.offset[0] = scales.get(row.offsets, s);
        return found;
    }
    template <int I> INLINE VF raw(const Segment& segment) const {
        const VI shifted = shift_right<I * BITS>(segment.words);
        if constexpr (TABLE || (BITS == 4 && TABLE_IS_FREE)) return look_up(table, shifted);
        else if constexpr (I == VECTORS - 1) return to_float(shifted);
        else return to_float(mask(shifted, (1 << BITS) - 1));
    }
    static constexpr float in_place(int i) { return in_place_factor<BITS>(i); }
    template <int I> INLINE VF raw_in_place(const Segment& segment) const { return code_in_place<BITS, I>(segment.words); }
};

// Floats of two bytes, column after column.
template <bool BRAIN> struct Halves {
    static constexpr int VECTORS = 4, PARTS = 1, SEGMENT = W * VECTORS;
    static constexpr bool SCALED = false, OFFSET = false;
    static constexpr bool IN_PLACE = false;

    const Weight& weight;

    struct Row { const uint16_t* at; };
    struct Segment { const uint16_t* at; int left; };

    explicit Halves(const Plan& plan) : weight(plan.weight) {}

    static bool setup(Plan&) { return true; }
    static constexpr int column(int i, int lane) { return i * W + lane; }
    static constexpr int part(int) { return 0; }

    static constexpr int BYTES = 2;
    static INLINE VF get_first(const uint8_t* row, int64_t at, int count) {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(row) + at;
        return BRAIN ? load_brain_halves(from, count) : load_halves(from, count);
    }
    static INLINE VF get(const uint8_t* row, int64_t at) { return get_first(row, at, W); }

    int64_t row_floats() const { return 0; }
    Row row(int64_t n, float*) const { return {reinterpret_cast<const uint16_t*>(weight.codes + n * weight.row_bytes)}; }

    INLINE Segment segment(const Row& row, int64_t s) const {
        const int64_t left = weight.in - s * SEGMENT;
        return {row.at + s * SEGMENT, int(left < SEGMENT ? left : SEGMENT)};
    }
    template <int I> INLINE VF raw(const Segment& segment) const {
        const int left = segment.left - I * W;
        return BRAIN ? load_brain_halves(segment.at + I * W, left) : load_halves(segment.at + I * W, left);
    }
};

// Floats of four bytes, column after column: multiplied where they lie, whatever the number of rows.
struct Floats {
    static constexpr int VECTORS = 4, PARTS = 1, SEGMENT = W * VECTORS;
    static constexpr bool SCALED = false, OFFSET = false;
    static constexpr bool IN_PLACE = false;

    static constexpr int BYTES = 4;
    static INLINE VF get_first(const uint8_t* row, int64_t at, int count) { return load_first(reinterpret_cast<const float*>(row) + at, count); }
    static INLINE VF get(const uint8_t* row, int64_t at) { return load(reinterpret_cast<const float*>(row) + at); }

    static bool setup(Plan& plan) { return plan.weight.row_bytes % 4 == 0; }
    static constexpr int column(int i, int lane) { return i * W + lane; }
    static constexpr int part(int) { return 0; }
};

}}  // namespace core_kernels
