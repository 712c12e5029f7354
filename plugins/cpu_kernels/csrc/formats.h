// The packings of core.layers.quant_formats, and plain halves: how a segment of a row is decoded.
//
// A format has
//   VECTORS    vectors of a segment; SEGMENT = VECTORS * W columns
//   PARTS      how many pairs of scale and offset a segment has; vector i goes by pair part(i)
//   SCALED     weight = raw * scale + offset, the offset only where OFFSET
//   column     where lane `lane` of vector `i` lies in its segment
//   segment    the bytes and scales of segment s of row n
//   raw<I>     vector I of it
#pragma once

#include "weight.h"

namespace core_kernels { namespace {

inline float scalar(const void* base, int64_t index, int32_t type) {
    if (type == FLOAT32) return static_cast<const float*>(base)[index];
    if (type == UINT8) return static_cast<const uint8_t*>(base)[index];
    const uint16_t raw = static_cast<const uint16_t*>(base)[index];
    return type == FLOAT16 ? half(raw) : brain_half_to_float(raw);
}

// The scales of one segment's lanes, whatever the size of the groups.
struct GroupScales {
    const Plan& plan;
    Lanes lanes;

    explicit GroupScales(const Plan& plan) : plan(plan), lanes(load_lanes(plan.lanes.data())) {}

    inline VF get(const void* base, int32_t type, int64_t n, int64_t s) const {
        const int64_t row = n * plan.groups;
        if (plan.mode == BROADCAST) return set1(scalar(base, row + plan.group_of[s], type));
        if (HAS_PERMUTE && plan.mode == PERMUTE) {
            const int64_t first = s * plan.groups_per_segment, left = plan.groups - first;
            const int count = int(left < plan.groups_per_segment ? left : plan.groups_per_segment);
            return permute(load_scales(base, row + first, count, type), lanes);
        }
        float found[W];
        for (int lane = 0; lane < W; lane++) {
            const int32_t group = plan.group_of[s * W + lane];
            found[lane] = group < 0 ? 0.0f : scalar(base, row + group, type);
        }
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
                plan.group_of.push_back(at < in ? int32_t(at / group) : -1);
        }
        return true;
    }
};

// 4 or 8 bit codes that lie one after the other. A lane is a 32-bit word of the row: 8 or 4 neighbouring codes.
template <int BITS, bool TABLE> struct Words {
    static constexpr int VECTORS = 32 / BITS, PARTS = 1, SEGMENT = W * VECTORS;
    static constexpr bool SCALED = true, OFFSET = !TABLE;

    const Weight& weight;
    GroupScales scales;
    Table table;
    int64_t words;  // of a row

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

    inline Segment segment(int64_t n, int64_t s) const {
        Segment found;
        const uint8_t* at = weight.codes + n * weight.row_bytes + s * W * 4;
        const int64_t left = words - s * W;
        found.words = left >= W ? load_words(at) : load_words_first(at, int(left));
        found.scale[0] = scales.get(weight.scales, weight.scale_type, n, s);
        if constexpr (OFFSET) {
            if (weight.extra_type == NONE) found.offset[0] = mul(found.scale[0], set1(-float(1 << (BITS - 1))));
            else if (weight.extra_type == UINT8) found.offset[0] = negate(mul(found.scale[0], scales.get(weight.extra, UINT8, n, s)));
            else found.offset[0] = scales.get(weight.extra, weight.extra_type, n, s);
        }
        return found;
    }
    template <int I> inline VF raw(const Segment& segment) const {
        const VI shifted = shift_right<I * BITS>(segment.words);
        if constexpr (TABLE || (BITS == 4 && TABLE_IS_FREE)) return look_up(table, shifted);
        else if constexpr (I == VECTORS - 1) return to_float(shifted);
        else return to_float(mask(shifted, (1 << BITS) - 1));
    }
};

// Floats of two bytes, column after column.
template <bool BRAIN> struct Halves {
    static constexpr int VECTORS = 4, PARTS = 1, SEGMENT = W * VECTORS;
    static constexpr bool SCALED = false, OFFSET = false;

    const Weight& weight;

    struct Segment { const uint16_t* at; int left; VF scale[1], offset[1]; };

    explicit Halves(const Plan& plan) : weight(plan.weight) {}

    static bool setup(Plan&) { return true; }
    static constexpr int column(int i, int lane) { return i * W + lane; }
    static constexpr int part(int) { return 0; }

    inline Segment segment(int64_t n, int64_t s) const {
        const int64_t left = weight.in - s * SEGMENT;
        return {reinterpret_cast<const uint16_t*>(weight.codes + n * weight.row_bytes) + s * SEGMENT, int(left < SEGMENT ? left : SEGMENT), {}, {}};
    }
    template <int I> inline VF raw(const Segment& segment) const {
        const int left = segment.left - I * W;
        return BRAIN ? load_brain_halves(segment.at + I * W, left) : load_halves(segment.at + I * W, left);
    }
};

}}  // namespace core_kernels
