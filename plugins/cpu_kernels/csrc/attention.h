// What the C ABI of attention and the code of each instruction set share. Knows no instruction set.
//
// The cache of a layer is [blocks, kv_heads], and of each block for one head the keys, then the values:
//   keys    [k_dim, block_size]   a vector of it holds one dimension of several keys
//   values  [block_size, v_dim]   a vector of it holds several dimensions of one key
// so that both products read it as it lies. Layers may share memory: of each block one has its part, then the next. Behind the
// last are CACHE_TAIL elements, since vectors are read whole. Slots that hold nothing may hold anything, NaN too.
#pragma once

#include <cstdint>
#include <vector>

namespace core_kernels {

constexpr int64_t CACHE_TAIL = 16;   // elements behind the last block
constexpr int64_t TILE_KEYS = 64;    // keys that are worked on at a time, in whole blocks
constexpr int64_t SPLIT_KEYS = 256;  // a context that few queries look at is cut into pieces of so many keys at least ...
constexpr int64_t MOST_KEYS = 1024;  // ... and so many at most

// One layer: its cache, what it asks for, and how its tensors lie. Mirrored field by field by attention_calls.py.
struct AttentionLayer {
    void* cache;
    const float* sinks;   // [heads], or null
    const float* slopes;  // [heads], or null
    int64_t num_blocks, block_size;
    int64_t block_stride;  // elements from a block to the next
    int64_t heads, kv_heads, k_dim, v_dim;
    int64_t window, chunk;  // 0: none
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;  // elements from one to the next
    float scaling, softcap;                                     // softcap 0: none
    int32_t q_type, k_type, v_type, cache_type;                 // FloatType; the output has q's
};

// The requests of one step, for layers of one reach. Mirrored field by field by attention_calls.py.
struct AttentionStep {
    const int64_t* slots;         // [tokens]: block * block_size + offset
    const int64_t* tables;        // [requests, table_width]: blocks
    const int64_t* query_starts;  // [requests + 1]
    const int64_t* context_lens;  // [requests], this step's tokens included
    int64_t table_width, requests;
    int64_t checked;  // 0: nobody has compared the blocks with num_blocks yet
};

// Where the keys and the values of a block lie for one head, in elements.
inline int64_t keys_at(const AttentionLayer& layer, int64_t head, int64_t block) {
    return block * layer.block_stride + head * layer.block_size * (layer.k_dim + layer.v_dim);
}
inline int64_t values_at(const AttentionLayer& layer, int64_t head, int64_t block) {
    return keys_at(layer, head, block) + layer.block_size * layer.k_dim;
}

struct AttentionCall {
    const AttentionLayer* layer;
    const AttentionStep* step;
    const void *q, *k, *v;  // [tokens, heads, dim]
    void* out;              // [tokens, heads, v_dim], dense
};

// Queries of one request that look at the same keys, all heads of one K/V head; a row is a token and a head of these.
struct Tile {
    int64_t request, kv_head;
    int64_t first, last;  // tokens, counted from the request's first new one
    int64_t from, to;     // positions of keys
    int64_t part;         // of AttentionParts; -1: the tile sees all of its keys here
};

// What an item of a split context found, to be put together with the other items: the softmax over its own keys.
struct AttentionPart {
    float* out;    // [rows, v_floats], not divided by the sums
    float* most;   // [rows], the largest score
    float* total;  // [rows], the sum of exp(score - most)
};

struct AttentionSet {
    int64_t lanes;
    void (*store)(const AttentionCall&, int64_t first, int64_t last);  // tokens
    void (*attend)(const AttentionCall&, const Tile&, const AttentionPart* part);
    void (*merge)(const AttentionCall&, const Tile&, const AttentionPart* parts, int64_t count);
};

// Floats of a row of out as it is summed up: vectors are written whole.
inline int64_t whole_vectors(int64_t floats, int64_t lanes) { return (floats + lanes - 1) / lanes * lanes; }

// The first position that the token at `position` sees.
inline int64_t oldest_seen(const AttentionLayer& layer, int64_t position) {
    int64_t oldest = layer.window && position >= layer.window ? position - layer.window + 1 : 0;
    if (layer.chunk && position / layer.chunk * layer.chunk > oldest) oldest = position / layer.chunk * layer.chunk;
    return oldest;
}

}  // namespace core_kernels
