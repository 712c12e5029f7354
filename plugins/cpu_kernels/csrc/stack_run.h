// One run of decoder layers over few rows, as stages (stages.h) over buffers that all layers share.
//
//   small parts (norms, rotation, gates, x brought into the order of a product) go through rows; few rows are one chunk,
//   done by the thread that ends the stage before. Linears go through their outputs, attention through its tiles. Every
//   number is computed by the code, and with the rows, that a call of each operation by itself would use.
#pragma once

#include "stack_layers.h"
#include "stages.h"

namespace core_kernels { namespace {

enum Operation : int32_t { BEFORE_QKV, QKV, HEADS, ATTEND, BEFORE_OUTPUT, OUTPUT, BEFORE_MLP, GATE_UP, BEFORE_DOWN, DOWN, OPERATIONS };
constexpr StackPart PART_OF[OPERATIONS] = {SMALL, LINEARS, SMALL, ATTENTION, SMALL, LINEARS, SMALL, LINEARS, SMALL, LINEARS};

constexpr int64_t SMALL_NUMBERS = 1 << 13;  // of a row-wise part, that one thread has to itself
constexpr int64_t LEAST_ROWS = 2;           // one row by itself is prepared otherwise

class StackRun : public StackLayers {
  public:
    StackRun(const InstructionSet& set, const AttentionSet& attention, const StackLayer* layers, const StackCall& call, int threads)
        : StackLayers(set, attention, layers, call, threads) {
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
        const int64_t hidden = padded(call.tokens * call.hidden), wide_floats = padded(call.tokens * widest);
        float* memory = scratch.get(padded(floats) + 2 * hidden + wide_floats + padded(call.tokens * inner_floats));
        if (!memory) return false;
        normed = memory + padded(floats), made = normed + hidden, wide = made + hidden, inner = wide + wide_floats;
        for (LayerProducts& one : products) {
            place(one.qkv, memory, wide), place(one.gate_up, memory, wide);
            place(one.output, memory, made), place(one.down, memory, made);
        }
        place(head, memory, call.logits);
        return attend_in(wide, inner);
    }

    // Those of the layers, then the last addition, with the norm where a head follows, and the head.
    int64_t count() const { return layer_stages() + 1 + head.count; }

    void start() { if (call.seconds) before_stage = now(); }
    bool out_of_memory() const { return false; }  // not after `prepare`

    // ------------------------------------------------------------------------------------------ what Stages asks for

    int64_t chunks(int64_t stage) const {
        if (threads == 1) return 1;
        const int64_t hidden = call.hidden;
        if (stage == layer_stages()) return row_chunks(head.count ? 2 * hidden : hidden);
        if (const Products* found = products_of(stage)) return found->chunks;
        const LayerProducts& one = products[size_t(stage / OPERATIONS)];
        const AttentionJob& job = *attended[size_t(stage / OPERATIONS)].job;
        switch (stage % OPERATIONS) {
            case HEADS: return row_chunks(one.qkv.outputs());
            case ATTEND: return job.work <= SMALL_PRODUCTS ? 1 : job.size();
            case BEFORE_OUTPUT: return row_chunks(one.attended());
            case BEFORE_DOWN: return row_chunks(4 * one.inner());
            default: return row_chunks(2 * hidden);
        }
    }

    void run(int64_t stage, int64_t chunk, int turn) {
        const int64_t of = chunks(stage), first = row(chunk, of), last = row(chunk + 1, of), i = stage / OPERATIONS;
        if (const Products* found = products_of(stage)) return found->multiply(chunk, codes_after(stage, chunk, turn));
        if (stage == layer_stages()) return head.count ? before(head, call.head_norm, call.head_eps, true, first, last) : add(call.x, made, first, last);
        switch (stage % OPERATIONS) {
            case BEFORE_QKV: return before(products[size_t(i)].qkv, layer(i).attention_norm, layer(i).attention_eps, stage > 0, first, last);
            case HEADS: return heads(i, first, last);
            case ATTEND: return attend(i, chunk, of);
            case BEFORE_OUTPUT: return products[size_t(i)].output.prepare(inner, first, last);
            case BEFORE_MLP: return before(products[size_t(i)].gate_up, layer(i).mlp_norm, layer(i).mlp_eps, true, first, last);
            default:
                gate(i, wide, inner, call.tokens, products[size_t(i)].inner(), first, last);
                products[size_t(i)].down.prepare(inner, first, last);
        }
    }

    void finished(int64_t stage) {
        if (!call.seconds) return;
        const double at = now();
        const bool of_layer = stage < layer_stages();
        call.seconds[of_layer ? PART_OF[stage % OPERATIONS] : stage == layer_stages() ? SMALL : LINEARS] += at - before_stage;
        before_stage = at;
    }

  private:
    std::vector<LayerProducts> products;
    Products head;  // none, or one
    float *normed = nullptr, *made = nullptr, *wide = nullptr, *inner = nullptr;
    double before_stage = 0;
    int64_t unit = 1;  // rows that are not parted: those that a product takes together

    int64_t layer_stages() const { return count_layers() * OPERATIONS; }

    void place(Products& one, float* memory, float* out) const {
        one.place(memory, out, call.tokens);
        one.cut(threads);
    }

    // Null: the stage is no product.
    const Products* products_of(int64_t stage) const {
        if (stage >= layer_stages()) return stage > layer_stages() ? &head : nullptr;
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

    // First row of a chunk of a row-wise part.
    int64_t row(int64_t chunk, int64_t of) const { return std::min(call.tokens, units() * chunk / of * unit); }
    int64_t units() const { return (call.tokens + unit - 1) / unit; }

    int64_t row_chunks(int64_t numbers) const {
        const int64_t wanted = call.tokens * numbers / SMALL_NUMBERS;
        const int64_t most = unit == 1 ? call.tokens / LEAST_ROWS : units() - (call.tokens % unit == 1);
        return std::max<int64_t>(1, std::min({wanted, most, int64_t(threads) * 4}));
    }

    // Adds what the operation before made to x, normalizes that, and brings it into the order that the products want.
    void before(const Products& next, const float* weight, float eps, bool adds, int64_t first, int64_t last) const {
        norm(call.x, adds ? made : nullptr, normed, weight, eps, first, last);
        next.prepare(normed, first, last);
    }
};

}}  // namespace core_kernels
