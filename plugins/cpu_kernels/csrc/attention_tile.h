// The loops of attention: softmax(q @ k.T) @ v of one tile, key by key as the cache has them (attention.h).
//
// The softmax is computed as the keys come (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022): sums are kept
// relative to the largest score so far, and shrunk when a larger one comes. Rows of a tile go MAX_ROWS at a time through
// all that follows, while TILE_KEYS keys and values are in the cache of the core:
//   scores    MAX_ROWS x 4 vectors of keys in registers, one dimension after the other
//   softmax   row by row; a row sees keys [oldest seen, own position], so what is masked is left out, not computed
//   sums      MAX_ROWS x 4 vectors of v's dimensions in registers, one key after the other
#pragma once

#include <algorithm>

#include "attention.h"
#include "attention_math.h"
#include "scratch.h"

namespace core_kernels { namespace {

constexpr int PANEL = 4;  // vectors side by side in registers

// -------------------------------------------------------------------------------------------------- storing

template <class From, class To> void store_rows(const AttentionCall& call, int64_t first, int64_t last, const From* from, To* to, int64_t token_stride, int64_t head_stride, int64_t dims, bool transposed) {
    const AttentionLayer& layer = *call.layer;
    const int64_t size = layer.block_size, step = transposed ? size : 1;
    for (int64_t token = first; token < last; token++) {
        const int64_t block = call.step->slots[token] / size, offset = call.step->slots[token] % size;
        for (int64_t head = 0; head < layer.kv_heads; head++) {
            const From* x = from + token * token_stride + head * head_stride;
            To* at = to + (block * layer.kv_heads + head) * size * dims + offset * (transposed ? 1 : dims);
            for (int64_t d = 0; d < dims; d++) put(at + d * step, to_number(x[d]));
        }
    }
}

void store_tokens(const AttentionCall& call, int64_t first, int64_t last) {
    const AttentionLayer& layer = *call.layer;
    with_type(layer.cache_type, [&](auto* to) {
        using To = decltype(to);
        with_type(layer.k_type, [&](auto* from) {
            const auto* k = static_cast<decltype(from)>(const_cast<void*>(call.k));
            store_rows(call, first, last, k, static_cast<To>(layer.keys), layer.k_token, layer.k_head, layer.k_dim, true);
        });
        with_type(layer.v_type, [&](auto* from) {
            const auto* v = static_cast<decltype(from)>(const_cast<void*>(call.v));
            store_rows(call, first, last, v, static_cast<To>(layer.values), layer.v_token, layer.v_head, layer.v_dim, false);
        });
    });
}

// -------------------------------------------------------------------------------------------------- products

// scores[r][at[c] ...] = q[r] . keys[c]: ROWS rows, COLS vectors of keys whose dimensions are `step` elements apart.
template <class T, int ROWS, int COLS> void score(const float* q, int64_t q_stride, const T* const* keys, const int32_t* at, int64_t step, int64_t dims, float* scores, int64_t stride) {
    VF total[ROWS][COLS];
    unrolled<ROWS * COLS>([&](auto i) { total[i / COLS][i % COLS] = zero(); });
    const T* key[COLS];
    unrolled<COLS>([&](auto c) { key[c] = keys[c]; });
    for (int64_t d = 0; d < dims; d++) {
        if constexpr (ROWS > COLS) {  // hold what is fewer in registers
            VF held[COLS];
            unrolled<COLS>([&](auto c) { held[c] = load_floats(key[c] + d * step); });
            unrolled<ROWS>([&](auto r) {
                const VF one = set1(q[r * q_stride + d]);
                unrolled<COLS>([&](auto c) { total[r][c] = fma(held[c], one, total[r][c]); });
            });
        } else {
            VF held[ROWS];
            unrolled<ROWS>([&](auto r) { held[r] = set1(q[r * q_stride + d]); });
            unrolled<COLS>([&](auto c) {
                const VF one = load_floats(key[c] + d * step);
                unrolled<ROWS>([&](auto r) { total[r][c] = fma(held[r], one, total[r][c]); });
            });
        }
    }
    // In this order: where a block is no whole number of vectors, the next one overwrites what lies behind the block.
    unrolled<ROWS>([&](auto r) { unrolled<COLS>([&](auto c) { store(scores + r * stride + at[c], total[r][c]); }); });
}

// Keys [from, to) of a tile, whose values lie in blocks of `size` keys.
template <class T> struct Values {
    const T* const* blocks;
    int64_t size, dims;
    int64_t from, to;
};

// out[r] = out[r] * shrink[r] + weights[r] @ values: ROWS rows, COLS vectors of dimensions.
template <class T, int ROWS, int COLS> void gather(const float* weights, int64_t stride, const float* shrink, const Values<T>& values, int64_t column, float* out, int64_t out_stride) {
    VF total[ROWS][COLS];
    unrolled<ROWS>([&](auto r) {
        const VF factor = set1(shrink[r]);
        unrolled<COLS>([&](auto c) { total[r][c] = mul(factor, load(out + r * out_stride + c * W)); });
    });
    for (int64_t j = values.from; j < values.to;) {
        const int64_t block = j / values.size, end = std::min(values.to, (block + 1) * values.size);
        const T* v = values.blocks[block] + (j - block * values.size) * values.dims + column;
        for (; j < end; j++, v += values.dims) {
            if constexpr (ROWS > COLS) {
                VF held[COLS];
                unrolled<COLS>([&](auto c) { held[c] = load_floats(v + c * W); });
                unrolled<ROWS>([&](auto r) {
                    const VF one = set1(weights[r * stride + j]);
                    unrolled<COLS>([&](auto c) { total[r][c] = fma(held[c], one, total[r][c]); });
                });
            } else {
                VF held[ROWS];
                unrolled<ROWS>([&](auto r) { held[r] = set1(weights[r * stride + j]); });
                unrolled<COLS>([&](auto c) {
                    const VF one = load_floats(v + c * W);
                    unrolled<ROWS>([&](auto r) { total[r][c] = fma(held[r], one, total[r][c]); });
                });
            }
        }
    }
    unrolled<ROWS>([&](auto r) { unrolled<COLS>([&](auto c) { store(out + r * out_stride + c * W, total[r][c]); }); });
}

// body(columns, width) over `count` vectors, as many at a time as registers hold; the width is a constant.
template <class Body> INLINE void in_panels(int64_t count, Body&& body) {
    int64_t c = 0;
    for (; c + PANEL <= count; c += PANEL) body(c, std::integral_constant<int, PANEL>{});
    if (count - c >= 2) body(c, std::integral_constant<int, 2>{}), c += 2;
    if (count > c) body(c, std::integral_constant<int, 1>{});
}

template <int ROWS = MAX_ROWS, class Body> INLINE void with_rows(int rows, Body&& body) {
    if (rows == ROWS) return body(std::integral_constant<int, ROWS>{});
    if constexpr (ROWS > 1) with_rows<ROWS - 1>(rows, body);
}

// -------------------------------------------------------------------------------------------------- softmax

// One row's scores of a tile: it sees keys [from, to), of which key 0 lies `distance` tokens before it.
struct ScoreRow {
    float* scores;
    int from, to;
    float distance, slope, softcap;

    // Apply softcap and slope, and make the largest and the keys out of sight known.
    float largest_score() {
        VF top = set1(MINUS_INFINITY);
        for (int at = from / W * W; at < to; at += W) {
            VF s = load(scores + at);
            if (softcap != 0) s = mul(set1(softcap), tanh_of(mul(s, set1(1 / softcap))));
            if (slope != 0) s = fma(set1(slope), add(lane_numbers(), set1(float(at) - distance)), s);
            const bool whole = at >= from && at + W <= to;
            if (!whole) s = keep_lanes(s, from - at, to - at, set1(MINUS_INFINITY));
            if (!whole || softcap != 0 || slope != 0) store(scores + at, s);
            top = larger(top, s);
        }
        return largest(top);
    }

    // scores = exp(scores - most), zeros where nothing is seen in [all_from, all_to); returns the sums by lane.
    VF exponents(float most, int all_from, int all_to) {
        VF total = zero();
        const int begin = std::min(from, to) / W * W, end = from < to ? to : begin;
        for (int at = all_from / W * W; at < begin; at += W) store(scores + at, zero());
        int at = begin;
        for (; at < end; at += W) {
            VF p = exp_of(minus(load(scores + at), set1(most)));
            if (at < from || at + W > to) p = keep_lanes(p, from - at, to - at, zero());
            store(scores + at, p);
            total = add(total, p);
        }
        for (; at < all_to; at += W) store(scores + at, zero());
        return total;
    }
};

// -------------------------------------------------------------------------------------------------- a tile

// The blocks of a few keys, and their keys as vectors.
template <class T> struct Keys {
    int64_t position, count;  // of the first key; keys
    int64_t vectors;
    const T** keys;    // [vectors]
    int32_t* at;       // [vectors], the first key of each
    const T** values;  // [blocks]
};

template <class T> struct TileWork {
    const AttentionCall& call;
    const Tile& tile;
    const AttentionLayer& layer = *call.layer;
    const int64_t group = layer.heads / layer.kv_heads, rows = (tile.last - tile.first) * group;
    const int64_t start = call.step->context_lens[tile.request] - (call.step->query_starts[tile.request + 1] - call.step->query_starts[tile.request]);  // position of the first new token
    const int64_t size = layer.block_size, blocks_at_once = std::max<int64_t>(1, TILE_KEYS / size), vectors_of_block = (size + W - 1) / W;
    const int64_t v_floats = whole_vectors(layer.v_dim, W), stride = whole_vectors(blocks_at_once * size, W) + W;
    const int64_t* table = call.step->tables + tile.request * call.step->table_width;
    float *q, *scores, *out, *most, *total;
    Keys<T> now, next;

    TileWork(const AttentionCall& call, const Tile& tile, const AttentionPart* part) : call(call), tile(tile) {
        static thread_local Scratch scratch;
        const int64_t vectors = blocks_at_once * vectors_of_block;
        const int64_t wanted = rows * (layer.k_dim + v_floats + 1 + W) + MAX_ROWS * stride + 6 * vectors + 4 * blocks_at_once;
        float* memory = scratch.get(wanted);
        if (!memory) std::abort();  // a few hundred kilobytes; there is nobody to tell
        out = memory, memory += rows * v_floats;
        scores = memory, memory += MAX_ROWS * stride;
        total = memory, memory += rows * W;
        for (Keys<T>* one : {&now, &next}) {
            one->keys = reinterpret_cast<const T**>(memory), memory += 2 * vectors;
            one->values = reinterpret_cast<const T**>(memory), memory += 2 * blocks_at_once;
        }
        for (Keys<T>* one : {&now, &next}) one->at = reinterpret_cast<int32_t*>(memory), memory += vectors;
        most = memory, memory += rows;
        q = memory;
        if (part) out = part->out, most = part->most;
        std::fill(out, out + rows * v_floats, 0.0f);
        std::fill(total, total + rows * W, 0.0f);
        std::fill(most, most + rows, MINUS_INFINITY);
        read_queries();
    }

    void read_queries() {
        const int64_t first = call.step->query_starts[tile.request] + tile.first;
        with_type(layer.q_type, [&](auto* from) {
            const auto* x = static_cast<decltype(from)>(const_cast<void*>(call.q));
            for (int64_t row = 0; row < rows; row++) {
                const auto* one = x + (first + row / group) * layer.q_token + (tile.kv_head * group + row % group) * layer.q_head;
                for (int64_t d = 0; d < layer.k_dim; d++) q[row * layer.k_dim + d] = to_number(one[d]) * layer.scaling;
            }
        });
    }

    int64_t position(int64_t row) const { return start + tile.first + row / group; }

    // Keys of blocks [first, last).
    void look_up(Keys<T>& found, int64_t first, int64_t last) const {
        const int64_t k_plane = layer.k_dim * size, v_plane = layer.v_dim * size;
        found.position = first * size, found.count = std::min(last * size, tile.to) - found.position, found.vectors = 0;
        for (int64_t block = first; block < last; block++) {
            const int64_t plane = table[block] * layer.kv_heads + tile.kv_head;
            found.values[block - first] = static_cast<const T*>(layer.values) + plane * v_plane;
            for (int64_t i = 0; i < vectors_of_block && (block - first) * size + i * W < found.count; i++) {
                found.keys[found.vectors] = static_cast<const T*>(layer.keys) + plane * k_plane + i * W;
                found.at[found.vectors++] = int32_t((block - first) * size + i * W);
            }
        }
    }

    void run() {
        const int64_t last_block = (tile.to + size - 1) / size;
        int64_t block = tile.from / size;
        const auto end_of = [&](int64_t from) { return std::min(last_block, (from / blocks_at_once + 1) * blocks_at_once); };
        look_up(next, block, end_of(block));
        while (block < last_block) {
            std::swap(now, next);
            block = end_of(block);
            const bool ahead = block < last_block;
            if (ahead) look_up(next, block, end_of(block));
            const int64_t groups = (rows + MAX_ROWS - 1) / MAX_ROWS;  // rows are shared out evenly: 8 as 4 and 4
            for (int64_t g = 0; g < groups; g++) run_rows(rows * g / groups, rows * (g + 1) / groups, ahead && g == 0);
        }
    }

    // Fetch what the next keys need while the memory would rest.
    void fetch(const T* from, int64_t count) const {
        for (int64_t i = 0; i < count; i += int64_t(64 / sizeof(T))) __builtin_prefetch(from + i);
    }

    INLINE void run_rows(int64_t first, int64_t last, bool ahead) {
        const int count = int(last - first);
        const int from = int(std::max<int64_t>(oldest_seen(layer, position(first)) - now.position, 0));
        const int to = int(std::min(position(last - 1) + 1 - now.position, now.count));
        if (from >= to) return;
        with_rows(count, [&](auto rows_) {
            constexpr int ROWS = rows_;
            int64_t begin = 0, end = now.vectors;
            while (begin < end && now.at[begin] + W <= from) begin++;
            while (end > begin && now.at[end - 1] >= to) end--;
            in_panels(end - begin, [&](int64_t c, auto width) {
                c += begin;
                if (ahead)
                    for (int64_t i = c; i < std::min(c + width, next.vectors); i++)
                        if (next.at[i] % size == 0) fetch(next.keys[i], layer.k_dim * size);
                score<T, ROWS, width>(q + first * layer.k_dim, layer.k_dim, now.keys + c, now.at + c, size, layer.k_dim, scores, stride);
            });
            alignas(64) float shrink[std::max(MAX_ROWS, W)];
            soften(first, count, from, to, shrink);
            const Values<T> values{now.values, size, layer.v_dim, from, to};
            if (ahead)
                for (int64_t i = 0; i < (next.count + size - 1) / size; i++) fetch(next.values[i], layer.v_dim * size);
            in_panels(v_floats / W, [&](int64_t c, auto width) {
                gather<T, ROWS, width>(scores, stride, shrink, values, c * W, out + first * v_floats + c * W, v_floats);
            });
        });
    }

    // Scores of `count` rows into weights; what was summed up before is to be multiplied by shrink.
    INLINE void soften(int64_t first, int count, int from, int to, float* shrink) {
        for (int i = 0; i < count; i++) {
            const int64_t row = first + i, head = tile.kv_head * group + row % group, at = position(row) - now.position;
            ScoreRow one{scores + i * stride, int(std::max<int64_t>(oldest_seen(layer, position(row)) - now.position, 0)), int(std::max<int64_t>(std::min(at + 1, now.count), 0)), float(at), layer.slopes ? layer.slopes[head] : 0, layer.softcap};
            float top = most[row];
            if (one.from < one.to) top = std::max(top, one.largest_score());
            const float base = top == MINUS_INFINITY ? 0 : top;
            shrink[i] = most[row] - base;
            most[row] = top;
            const VF sums_ = one.exponents(base, from, to);
            store(total + row * W, fma(load(total + row * W), exp_of(set1(shrink[i])), sums_));
        }
        for (int i = 0; i < count; i += W) store(shrink + i, exp_of(load(shrink + i)));
    }
};

// The sink joins a row's sum: returns the factor that makes sums relative to `most` into means.
inline float mean_factor(const AttentionLayer& layer, int64_t head, float most, float total) {
    if (!layer.sinks) return 1 / total;
    const float top = std::max(most, layer.sinks[head]), shrink = exp_of_one(most - top);
    return shrink / (total * shrink + exp_of_one(layer.sinks[head] - top));
}

void write_row(const AttentionCall& call, const Tile& tile, int64_t row, const float* sums_, float factor) {
    const AttentionLayer& layer = *call.layer;
    const int64_t group = layer.heads / layer.kv_heads, head = tile.kv_head * group + row % group;
    const int64_t token = call.step->query_starts[tile.request] + tile.first + row / group;
    with_type(layer.q_type, [&](auto* to) {
        auto* at = static_cast<decltype(to)>(call.out) + (token * layer.heads + head) * layer.v_dim;
        for (int64_t d = 0; d < layer.v_dim; d++) put(at + d, sums_[d] * factor);
    });
}

template <class T> void attend_typed(const AttentionCall& call, const Tile& tile, const AttentionPart* part) {
    TileWork<T> work(call, tile, part);
    work.run();
    for (int64_t row = 0; row < work.rows; row++) {
        const float total = sum(load(work.total + row * W));
        if (part) part->total[row] = total;
        else write_row(call, tile, row, work.out + row * work.v_floats, mean_factor(*call.layer, tile.kv_head * work.group + row % work.group, work.most[row], total));
    }
}

void attend_tile(const AttentionCall& call, const Tile& tile, const AttentionPart* part) {
    with_type(call.layer->cache_type, [&](auto* type) { attend_typed<std::remove_reference_t<decltype(*type)>>(call, tile, part); });
}

// The first part becomes the sum of all of them (flash-decoding, Dao et al. 2023).
void merge_parts(const AttentionCall& call, const Tile& tile, const AttentionPart* parts, int64_t count) {
    const AttentionLayer& layer = *call.layer;
    const int64_t group = layer.heads / layer.kv_heads, rows = (tile.last - tile.first) * group, v_floats = whole_vectors(layer.v_dim, W);
    for (int64_t row = 0; row < rows; row++) {
        float most = MINUS_INFINITY, total = 0;
        for (int64_t i = 0; i < count; i++) most = std::max(most, parts[i].most[row]);
        float* out = parts[0].out + row * v_floats;
        for (int64_t i = 0; i < count; i++) {
            const float factor = exp_of_one(parts[i].most[row] - most);
            total += factor * parts[i].total[row];
            for (int64_t d = 0; d < v_floats; d += W) {
                const VF scaled = mul(set1(factor), load(parts[i].out + row * v_floats + d));
                store(out + d, i ? add(load(out + d), scaled) : scaled);
            }
        }
        write_row(call, tile, row, out, mean_factor(layer, tile.kv_head * group + row % group, most, total));
    }
}

}}  // namespace core_kernels
