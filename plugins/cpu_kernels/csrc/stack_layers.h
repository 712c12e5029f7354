// What both ways to run decoder layers share: where a layer's numbers lie, its attention, and the small parts by rows.
#pragma once

#include <time.h>

#include <memory>
#include <tuple>
#include <vector>

#include "attention_job.h"
#include "instruction_set.h"
#include "stack.h"
#include "stack_products.h"

namespace core_kernels { namespace {

inline double now() {
    timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return double(at.tv_sec) + 1e-9 * double(at.tv_nsec);
}

// The products of a layer for some rows.
struct LayerProducts {
    Products qkv, output, gate_up, down;

    LayerProducts(const StackLayer& layer, int64_t rows, int64_t of) {
        for (const void* one : {layer.q, layer.k, layer.v}) qkv.add(one, rows, of);
        for (const void* one : {layer.gate, layer.up}) gate_up.add(one, rows, of);
        output.add(layer.output, rows, of);
        down.add(layer.down, rows, of);
    }
    int64_t attended() const { return output.parts[0].inputs(); }
    int64_t inner() const { return down.parts[0].inputs(); }
    int64_t floats() const { return std::max({qkv.floats(), output.floats(), gate_up.floats(), down.floats()}); }
    int64_t x_rows() const { return std::max({qkv.x_rows(), output.x_rows(), gate_up.x_rows(), down.x_rows()}); }
    bool are_tiled() const { return qkv.are_tiled() || output.are_tiled() || gate_up.are_tiled() || down.are_tiled(); }
};

// Where Q, K and V of all tokens lie, and the attention over them.
struct LayerAttention {
    float *q, *k, *v;
    AttentionCall call;
    AttentionJob* job;
};

class StackLayers {
  public:
    StackLayers(const InstructionSet& set, const AttentionSet& attention, const StackLayer* layers, const StackCall& call, int threads)
        : set(set), attention(attention), layers(layers), call(call), threads(threads) {}

    void start() { if (call.seconds) stage_start = now(); }

    // A stage of several parts took what its threads spent in each.
    void finished(int64_t) {
        if (!call.seconds) return;
        double all = 0, parts[STACK_PARTS];
        for (int part = 0; part < STACK_PARTS; part++) all += parts[part] = double(spent[part].exchange(0));
        const double before = stage_start;
        stage_start = now();
        for (int part = 0; part < STACK_PARTS; part++) call.seconds[part] += all > 0 ? (stage_start - before) * parts[part] / all : 0;
    }

    bool blocks_exist() {
        return std::all_of(attended.begin(), attended.end(), [](const LayerAttention& one) {
            AttentionStep* step = const_cast<AttentionStep*>(one.call.step);
            if (!step->checked) step->checked = core_kernels::blocks_exist(one.call);
            return step->checked != 0;
        });
    }

  protected:
    const InstructionSet& set;
    const AttentionSet& attention;
    const StackLayer* const layers;
    const StackCall& call;
    const int threads;
    std::vector<LayerAttention> attended;  // by layer, from the call's first

    // Counts what one thread does, if somebody wants to know.
    class Watch {
      public:
        explicit Watch(StackLayers& run) : run(run), at(run.call.seconds ? now() : 0) {}
        void count(StackPart part) {
            if (!run.call.seconds) return;
            const double before = at;
            at = now(), run.spent[part].fetch_add(int64_t(1e9 * (at - before)));
        }

      private:
        StackLayers& run;
        double at;
    };

    int64_t count_layers() const { return call.last - call.first; }
    const StackLayer& layer(int64_t i) const { return layers[call.first + i]; }

    static int64_t padded(int64_t floats) { return (floats + 31) / 16 * 16; }  // vectors of a row may be read whole

    // `qkv` [tokens, outputs] for each product, `out` [tokens, heads * v_dim]. False: there is no memory.
    bool attend_in(float* qkv, float* out) {
        for (int64_t i = 0; i < count_layers(); i++) {
            const StackLayer& one = layer(i);
            const AttentionLayer& shape = *one.attention;
            const int64_t q = shape.heads * shape.k_dim, k = shape.kv_heads * shape.k_dim, rows = one.k ? call.tokens : 1;
            LayerAttention found{qkv, qkv + rows * q, qkv + rows * (q + k), {}, nullptr};
            found.call = {&shape, call.steps[one.step], found.q, found.k, found.v, out};
            if (!(found.job = job_of(found.call))) return false;
            attended.push_back(found);
        }
        return true;
    }

    // Rotates the tokens' Q and K, and stores their K and V.
    void heads(int64_t i, int64_t first, int64_t last) const {
        const StackLayer& one = layer(i);
        const AttentionLayer& shape = *one.attention;
        turn(attended[size_t(i)].q, shape.q_token, shape.heads, shape.k_dim, one.q_norm, one.q_eps, first, last);
        turn(attended[size_t(i)].k, shape.k_token, shape.kv_heads, shape.k_dim, one.k_norm, one.k_eps, first, last);
        attention.store(attended[size_t(i)].call, first, last);
    }

    // Tiles [size * chunk / of, size * (chunk + 1) / of).
    void attend(int64_t i, int64_t chunk, int64_t of) const {
        AttentionJob& job = *attended[size_t(i)].job;
        const int64_t tiles = job.size();
        for (int64_t t = tiles * chunk / of; t < tiles * (chunk + 1) / of; t++) job.attend(attended[size_t(i)].call, t);
    }

    // normed = the norm of x, or of `summed` = x + added where there is something to add, which may be x; rows [first, last).
    void norm(const float* x, const float* added, float* summed, float* normed, const float* weight, float eps, int64_t first, int64_t last) const {
        if (added) set.elementwise.rms_norm({added, x, summed, weight, normed, last, call.hidden, eps}, first, last);
        else set.elementwise.rms_norm({x, nullptr, nullptr, weight, normed, last, call.hidden, eps}, first, last);
    }

    // out = activation(gate) * up for columns [from, to), with the outputs of a layer's gate_up products, `rows` of each.
    void gate(int64_t i, const float* wide, float* out, int64_t rows, int64_t inner, int64_t from, int64_t to) const {
        const bool both = !layer(i).up;
        const int64_t stride = both ? 2 * inner : inner;
        const float* up = wide + (both ? inner : rows * inner);
        set.elementwise.gate({wide + from, up + from, out + from, rows, to - from, stride, stride, inner, layer(i).activation}, 0, rows);
    }

    // to = x + added
    void add(const float* x, const float* added, float* to, int64_t first, int64_t last) const {
        for (int64_t i = first * call.hidden; i < last * call.hidden; i++) to[i] = x[i] + added[i];
    }

  private:
    double stage_start = 0;
    std::atomic<int64_t> spent[STACK_PARTS] = {};  // nanoseconds of all threads in this stage
    struct Job { AttentionJob job; Scratch scratch; };
    std::vector<std::unique_ptr<Job>> jobs;  // by shape

    // Layers of one shape that look back alike have their tiles cut once. Null: there is no memory.
    AttentionJob* job_of(const AttentionCall& wanted) {
        const auto shape = [](const AttentionLayer& one) { return std::make_tuple(one.heads, one.kv_heads, one.k_dim, one.v_dim, one.window, one.chunk, one.block_size); };
        for (const auto& one : jobs)
            if (one->job.call.step == wanted.step && shape(*one->job.call.layer) == shape(*wanted.layer)) return &one->job;
        jobs.push_back(std::make_unique<Job>());
        AttentionJob& job = jobs.back()->job;
        job.set = &attention, job.call = wanted;
        return job.make(jobs.back()->scratch) ? &job : nullptr;
    }

    void turn(float* x, int64_t stride, int64_t heads, int64_t dim, const float* weight, float eps, int64_t first, int64_t last) const {
        for (int64_t token = first; weight && token < last; token++) {
            float* row = x + token * stride;
            set.elementwise.rms_norm({row, nullptr, nullptr, weight, row, heads, dim, eps}, 0, heads);
        }
        set.elementwise.rotate({x, call.cosines, call.sines, call.tokens, heads, dim, stride, dim, call.angle_stride}, first, last);
    }
};

}}  // namespace core_kernels
