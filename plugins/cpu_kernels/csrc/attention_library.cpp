// The C ABI of attention: cut a step's attention into tiles and share them out among threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "attention.h"
#include "scratch.h"
#include "instruction_set.h"
#include "threads.h"
#include "weight.h"

namespace core_kernels {

extern const AttentionSet plain_attention;
#ifdef CORE_KERNELS_X86
extern const AttentionSet avx2_attention, avx512_attention;
#endif

namespace {

constexpr int64_t TILE_ROWS = 48;              // of a prefill tile: queries that use keys while they are in the core's cache
constexpr int64_t SERIAL_WORK = 1 << 16;       // multiply-adds below which a second thread costs more than it brings
constexpr int64_t SERIAL_TOKENS = 32;          // that one thread stores
enum Failure : int32_t { NO_MEMORY = 1, NO_SUCH_BLOCK = 2 };

struct Job {
    const AttentionSet* set;
    AttentionCall call;
    std::vector<Tile> tiles;
    std::vector<AttentionPart> parts;
    std::vector<int64_t> split_of;                 // by part: of which split tile it is
    std::vector<int64_t> first_part;               // by split tile, and one more
    std::unique_ptr<std::atomic<int64_t>[]> left;  // by split tile: parts that are not done; the last one merges
    int64_t work = 0;                              // multiply-adds
    std::atomic<int64_t> next{0};
    int64_t tokens_at_once = 0;  // while storing
};

// The blocks that this step writes and reads exist.
bool blocks_exist(const AttentionCall& call) {
    const AttentionLayer& layer = *call.layer;
    const AttentionStep& step = *call.step;
    const auto exists = [&](int64_t block) { return block >= 0 && block < layer.num_blocks; };
    for (int64_t token = 0; token < step.query_starts[step.requests]; token++)
        if (step.slots[token] < 0 || !exists(step.slots[token] / layer.block_size)) return false;
    for (int64_t request = 0; request < step.requests; request++) {
        const int64_t blocks = (step.context_lens[request] + layer.block_size - 1) / layer.block_size;
        if (blocks > step.table_width) return false;
        for (int64_t i = 0; i < blocks; i++)
            if (!exists(step.tables[request * step.table_width + i])) return false;
    }
    return true;
}

// Cut the keys of a request that is one tile. Where, follows from the request alone: what it gets does not depend on who
// runs beside it. Long pieces read faster, since nothing is fetched ahead of a piece's first keys.
void add_split(Job& job, Tile tile) {
    const int64_t from = tile.from, to = tile.to, size = job.call.layer->block_size;
    const int64_t whole = std::max<int64_t>(1, TILE_KEYS / size) * size;
    int64_t length = SPLIT_KEYS;
    while (length < MOST_KEYS && 4 * length < to - from) length *= 2;
    length = (length + whole - 1) / whole * whole;
    if (from / length == (to - 1) / length) return job.tiles.push_back(tile);
    for (int64_t at = from / length * length; at < to; at += length) {
        tile.from = std::max(at, from), tile.to = std::min(at + length, to), tile.part = int64_t(job.split_of.size());
        job.tiles.push_back(tile);
        job.split_of.push_back(int64_t(job.first_part.size()) - 1);
    }
    job.first_part.push_back(int64_t(job.split_of.size()));
}

void make_tiles(Job& job) {
    const AttentionLayer& layer = *job.call.layer;
    const AttentionStep& step = *job.call.step;
    const int64_t group = layer.heads / layer.kv_heads, tokens = std::max<int64_t>(1, TILE_ROWS / group);
    for (int64_t request = 0; request < step.requests; request++) {
        const int64_t count = step.query_starts[request + 1] - step.query_starts[request];
        const int64_t start = step.context_lens[request] - count;
        for (int64_t last = count; last > 0; last -= tokens) {  // the longest first
            const int64_t first = std::max<int64_t>(0, last - tokens);
            const int64_t from = oldest_seen(layer, start + first), to = start + last;
            job.work += (to - from) * (last - first) * layer.heads * (layer.k_dim + layer.v_dim);
            for (int64_t head = 0; head < layer.kv_heads; head++) {
                const Tile tile = {request, head, first, last, from, to, -1};
                if (count <= tokens) add_split(job, tile);
                else job.tiles.push_back(tile);
            }
        }
    }
}

bool make_parts(Job& job) {
    static thread_local Scratch scratch;
    const AttentionLayer& layer = *job.call.layer;
    const int64_t v_floats = whole_vectors(layer.v_dim, job.set->lanes);
    int64_t rows = 0;
    for (const Tile& tile : job.tiles)
        if (tile.part >= 0) rows += (tile.last - tile.first) * (layer.heads / layer.kv_heads);
    float* memory = rows ? scratch.get(rows * (v_floats + 2)) : nullptr;
    if (rows && !memory) return false;
    for (const Tile& tile : job.tiles) {
        if (tile.part < 0) continue;
        const int64_t count = (tile.last - tile.first) * (layer.heads / layer.kv_heads);
        job.parts.push_back({memory, memory + count * v_floats, memory + count * (v_floats + 1)});
        memory += count * (v_floats + 2);
    }
    return true;
}

void store_some(void* given) {
    Job& job = *static_cast<Job*>(given);
    const int64_t tokens = job.call.step->query_starts[job.call.step->requests];
    for (int64_t first; (first = job.next.fetch_add(job.tokens_at_once)) < tokens;)
        job.set->store(job.call, first, std::min(first + job.tokens_at_once, tokens));
}

void attend_some(void* given) {
    Job& job = *static_cast<Job*>(given);
    for (int64_t i; (i = job.next.fetch_add(1)) < int64_t(job.tiles.size());) {
        const Tile& tile = job.tiles[size_t(i)];
        job.set->attend(job.call, tile, tile.part < 0 ? nullptr : &job.parts[size_t(tile.part)]);
        if (tile.part < 0) continue;
        const int64_t split = job.split_of[size_t(tile.part)], first = job.first_part[size_t(split)];
        if (job.left[size_t(split)].fetch_sub(1) == 1)
            job.set->merge(job.call, tile, &job.parts[size_t(first)], job.first_part[size_t(split) + 1] - first);
    }
}

void share_out(Job& job, int threads, void (*work)(void*)) {
    job.next = 0;
    on_threads(threads, work, &job);
}

int32_t run(Job& job) {
    job.first_part.push_back(0);
    make_tiles(job);
    if (!make_parts(job)) return NO_MEMORY;
    const int64_t splits = int64_t(job.first_part.size()) - 1, tokens = job.call.step->query_starts[job.call.step->requests];
    job.left.reset(new std::atomic<int64_t>[size_t(splits)]);
    for (int64_t i = 0; i < splits; i++) job.left[size_t(i)] = job.first_part[size_t(i) + 1] - job.first_part[size_t(i)];
    const int threads = job.work <= SERIAL_WORK || job.tiles.size() < 2 ? 1 : thread_count();
    job.tokens_at_once = SERIAL_TOKENS;
    share_out(job, tokens <= SERIAL_TOKENS ? 1 : threads, store_some);
    share_out(job, threads, attend_some);
    return 0;
}

}  // namespace
}  // namespace core_kernels

using namespace core_kernels;

extern "C" {

#define EXPORT __attribute__((visibility("default")))

// Attention compiled for an instruction set of core_kernels_instruction_set.
EXPORT const void* core_kernels_attention_set(const void* set) {
    const char* name = static_cast<const InstructionSet*>(set)->name;
#ifdef CORE_KERNELS_X86
    if (!std::strcmp(name, "avx512") || !std::strcmp(name, "amx")) return &avx512_attention;
    if (!std::strcmp(name, "avx2")) return &avx2_attention;
#endif
    return &plain_attention;
}

// Store k and v of the step's tokens in the layer's cache, then attend over each request's whole context.
// 0, or a Failure.
EXPORT int32_t core_kernels_attend(const void* set, const AttentionLayer* layer, AttentionStep* step, const void* q, const void* k, const void* v, void* out) try {
    Job job;
    job.set = static_cast<const AttentionSet*>(set), job.call = {layer, step, q, k, v, out};
    if (!step->checked && !blocks_exist(job.call)) return NO_SUCH_BLOCK;
    step->checked = 1;
    return run(job);
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
}
}
