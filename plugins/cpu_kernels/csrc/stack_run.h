// One run of decoder layers, as stages (stages.h) over buffers that all layers share.
//
//   small parts (norms, rotation, gates, x brought into the order of a product) go through rows; few rows are one chunk,
//   done by the thread that ends the stage before. Linears go through their outputs, attention through its tiles. Every
//   number is computed by the code, and with the rows, that a call of each operation by itself would use.
#pragma once

#include <time.h>

#include <algorithm>
#include <tuple>

#include "attention_job.h"
#include "instruction_set.h"
#include "product.h"
#include "stack.h"
#include "stages.h"

namespace core_kernels { namespace {

enum Operation : int32_t { BEFORE_QKV, QKV, HEADS, ATTEND, BEFORE_OUTPUT, OUTPUT, BEFORE_MLP, GATE_UP, BEFORE_DOWN, DOWN, OPERATIONS };
constexpr StackPart PART_OF[OPERATIONS] = {SMALL, LINEARS, SMALL, ATTENTION, SMALL, LINEARS, SMALL, LINEARS, SMALL, LINEARS};

// Chunks of a run's work that one thread has to itself.
constexpr int64_t SMALL_NUMBERS = 1 << 13;    // of a row-wise part
constexpr int64_t SMALL_PRODUCTS = 1 << 13;   // multiply-adds
constexpr int64_t LEAST_ROWS = 2;             // one row by itself is prepared otherwise

// Products with one input whose outputs are one stage.
struct Products {
    Product parts[3];
    int64_t count = 0, chunk = 0, chunks = 0;

    void add(const void* ready, int64_t rows) {
        if (ready) parts[count++] = {&static_cast<const Ready*>(ready)->of(rows), rows, nullptr, nullptr};
    }
    int64_t outputs() const {
        int64_t found = 0;
        for (int64_t i = 0; i < count; i++) found += parts[i].outputs();
        return found;
    }
    int64_t floats() const {
        int64_t found = 0;
        for (int64_t i = 0; i < count; i++) found += (parts[i].floats() + 15) / 16 * 16;
        return found;
    }
    int64_t x_rows() const {
        int64_t found = 1;
        for (int64_t i = 0; i < count; i++) found = std::max(found, parts[i].x_rows());
        return found;
    }
    // `out`: a buffer for each part, one behind the other
    void place(float* memory, float* out, int threads) {
        int64_t work = 0;
        for (int64_t i = 0; i < count; i++) {
            parts[i].memory = memory, parts[i].out = out;
            memory += (parts[i].floats() + 15) / 16 * 16;
            out += parts[i].rows * parts[i].outputs();
            work += parts[i].rows * parts[i].outputs() * parts[i].inputs();
        }
        const int64_t even = outputs() / (int64_t(threads) * 8) / 32 * 32;
        chunk = threads == 1 || work <= SMALL_PRODUCTS ? outputs() : std::min<int64_t>(std::max<int64_t>(even, 32), 1024);
        for (int64_t i = 0; i < count; i++) chunks += (parts[i].outputs() + chunk - 1) / chunk;
        if (chunk == outputs()) chunks = 1;
    }
    void prepare(const float* x, int64_t first, int64_t last) const {
        for (int64_t i = 0; i < count; i++) parts[i].prepare(x, first, last);
    }
    void multiply(int64_t at, Stretch after) const {
        for (int64_t i = 0; i < count; i++) {
            const int64_t mine = (parts[i].outputs() + chunk - 1) / chunk;
            if (chunks == 1) parts[i].multiply(0, parts[i].outputs(), after);
            else if (at >= 0 && at < mine) parts[i].multiply(at * chunk, std::min((at + 1) * chunk, parts[i].outputs()), after);
            at -= mine;
        }
    }
    // What a chunk reads first.
    Stretch codes(int64_t at) const {
        for (int64_t i = 0; i < count; i++) {
            const int64_t mine = (parts[i].outputs() + chunk - 1) / chunk;
            if (at < mine) return codes_of(parts[i].ready->plan.weight, at * chunk, std::min((at + 1) * chunk, parts[i].outputs()));
            at -= mine;
        }
        return {};
    }
};

// One layer's places in the buffers.
struct LayerRun {
    const StackLayer* layer;
    Products qkv, output, gate_up, down;
    float *q, *k, *v, *gate, *up;
    int64_t q_stride, k_stride, v_stride, gate_stride, up_stride, inner;
    AttentionCall attention;
    AttentionJob* job;
};

class StackRun {
  public:
    StackRun(const InstructionSet& set, const AttentionSet& attention, const StackLayer* layers, const StackCall& call, int threads)
        : set(set), attention(attention), call(call), threads(threads) {
        for (int64_t i = call.first; i < call.last; i++) runs.push_back(describe(layers[i]));
        head.add(call.head, call.tokens);
    }

    // False: there is no memory.
    bool prepare(Scratch& scratch) {
        int64_t products = head.floats(), qkv = 0, gates = 0, attended = 0, gated = 0;
        unit = head.x_rows();
        for (const LayerRun& run : runs) {
            for (const Products* one : {&run.qkv, &run.output, &run.gate_up, &run.down}) {
                products = std::max(products, one->floats());
                unit = std::max(unit, one->x_rows());
            }
            qkv = std::max(qkv, run.qkv.outputs()), gates = std::max(gates, run.gate_up.outputs());
            attended = std::max(attended, run.output.parts[0].inputs()), gated = std::max(gated, run.inner);
        }
        const auto padded = [](int64_t floats) { return (floats + 31) / 16 * 16; };  // vectors of a row may be read whole
        const int64_t sizes[] = {padded(products), padded(call.tokens * call.hidden), padded(call.tokens * call.hidden),
                                 padded(call.tokens * std::max(qkv, gates)), padded(call.tokens * std::max(attended, gated))};
        int64_t total = 0;
        for (int64_t size : sizes) total += size;
        float* at = scratch.get(total);
        if (!at) return false;
        memory = at, normed = at + sizes[0], made = normed + sizes[1], wide = made + sizes[2], inner = wide + sizes[3];
        for (LayerRun& run : runs) place(run);
        head.place(memory, call.logits, threads);
        return std::all_of(runs.begin(), runs.end(), [&](LayerRun& run) { return find_job(run); });
    }

    bool blocks_exist() {
        return std::all_of(runs.begin(), runs.end(), [](const LayerRun& run) {
            AttentionStep* step = const_cast<AttentionStep*>(run.attention.step);
            if (!step->checked) step->checked = core_kernels::blocks_exist(run.attention);
            return step->checked != 0;
        });
    }

    // Those of the layers, then the last addition, with the norm where a head follows, and the head.
    int64_t count() const { return layer_stages() + 1 + head.count; }

    void start() { if (call.seconds) before = now(); }

    // ------------------------------------------------------------------------------------------ what Stages asks for

    int64_t chunks(int64_t stage) const {
        if (threads == 1) return 1;
        const int64_t hidden = call.hidden;
        if (stage == layer_stages()) return row_chunks(head.count ? 2 * hidden : hidden);
        if (stage > layer_stages()) return head.chunks;
        const LayerRun& run = runs[size_t(stage / OPERATIONS)];
        switch (stage % OPERATIONS) {
            case BEFORE_QKV: case BEFORE_MLP: return row_chunks(2 * hidden);
            case QKV: return run.qkv.chunks;
            case HEADS: return row_chunks(run.qkv.outputs());
            case ATTEND: return run.job->work <= SMALL_PRODUCTS ? 1 : run.job->size();
            case BEFORE_OUTPUT: return row_chunks(run.output.parts[0].inputs());
            case OUTPUT: return run.output.chunks;
            case GATE_UP: return run.gate_up.chunks;
            case BEFORE_DOWN: return row_chunks(4 * run.inner);
            default: return run.down.chunks;
        }
    }

    void run(int64_t stage, int64_t chunk, int turn) {
        const int64_t of = chunks(stage), first = row(chunk, of), last = row(chunk + 1, of);
        if (const Products* products = products_of(stage)) return products->multiply(chunk, codes_after(stage, chunk, turn));
        if (stage == layer_stages()) return head.count ? norm(call.head_norm, call.head_eps, true, head, first, last) : add(first, last);
        const LayerRun& run = runs[size_t(stage / OPERATIONS)];
        switch (stage % OPERATIONS) {
            case BEFORE_QKV: return norm(run.layer->attention_norm, run.layer->attention_eps, stage > 0, run.qkv, first, last);
            case HEADS: return heads(run, first, last);
            case ATTEND: return attend(run, chunk, of);
            case BEFORE_OUTPUT: return run.output.prepare(inner, first, last);
            case BEFORE_MLP: return norm(run.layer->mlp_norm, run.layer->mlp_eps, true, run.gate_up, first, last);
            default: return gate(run, first, last);
        }
    }

    void finished(int64_t stage) {
        if (!call.seconds) return;
        const double at = now();
        const bool of_layer = stage < layer_stages();
        call.seconds[of_layer ? PART_OF[stage % OPERATIONS] : stage == layer_stages() ? SMALL : LINEARS] += at - before;
        before = at;
    }

  private:
    const InstructionSet& set;
    const AttentionSet& attention;
    const StackCall& call;
    const int threads;
    std::vector<LayerRun> runs;
    Products head;  // none, or one
    struct Job { AttentionJob job; Scratch scratch; };
    std::vector<std::unique_ptr<Job>> jobs;  // by shape
    float *memory = nullptr, *normed = nullptr, *made = nullptr, *wide = nullptr, *inner = nullptr;
    double before = 0;
    int64_t unit = 1;  // rows that are not parted: those that a product takes together

    int64_t layer_stages() const { return int64_t(runs.size()) * OPERATIONS; }

    // Null: the stage is no product.
    const Products* products_of(int64_t stage) const {
        if (stage >= layer_stages()) return stage > layer_stages() ? &head : nullptr;
        const LayerRun& run = runs[size_t(stage / OPERATIONS)];
        switch (stage % OPERATIONS) {
            case QKV: return &run.qkv;
            case OUTPUT: return &run.output;
            case GATE_UP: return &run.gate_up;
            case DOWN: return &run.down;
            default: return nullptr;
        }
    }

    // What the thread that has a run of chunks reads after one of them: the next one's codes, or those of the next product.
    Stretch codes_after(int64_t stage, int64_t chunk, int turn) const {
        const Products& products = *products_of(stage);
        if (chunk + 1 < Turns::first_of(products.chunks, threads, turn + 1)) return products.codes(chunk + 1);
        for (stage++; stage < count(); stage++)
            if (const Products* next = products_of(stage)) return next->codes(Turns::first_of(next->chunks, threads, turn));
        return {};
    }

    static double now() {
        timespec at;
        clock_gettime(CLOCK_MONOTONIC, &at);
        return double(at.tv_sec) + 1e-9 * double(at.tv_nsec);
    }

    LayerRun describe(const StackLayer& layer) const {
        LayerRun run{};
        run.layer = &layer;
        for (const void* one : {layer.q, layer.k, layer.v}) run.qkv.add(one, call.tokens);
        for (const void* one : {layer.gate, layer.up}) run.gate_up.add(one, call.tokens);
        run.output.add(layer.output, call.tokens);
        run.down.add(layer.down, call.tokens);
        run.inner = run.down.parts[0].inputs();
        return run;
    }

    void place(LayerRun& run) {
        const AttentionLayer& layer = *run.layer->attention;
        const int64_t q = layer.heads * layer.k_dim, k = layer.kv_heads * layer.k_dim, tokens = call.tokens;
        run.qkv.place(memory, wide, threads);
        run.output.place(memory, made, threads);
        run.gate_up.place(memory, wide, threads);
        run.down.place(memory, made, threads);
        const bool merged = run.qkv.count == 1, both = run.gate_up.count == 1;
        run.q = wide, run.k = wide + (merged ? q : tokens * q), run.v = run.k + (merged ? k : tokens * k);
        run.q_stride = layer.q_token, run.k_stride = layer.k_token, run.v_stride = layer.v_token;
        run.gate = wide, run.up = wide + (both ? run.inner : tokens * run.inner);
        run.gate_stride = run.up_stride = both ? 2 * run.inner : run.inner;
        run.attention = {&layer, call.steps[run.layer->step], run.q, run.k, run.v, inner};
    }

    // Layers of one shape that look back alike have their tiles cut once.
    bool find_job(LayerRun& run) {
        const AttentionLayer& layer = *run.attention.layer;
        const auto shape = [](const AttentionLayer& one) { return std::make_tuple(one.heads, one.kv_heads, one.k_dim, one.v_dim, one.window, one.chunk, one.block_size); };
        for (const auto& one : jobs)
            if (one->job.call.step == run.attention.step && shape(*one->job.call.layer) == shape(layer)) {
                run.job = &one->job;
                return true;
            }
        jobs.push_back(std::make_unique<Job>());
        run.job = &jobs.back()->job;
        run.job->set = &attention, run.job->call = run.attention;
        return run.job->make(jobs.back()->scratch);
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
    void norm(const float* weight, float eps, bool adds, const Products& products, int64_t first, int64_t last) const {
        const NormCall rows{adds ? made : call.x, adds ? call.x : nullptr, adds ? call.x : nullptr, weight, normed, call.tokens, call.hidden, eps};
        set.elementwise.rms_norm(rows, first, last);
        products.prepare(normed, first, last);
    }

    void heads(const LayerRun& run, int64_t first, int64_t last) const {
        const AttentionLayer& layer = *run.attention.layer;
        turn(run.q, run.q_stride, layer.heads, layer.k_dim, run.layer->q_norm, run.layer->q_eps, first, last);
        turn(run.k, run.k_stride, layer.kv_heads, layer.k_dim, run.layer->k_norm, run.layer->k_eps, first, last);
        attention.store(run.attention, first, last);
    }

    void turn(float* x, int64_t stride, int64_t heads, int64_t dim, const float* weight, float eps, int64_t first, int64_t last) const {
        for (int64_t token = first; weight && token < last; token++) {
            float* row = x + token * stride;
            set.elementwise.rms_norm({row, nullptr, nullptr, weight, row, heads, dim, eps}, 0, heads);
        }
        set.elementwise.rotate({x, call.cosines, call.sines, call.tokens, heads, dim, stride, dim, call.angle_stride}, first, last);
    }

    void attend(const LayerRun& run, int64_t chunk, int64_t of) const {
        const int64_t tiles = run.job->size();
        for (int64_t i = tiles * chunk / of; i < tiles * (chunk + 1) / of; i++) run.job->attend(run.attention, i);
    }

    void gate(const LayerRun& run, int64_t first, int64_t last) const {
        set.elementwise.gate({run.gate, run.up, inner, call.tokens, run.inner, run.gate_stride, run.up_stride, run.layer->activation}, first, last);
        run.down.prepare(inner, first, last);
    }

    void add(int64_t first, int64_t last) const {
        for (int64_t i = first * call.hidden; i < last * call.hidden; i++) call.x[i] += made[i];
    }
};

}}  // namespace core_kernels
