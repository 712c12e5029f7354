// The attention of one step over layers of one shape, cut into tiles that threads take in any order.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "attention.h"
#include "scratch.h"

namespace core_kernels { namespace {

inline int64_t tokens_of(const AttentionStep& step) { return step.query_starts[step.requests]; }

// The blocks that this step writes and reads exist.
inline bool blocks_exist(const AttentionCall& call) {
    const AttentionLayer& layer = *call.layer;
    const AttentionStep& step = *call.step;
    const auto exists = [&](int64_t block) { return block >= 0 && block < layer.num_blocks; };
    for (int64_t token = 0; token < tokens_of(step); token++)
        if (step.slots[token] < 0 || !exists(step.slots[token] / layer.block_size)) return false;
    for (int64_t request = 0; request < step.requests; request++) {
        const int64_t blocks = (step.context_lens[request] + layer.block_size - 1) / layer.block_size;
        if (blocks > step.table_width) return false;
        for (int64_t i = 0; i < blocks; i++)
            if (!exists(step.tables[request * step.table_width + i])) return false;
    }
    return true;
}

class AttentionJob {
  public:
    const AttentionSet* set = nullptr;
    AttentionCall call{};  // for one of the layers
    int64_t work = 0;      // multiply-adds

    // Cut `call` into tiles. False: there is no memory for what is summed up in parts.
    bool make(Scratch& scratch) {
        first_part.push_back(0);
        make_tiles();
        if (!make_parts(scratch)) return false;
        const size_t splits = first_part.size() - 1;
        left.reset(new std::atomic<int64_t>[splits]);
        for (size_t i = 0; i < splits; i++) left[i] = first_part[i + 1] - first_part[i];
        return true;
    }

    int64_t size() const { return int64_t(tiles.size()); }

    // Tile i of a layer of this shape. Once all tiles are done the job may be used for another layer.
    void attend(const AttentionCall& layer, int64_t i) {
        const Tile& tile = tiles[size_t(i)];
        set->attend(layer, tile, tile.part < 0 ? nullptr : &parts[size_t(tile.part)]);
        if (tile.part < 0) return;
        const size_t split = size_t(split_of[size_t(tile.part)]);
        const int64_t first = first_part[split], count = first_part[split + 1] - first;
        if (left[split].fetch_sub(1) != 1) return;
        set->merge(layer, tile, &parts[size_t(first)], count);
        left[split] = count;
    }

  private:
    static constexpr int64_t TILE_ROWS = 48;  // of a prefill tile: queries that use keys while they are in the core's cache

    std::vector<Tile> tiles;
    std::vector<AttentionPart> parts;
    std::vector<int64_t> split_of;                 // by part: of which split tile it is
    std::vector<int64_t> first_part;               // by split tile, and one more
    std::unique_ptr<std::atomic<int64_t>[]> left;  // by split tile: parts that are not done; the last one merges

    int64_t rows_of(const Tile& tile) const { return (tile.last - tile.first) * (call.layer->heads / call.layer->kv_heads); }

    // Cut the keys of a request that is one tile. Where, follows from the request alone: what it gets does not depend on who
    // runs beside it. Long pieces read faster, since nothing is fetched ahead of a piece's first keys.
    void add_split(Tile tile) {
        const int64_t from = tile.from, to = tile.to, size = call.layer->block_size;
        const int64_t whole = std::max<int64_t>(1, TILE_KEYS / size) * size;
        int64_t length = SPLIT_KEYS;
        while (length < MOST_KEYS && 4 * length < to - from) length *= 2;
        length = (length + whole - 1) / whole * whole;
        if (from / length == (to - 1) / length) return tiles.push_back(tile);
        for (int64_t at = from / length * length; at < to; at += length) {
            tile.from = std::max(at, from), tile.to = std::min(at + length, to), tile.part = int64_t(split_of.size());
            tiles.push_back(tile);
            split_of.push_back(int64_t(first_part.size()) - 1);
        }
        first_part.push_back(int64_t(split_of.size()));
    }

    void make_tiles() {
        const AttentionLayer& layer = *call.layer;
        const AttentionStep& step = *call.step;
        const int64_t group = layer.heads / layer.kv_heads, tokens = std::max<int64_t>(1, TILE_ROWS / group);
        for (int64_t request = 0; request < step.requests; request++) {
            const int64_t count = step.query_starts[request + 1] - step.query_starts[request];
            const int64_t start = step.context_lens[request] - count;
            for (int64_t last = count; last > 0; last -= tokens) {  // the longest first
                const int64_t first = std::max<int64_t>(0, last - tokens);
                const int64_t from = oldest_seen(layer, start + first), to = start + last;
                work += (to - from) * (last - first) * layer.heads * (layer.k_dim + layer.v_dim);
                for (int64_t head = 0; head < layer.kv_heads; head++) {
                    const Tile tile = {request, head, first, last, from, to, -1};
                    if (count <= tokens) add_split(tile);
                    else tiles.push_back(tile);
                }
            }
        }
    }

    bool make_parts(Scratch& scratch) {
        const int64_t v_floats = whole_vectors(call.layer->v_dim, set->lanes);
        int64_t rows = 0;
        for (const Tile& tile : tiles)
            if (tile.part >= 0) rows += rows_of(tile);
        float* memory = rows ? scratch.get(rows * (v_floats + 2)) : nullptr;
        if (rows && !memory) return false;
        for (const Tile& tile : tiles) {
            if (tile.part < 0) continue;
            const int64_t count = rows_of(tile);
            parts.push_back({memory, memory + count * v_floats, memory + count * (v_floats + 1)});
            memory += count * (v_floats + 2);
        }
        return true;
    }
};

}}  // namespace core_kernels
