// One run of decoder layers over many rows, cut into blocks of rows (stages.h): between two attentions a thread takes a block
// through all operations by itself, so that what one of them made is in its core's cache for the next. Weights are read anew
// for every block, which costs little beside that many rows.
//
// Stage 2 i of layer i is by blocks: what follows the attention of the layer before, then all up to the K/V that attention i
// needs. Stage 2 i + 1 is attention i. After the last attention only the rows that are wanted go on. Numbers are those of
// stack_run.h: each is computed by the code that all rows would use, but for those wanted rows, which may be few.
#pragma once

#include "stack_layers.h"
#include "stages.h"

namespace core_kernels { namespace {

constexpr int64_t BLOCK_ROWS = 48;   // at least, to be worth reading the weights
constexpr int64_t BLOCK_MOST = 96;   // at the most, for what a block makes to stay in its core's cache
constexpr int64_t BLOCK_UNIT = 16;   // rows of a block come in such numbers, but for the last

class StackBlocks : public StackLayers {
  public:
    StackBlocks(const InstructionSet& set, const AttentionSet& attention, const StackLayer* layers, const StackCall& call, int threads)
        : StackLayers(set, attention, layers, call, threads) {
        const int64_t units = (call.tokens + BLOCK_UNIT - 1) / BLOCK_UNIT, most = BLOCK_MOST / BLOCK_UNIT * threads;
        blocks = std::min(units, (units + most - 1) / most * threads);
    }

    // Whether there are rows enough, and products that can take some of them.
    static bool fits(const StackLayer* layers, const StackCall& call, int threads) {
        if (call.tokens < BLOCK_ROWS * threads) return false;
        for (int64_t i = call.first; i < call.last; i++)
            if (LayerProducts(layers[i], call.tokens, call.tokens).are_tiled()) return false;
        return true;
    }

    // False: there is no memory.
    bool prepare(Scratch& scratch) {
        int64_t qkv = 0, out = 0;
        const int64_t rows = block_rows();
        Products head;
        head.add(call.head, rows, call.tokens);
        Sizes largest{head.floats(), 0, 0};
        for (int64_t i = 0; i < count_layers(); i++) {
            const LayerProducts one(layer(i), rows, call.tokens);
            qkv = std::max(qkv, one.qkv.outputs()), out = std::max(out, one.attended());
            largest = {std::max(largest.products, one.floats()), std::max(largest.wide, one.gate_up.outputs()), std::max(largest.inner, one.inner())};
        }
        sizes = {padded(largest.products), padded(rows * largest.wide), padded(rows * largest.inner), padded(rows * out)};
        wide = scratch.get(padded(call.tokens * qkv) + padded(call.tokens * out));
        if (!wide) return false;
        inner = wide + padded(call.tokens * qkv);
        return attend_in(wide, inner);
    }

    int64_t count() const { return 2 * count_layers() + 1; }
    bool out_of_memory() const { return failed.load(); }

    int64_t chunks(int64_t stage) const {
        if (stage % 2) return attended[size_t(stage / 2)].job->size();
        return picks(stage) ? std::max<int64_t>(1, (call.row_count + block_rows() - 1) / block_rows()) : blocks;
    }

    void run(int64_t stage, int64_t chunk, int, int) {
        Watch watch(*this);
        if (stage % 2) return attend(stage / 2, chunk, chunks(stage)), watch.count(ATTENTION);
        const int64_t of = chunks(stage), rows = picks(stage) ? call.row_count : call.tokens, units = (rows + BLOCK_UNIT - 1) / BLOCK_UNIT;
        const int64_t first = units * chunk / of * BLOCK_UNIT, last = std::min(rows, units * (chunk + 1) / of * BLOCK_UNIT);
        if (first == last) return;
        Block block(*this, watch, first, last, picks(stage) ? call.rows + first : nullptr);
        if (failed) return;
        if (stage > 0) block.after_attention(stage / 2 - 1);
        if (stage / 2 < count_layers()) block.before_attention(stage / 2);
        else block.finish();
    }

  private:
    int64_t blocks = 1;
    float *wide = nullptr, *inner = nullptr;  // Q, K and V of a layer, and what its attention gives, of all tokens
    std::atomic<bool> failed{false};
    struct Sizes { int64_t products, wide, inner, attended; } sizes{};  // floats of a block's buffers

    int64_t block_rows() const { return ((call.tokens + BLOCK_UNIT - 1) / BLOCK_UNIT + blocks - 1) / blocks * BLOCK_UNIT; }  // at the most
    bool picks(int64_t stage) const { return call.rows && stage == count() - 1; }

    // Some rows on their way from one attention to the next, in memory of the thread that takes them.
    class Block {
      public:
        // `picked`: which of all rows they are; null: those from `first` on.
        Block(StackBlocks& run, Watch& watch, int64_t first, int64_t last, const int64_t* picked)
            : run(run), watch(watch), first(first), rows(last - first), hidden(run.call.hidden), picked(picked), x(run.call.x + first * hidden) {
            static thread_local Scratch scratch;
            const Sizes& sizes = run.sizes;
            const int64_t size = padded(rows * hidden);
            float* found = scratch.get(3 * size + sizes.wide + sizes.inner + sizes.products + sizes.attended);
            run.failed = run.failed || !found;
            if (!found) return;
            made = found, normed = made + size, wide = normed + 2 * size, inner = wide + sizes.wide, memory = inner + sizes.inner;
            picked_attended = memory + sizes.products;
            if (picked) x = normed + size, copy_rows(run.call.x, x, hidden);
        }

        void before_attention(int64_t i) {
            const StackLayer& layer = run.layer(i);
            LayerProducts products(layer, rows, run.call.tokens);
            products.qkv.place(memory, nullptr, run.call.tokens);
            float* out = run.wide;
            for (int64_t p = 0; p < products.qkv.count; p++) {
                products.qkv.parts[p].out = out + first * products.qkv.parts[p].outputs();
                out += run.call.tokens * products.qkv.parts[p].outputs();
            }
            multiply_normed(products.qkv, added, layer.attention_norm, layer.attention_eps, products.output);
            run.heads(i, first, first + rows);
            watch.count(SMALL);
        }

        void after_attention(int64_t i) {
            const StackLayer& layer = run.layer(i);
            LayerProducts products(layer, rows, run.call.tokens);
            products.output.place(memory, made, rows), products.gate_up.place(memory, wide, rows), products.down.place(memory, made, rows);
            const float* from = run.inner + first * products.attended();
            if (picked) from = picked_attended, copy_rows(run.inner, picked_attended, products.attended());
            multiply(products.output, from, products.gate_up);
            multiply_normed(products.gate_up, made, layer.mlp_norm, layer.mlp_eps, products.down);
            run.gate(i, wide, inner, rows, products.inner(), 0, products.inner());
            multiply(products.down, inner, products.qkv);
            added = made;
        }

        // The last addition, and logits where there is a head.
        void finish() {
            Products head;
            head.add(run.call.head, rows, run.call.tokens);
            if (head.count) {
                head.place(memory, run.call.logits + first * head.outputs(), rows);
                multiply_normed(head, added, run.call.head_norm, run.call.head_eps, {});
            } else if (added) {
                run.add(x, added, x, 0, rows);
            }
            for (int64_t r = 0; picked && r < rows; r++) std::copy(x + r * hidden, x + (r + 1) * hidden, run.call.x + picked[r] * hidden);
            watch.count(SMALL);
        }

      private:
        StackBlocks& run;
        Watch& watch;
        const int64_t first, rows, hidden;
        const int64_t* const picked;
        float* x;
        const float* added = nullptr;  // what x still lacks
        float *memory = nullptr, *normed = nullptr, *made = nullptr, *wide = nullptr, *inner = nullptr, *picked_attended = nullptr;

        void copy_rows(const float* from, float* to, int64_t width) const {
            for (int64_t r = 0; r < rows; r++) std::copy(from + picked[r] * width, from + (picked[r] + 1) * width, to + r * width);
        }

        static Stretch first_codes(const Products& products, int64_t part = 0) {
            if (part >= products.count) return {};
            return codes_of(products.parts[part].ready->plan.weight, 0, products.parts[part].outputs());
        }

        void multiply_normed(const Products& products, const float* adds, const float* weight, float eps, const Products& next) {
            run.norm(x, adds, x, normed, weight, eps, 0, rows);
            multiply(products, normed, next);
        }

        void multiply(const Products& products, const float* from, const Products& next) {
            products.prepare(from, 0, rows, 0);
            watch.count(SMALL);
            for (int64_t p = 0; p < products.count; p++) {
                const Stretch after = p + 1 < products.count ? first_codes(products, p + 1) : first_codes(next);
                products.parts[p].multiply(0, products.parts[p].outputs(), after);
            }
            watch.count(LINEARS);
        }
    };
};

}}  // namespace core_kernels
