// One run of decoder layers over few rows, as stages (stages.h) that threads share out by columns.
//
//   Linears go through their outputs, gates with them, attention through its tiles, rotation through tokens. What comes before
//   a product (a norm, x brought into its order) every thread does by itself for all rows, into memory of its own: that takes
//   less time than it takes to wait for another thread and to fetch from its core what it has made. Only where there are more
//   rows than OWN_ROWS they are shared out. Every number is computed by the code, and with the rows, that a call of each
//   operation by itself would use.
#pragma once

#include "stack_layers.h"
#include "stages.h"

namespace core_kernels { namespace {

enum Operation : int32_t { BEFORE_QKV, QKV, HEADS, ATTEND, BEFORE_OUTPUT, OUTPUT, BEFORE_MLP, GATE_UP, BEFORE_DOWN, DOWN, OPERATIONS };

constexpr int64_t OWN_ROWS = 48;
constexpr int64_t SMALL_NUMBERS = 1 << 13;  // of a row-wise part, that one thread has to itself
constexpr int64_t LEAST_ROWS = 2;           // one row by itself is prepared otherwise

class StackRun : public StackLayers {
  public:
    StackRun(const InstructionSet& set, const AttentionSet& attention, const StackLayer* layers, const StackCall& call, int threads)
        : StackLayers(set, attention, layers, call, threads), own(threads > 1 && call.tokens <= OWN_ROWS), workers(size_t(own ? threads : 1)) {
        for (int64_t i = 0; i < count_layers(); i++) products.emplace_back(layer(i), call.tokens, call.tokens);
        head.add(call.head, call.tokens, call.tokens);
    }

    // False: there is no memory.
    bool prepare(Scratch& scratch) {
        int64_t floats = head.floats(), widest = 0, inner_floats = 0;
        unit = head.x_rows();
        for (const LayerProducts& one : products) {
            floats = std::max(floats, one.floats()), unit = std::max(unit, one.x_rows());
            widest = std::max({widest, one.qkv.outputs(), one.gate_up.outputs()});
            inner_floats = std::max({inner_floats, one.attended(), one.inner()});
        }
        const int64_t hidden = padded(call.tokens * call.hidden), wide_floats = padded(call.tokens * widest), inner_size = padded(call.tokens * inner_floats);
        worker_floats = padded(floats) + 2 * hidden;
        float* memory = scratch.get(2 * hidden + wide_floats + 2 * inner_size + worker_floats * int64_t(workers.size()));
        if (!memory) return false;
        other_x = memory, made = other_x + hidden, wide = made + hidden, inner = wide + wide_floats, attended_out = inner + inner_size;
        float* worker_memory = attended_out + inner_size;
        for (size_t w = 0; w < workers.size(); w++) workers[w].normed = worker_memory + int64_t(w) * worker_floats + padded(floats), workers[w].summed = workers[w].normed + hidden;
        for (LayerProducts& one : products) {
            place(one.qkv, worker_memory, wide), place(one.output, worker_memory, made), place(one.down, worker_memory, made);
            one.gate_up.place(worker_memory, wide, call.tokens);
            one.gate_up.cut_pairs(threads);
        }
        place(head, worker_memory, call.logits);
        return attend_in(wide, attended_out);
    }

    // Those of the layers, then the last addition, with the norm where a head follows, and the head.
    int64_t count() const { return layer_stages() + 1 + head.count; }

    bool out_of_memory() const { return false; }  // not after `prepare`

    // ------------------------------------------------------------------------------------------ what Stages asks for

    int64_t chunks(int64_t stage) const {
        if (threads == 1) return 1;
        if (const Products* found = products_of(stage)) return found->chunks;
        if (stage < layer_stages() && stage % OPERATIONS == HEADS) return std::min<int64_t>(call.tokens, int64_t(threads) * 4);
        if (stage < layer_stages() && stage % OPERATIONS == ATTEND) {
            const AttentionJob& job = *attended[size_t(stage / OPERATIONS)].job;
            return job.work <= SMALL_PRODUCTS ? 1 : job.size();
        }
        return own && products_of(stage + 1) ? 1 : row_chunks(stage);
    }

    void run(int64_t stage, int64_t chunk, int turn, int worker) {
        Watch watch(*this);
        const int64_t of = chunks(stage), i = stage / OPERATIONS;
        if (const Products* found = products_of(stage)) {
            Worker& mine = workers[own ? size_t(worker) : 0];
            if (own) prepare_own(stage, chunk, mine), watch.count(SMALL);
            multiply(*found, stage, chunk, turn, memory_of(mine), watch);
        } else if (stage < layer_stages() && stage % OPERATIONS == HEADS) {
            heads(i, call.tokens * chunk / of, call.tokens * (chunk + 1) / of);
        } else if (stage < layer_stages() && stage % OPERATIONS == ATTEND) {
            attend(i, chunk, of);
            return watch.count(ATTENTION);
        } else if (stage == layer_stages() && !head.count) {
            add(x_before(stage + 1), made, call.x, row(chunk, of), row(chunk + 1, of));
        } else if (!own) {
            before(stage + 1, workers[0], call.x, row(chunk, of), row(chunk + 1, of));
        }
        watch.count(SMALL);
    }

  private:
    struct alignas(64) Worker {
        int64_t stage = -1;  // for whose product x is prepared
        float *normed = nullptr, *summed = nullptr;  // [tokens, hidden]
    };

    const bool own;  // every worker prepares x by itself
    std::vector<Worker> workers;
    int64_t worker_floats = 0;
    std::vector<LayerProducts> products;
    Products head;  // none, or one
    float *made = nullptr, *other_x = nullptr, *wide = nullptr, *inner = nullptr, *attended_out = nullptr;
    int64_t unit = 1;  // rows that are not parted: those that a product takes together

    int64_t memory_of(const Worker& worker) const { return (&worker - workers.data()) * worker_floats; }

    int64_t layer_stages() const { return count_layers() * OPERATIONS; }

    void place(Products& one, float* memory, float* out) const {
        one.place(memory, out, call.tokens);
        one.cut(threads);
    }

    // Null: the stage is no product.
    const Products* products_of(int64_t stage) const {
        if (stage >= layer_stages()) return stage == layer_stages() + 1 && head.count ? &head : nullptr;
        const LayerProducts& one = products[size_t(stage / OPERATIONS)];
        switch (stage % OPERATIONS) {
            case QKV: return &one.qkv;
            case OUTPUT: return &one.output;
            case GATE_UP: return &one.gate_up;
            case DOWN: return &one.down;
            default: return nullptr;
        }
    }

    // What the thread that has a run of chunks reads after one of them: the next one's codes, or those of the next product.
    Stretch codes_after(int64_t stage, int64_t chunk, int turn) const {
        const Products& found = *products_of(stage);
        if (chunk + 1 < Turns::first_of(found.chunks, threads, turn + 1)) return found.codes(chunk + 1);
        for (stage++; stage < count(); stage++)
            if (const Products* next = products_of(stage)) return next->codes(Turns::first_of(next->chunks, threads, turn));
        return {};
    }

    void multiply(const Products& found, int64_t stage, int64_t chunk, int turn, int64_t offset, Watch& watch) const {
        const Stretch after = codes_after(stage, chunk, turn);
        if (stage > layer_stages() || stage % OPERATIONS != GATE_UP) return found.multiply(chunk, after, offset), watch.count(LINEARS);
        found.multiply_pair(chunk, after, offset);
        watch.count(LINEARS);
        gate(stage / OPERATIONS, wide, inner, call.tokens, found.inner(), chunk * found.chunk, std::min((chunk + 1) * found.chunk, found.inner()));
    }

    // ------------------------------------------------------------------------------------------ x
    //
    // Where every worker adds up x for itself, the one that has the first chunk writes the sum to where the next addition finds
    // it, and nobody reads at the time: x and `other_x` take turns.

    // Whether what the operation before the product made is added to x first.
    bool adds(int64_t stage) const { return stage > layer_stages() || (stage > QKV && (stage % OPERATIONS == QKV || stage % OPERATIONS == GATE_UP)); }
    bool is_mlp(int64_t stage) const { return stage < layer_stages() && stage % OPERATIONS == GATE_UP; }
    const float* x_before(int64_t stage) const { return !own || is_mlp(stage) || stage <= QKV ? call.x : other_x; }
    float* x_after(int64_t stage) const { return is_mlp(stage) ? other_x : call.x; }

    void prepare_own(int64_t stage, int64_t chunk, Worker& worker) const {
        float* to = chunk == 0 ? x_after(stage) : worker.summed;
        if (worker.stage != stage) before(stage, worker, to, 0, call.tokens);
        else if (chunk == 0 && adds(stage)) std::copy(worker.summed, worker.summed + call.tokens * call.hidden, to);
        worker.stage = stage;
    }

    // Brings rows of x into the order of the product of a stage, normalized where it takes a norm of x, and x with what is
    // added to it first to `summed`.
    void before(int64_t stage, const Worker& worker, float* summed, int64_t first, int64_t last) const {
        const float *from = worker.normed, *x = x_before(stage), *added = adds(stage) ? made : nullptr;
        const StackLayer& one = layer(std::min(stage / OPERATIONS, count_layers() - 1));
        if (stage > layer_stages()) norm(x, added, summed, worker.normed, call.head_norm, call.head_eps, first, last);
        else if (stage % OPERATIONS == QKV) norm(x, added, summed, worker.normed, one.attention_norm, one.attention_eps, first, last);
        else if (stage % OPERATIONS == GATE_UP) norm(x, added, summed, worker.normed, one.mlp_norm, one.mlp_eps, first, last);
        else from = stage % OPERATIONS == OUTPUT ? attended_out : inner;
        products_of(stage)->prepare(from, first, last, memory_of(worker));
    }

    // ------------------------------------------------------------------------------------------ rows

    // First row of a chunk of a row-wise part.
    int64_t row(int64_t chunk, int64_t of) const { return std::min(call.tokens, units() * chunk / of * unit); }
    int64_t units() const { return (call.tokens + unit - 1) / unit; }

    int64_t row_chunks(int64_t stage) const {
        const Products* next = products_of(stage + 1);
        const int64_t numbers = 2 * (next ? next->parts[0].inputs() : call.hidden);
        const int64_t wanted = call.tokens * numbers / SMALL_NUMBERS;
        const int64_t most = unit == 1 ? call.tokens / LEAST_ROWS : units() - (call.tokens % unit == 1);
        return std::max<int64_t>(1, std::min({wanted, most, int64_t(threads) * 4}));
    }
};

}}  // namespace core_kernels
