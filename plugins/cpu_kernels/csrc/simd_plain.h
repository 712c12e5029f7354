// Vectors of 4 floats in the compiler's own terms: SSE2, NEON, or whatever the machine has.
#pragma once

#include "weight.h"

namespace core_kernels { namespace {

constexpr int W = 4;
constexpr int MAX_ROWS = 2;
constexpr int FEW_ROWS = 2;

constexpr int PANEL_TILE = 6;  // rows of x at once over a panel: two sums each
constexpr int PANEL_ROWS = 12;  // of x, from which on panels are worth it

typedef float VF __attribute__((vector_size(16)));
typedef int32_t VI __attribute__((vector_size(16)));
typedef uint32_t VU __attribute__((vector_size(16)));

inline VF zero() { return VF{0, 0, 0, 0}; }
inline VF set1(float v) { return VF{v, v, v, v}; }
inline VF load(const float* p) { VF v; __builtin_memcpy(&v, p, 16); return v; }
inline void store(float* p, VF v) { __builtin_memcpy(p, &v, 16); }
inline VF fma(VF a, VF b, VF c) { return a * b + c; }
inline VF mul(VF a, VF b) { return a * b; }
inline VF add(VF a, VF b) { return a + b; }
inline VF negate(VF a) { return -a; }
inline float sum(VF v) { return (v[0] + v[1]) + (v[2] + v[3]); }
inline VF sums(VF a, VF b, VF c, VF d) { return VF{sum(a), sum(b), sum(c), sum(d)}; }
inline void store4(float* p, VF v) { store(p, v); }

inline VF load_first(const float* p, int count) {
    VF v = zero();
    for (int i = 0; i < W && i < count; i++) v[i] = p[i];
    return v;
}
inline VI load_words(const uint8_t* p) { VI v; __builtin_memcpy(&v, p, 16); return v; }
inline VI load_words_first(const uint8_t* p, int count) {
    VI v = {0, 0, 0, 0};
    if (count > 0) __builtin_memcpy(&v, p, 4 * (count < W ? count : W));
    return v;
}
template <int SHIFT> inline VI shift_right(VI v) { return VI(VU(v) >> SHIFT); }
inline VI mask(VI v, int bits) { return v & bits; }
inline VF to_float(VI v) { return __builtin_convertvector(v, VF); }

struct Table { float values[16]; };
inline Table load_table(const float* p) { Table t; __builtin_memcpy(t.values, p, 64); return t; }
inline VF look_up(const Table& t, VI v) {
    return VF{t.values[v[0] & 15], t.values[v[1] & 15], t.values[v[2] & 15], t.values[v[3] & 15]};
}
constexpr bool TABLE_IS_FREE = false;

struct Lanes {};
inline Lanes load_lanes(const int32_t*) { return {}; }
inline VF permute(VF v, Lanes) { return v; }
constexpr bool HAS_PERMUTE = false;  // scales are fetched lane by lane

inline float half(uint16_t h) { return half_to_float(h); }

inline VF load_halves(const uint16_t* p, int count) {
    VF v = zero();
    for (int i = 0; i < W && i < count; i++) v[i] = half_to_float(p[i]);
    return v;
}
inline VF load_brain_halves(const uint16_t* p, int count) {
    VF v = zero();
    for (int i = 0; i < W && i < count; i++) v[i] = brain_half_to_float(p[i]);
    return v;
}
inline VF load_scales(const void* base, int64_t index, int count, int32_t type) {
    VF v = zero();
    for (int i = 0; i < W && i < count; i++) {
        if (type == FLOAT32) v[i] = static_cast<const float*>(base)[index + i];
        else if (type == UINT8) v[i] = static_cast<const uint8_t*>(base)[index + i];
        else if (type == FLOAT16) v[i] = half_to_float(static_cast<const uint16_t*>(base)[index + i]);
        else v[i] = brain_half_to_float(static_cast<const uint16_t*>(base)[index + i]);
    }
    return v;
}

// ---- GGML's blocks

struct Bytes { int8_t at[32]; };  // 32 codes
template <int FROM> inline VF signed_bytes(const Bytes& v) {
    return VF{float(v.at[FROM]), float(v.at[FROM + 1]), float(v.at[FROM + 2]), float(v.at[FROM + 3])};
}
constexpr int BLOCKS = 1;  // of 4 words

inline VI load_blocks(const uint8_t* at, int, int) { return load_words(at); }
inline void load_block_halves(const uint8_t* at, int, int, VF& first, VF& second) {
    uint16_t pair[2];
    __builtin_memcpy(pair, at, 4);
    first = set1(half_to_float(pair[0])), second = set1(half_to_float(pair[1]));
}

}}  // namespace core_kernels
