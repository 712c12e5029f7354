// What the C ABI, the dispatcher and the code of each instruction set share. Knows no instruction set.
//
// A weight [out, in] is read row by row. Every packing cuts a row into segments: a fixed number of vectors of codes whose
// lanes share a scale and an offset. In which column of the weight a lane of a segment lies is the packing's choice, made so
// that decoding is cheap; x is brought into the same order once a call, so that both are read straight ahead.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace core_kernels {

constexpr int COLUMNS = 4;  // rows of the weight, that is columns of out, at a time

enum FloatType : int32_t { NONE = 0, UINT8 = 1, FLOAT16 = 2, BFLOAT16 = 3, FLOAT32 = 4 };

// Mirrored field by field by core_cpu_kernels/library.py.
struct Weight {
    int64_t out, in;
    int64_t group;           // columns that share a scale; 0: the packing knows
    int64_t row_bytes;       // from one row of codes to the next
    const uint8_t* codes;    // [out, row_bytes]
    const void* scales;      // [out, in / group] of scale_type
    const void* extra;       // [out, in / group] of extra_type: UINT8 zeros, or float offsets; NONE: the middle code is zero
    const float* table;      // [16]
    const int64_t* order;    // [in]: column j of the codes multiplies x[order[j]]; null: x[j]
    const float* bias;       // [out], or null
    int32_t packing, scale_type, extra_type;
};

enum ScaleMode { BROADCAST, PERMUTE, BY_LANE };

// A weight made ready: what follows from its shape alone. Holds no copy of its bytes.
struct Plan {
    Weight weight;
    int64_t segments = 0;            // a row
    int64_t vectors = 0;             // of x a row: segments * vectors of a segment
    int64_t x_stride = 0;            // floats from one row of prepared x to the next
    std::vector<int32_t> columns;    // [vectors * lanes]: which x stands there, -1 a zero; empty: x as it is, then zeros
    ScaleMode mode = BROADCAST;
    int64_t groups = 0;              // a row
    int64_t groups_per_segment = 0;  // PERMUTE
    std::vector<int32_t> group_of;   // BROADCAST [segments], BY_LANE [segments * lanes] (groups: no such column)
    std::vector<int32_t> lanes;      // PERMUTE [lanes]: which of the segment's groups
};

// Memory that will be read.
struct Stretch {
    const char *at = nullptr, *end = nullptr;
};

// The codes of rows [first, last) of a weight.
inline Stretch codes_of(const Weight& weight, int64_t first, int64_t last) {
    const char* codes = reinterpret_cast<const char*>(weight.codes);
    return {codes + first * weight.row_bytes, codes + last * weight.row_bytes};
}

// One multiplication: out[rows, n] = x[rows, in] @ weight.T.
struct Call {
    const float* x;      // prepared, [rows, x_stride]
    const float* x_sum;  // one row only: the sum of a segment's vectors of each part, [segments * parts, lanes]
    float* out;          // [rows, out]
    int64_t rows;
    Stretch after;       // what the same thread will probably read next
};

// The code of one packing in one instruction set.
struct Packing {
    bool (*setup)(Plan&);  // false: there is no kernel for this weight
    void (*prepare)(const Plan&, const float* x, int64_t rows, float* prepared, float* sums);
    void (*multiply)(const Plan&, const Call&, int64_t first, int64_t last);  // rows [first, last) of the weight
    int64_t (*sum_floats)(const Plan&);
    int64_t most_rows = 0;  // of x, up to which it is worth it; asked of Ready's `other` alone, as least_rows is
    const struct Tiled* tiled = nullptr;  // another way for many rows
    int64_t least_rows = 1;  // of x, from which on it is worth it
    int64_t x_rows = 1;      // rows of x that are prepared together

    int64_t x_floats(const Plan& plan, int64_t rows) const { return (rows + x_rows - 1) / x_rows * x_rows * plan.x_stride; }
};

// Numbers of packings; mirrored by core_cpu_kernels/kernels.py. GGML's are 100 + ggml_type.
enum PackingId : int32_t {
    AFFINE4 = 1, AFFINE8 = 2, TABLE4 = 3, HALF = 4, BRAIN_HALF = 5, FLOATS = 6,
    Q4_0 = 102, Q4_1 = 103, Q5_0 = 106, Q5_1 = 107, Q8_0 = 108,
    Q2_K = 110, Q3_K = 111, Q4_K = 112, Q5_K = 113, Q6_K = 114, IQ4_NL = 120, IQ4_XS = 123,
};

template <class Body, int... I> INLINE void unroll(Body& body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class Body> INLINE void unrolled(Body&& body) {
    unroll(body, std::make_integer_sequence<int, N>{});
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
    union { uint32_t i; float f; } u;
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
        u.f = float(fraction) * 5.9604644775390625e-8f;
        u.i |= sign;
    } else {
        u.i = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    }
    return u.f;
}

inline float brain_half_to_float(uint16_t h) {
    union { uint32_t i; float f; } u;
    u.i = uint32_t(h) << 16;
    return u.f;
}

}  // namespace core_kernels
