// The C ABI: choose the instruction set, make weights ready, share a multiplication out among threads.
//
// There is no pool of threads here: work is handed to the OpenMP runtime that torch runs on, found by the caller and
// passed in as two functions, so that both share one set of threads.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "instruction_set.h"
#include "ready.h"
#include "scratch.h"
#include "shares.h"
#include "tiled.h"

namespace core_kernels {

extern const InstructionSet plain_set;
#ifdef CORE_KERNELS_X86
extern const InstructionSet avx2_set, avx512_set, avx512vnni_set;
#endif
#ifdef CORE_KERNELS_AMX
extern const InstructionSet amx_set;
#endif

namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
using MaxThreads = int (*)();                                           // omp_get_max_threads

Parallel run_parallel = nullptr;
MaxThreads max_threads = nullptr;

bool machine_has(const InstructionSet& set) {
#ifdef CORE_KERNELS_AMX
    if (&set == &amx_set) return machine_has(avx512vnni_set) && machine_has_tiles();
#endif
#ifdef CORE_KERNELS_X86
    __builtin_cpu_init();
    if (&set == &avx512vnni_set) return __builtin_cpu_supports("avx512vnni") && machine_has(avx512_set);
    if (&set == &avx512_set)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && machine_has(avx2_set);
    if (&set == &avx2_set) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return true;
}

const InstructionSet* const all_sets[] = {
#ifdef CORE_KERNELS_AMX
    &amx_set,
#endif
#ifdef CORE_KERNELS_X86
    &avx512vnni_set, &avx512_set, &avx2_set,
#endif
    &plain_set,
};

thread_local Scratch scratch;

struct Job {
    const Ready* ready;
    Call call;
};

void multiply(const void* given, int64_t first, int64_t last) {
    const Job& job = *static_cast<const Job*>(given);
    Call call = job.call;
    call.after = codes_of(job.ready->plan.weight, last, job.ready->plan.weight.out);
    job.ready->packing->multiply(job.ready->plan, call, first, last);
}

constexpr int64_t SERIAL_NUMBERS = 1 << 15;  // numbers that one thread goes through before a second is called
constexpr int64_t SERIAL_WORK = 1 << 15;  // multiply-adds below which a second thread costs more than it brings

void multiply_all(const Job& job) {
    const Weight& weight = job.ready->plan.weight;
    const int threads = weight.out * weight.in * job.call.rows <= SERIAL_WORK ? 1 : thread_count();
    const int64_t even = weight.out / (int64_t(threads) * 8);
    const int64_t chunk = threads == 1 ? weight.out : std::min<int64_t>(std::max<int64_t>(even / 32 * 32, 32), 1024);
    Shares shares(multiply, &job, weight.out, chunk);
    share_out(shares, threads);
}

struct Given {
    const Ready* ready;
    const float* x;
    float *prepared, *sums;
    int64_t rows;
};

// Units of rows that are prepared together; one row by itself is prepared otherwise.
void prepare(const void* shared, int64_t first, int64_t last) {
    const Given& given = *static_cast<const Given*>(shared);
    const Plan& plan = given.ready->plan;
    const int64_t unit = given.ready->packing->x_rows, row = first * unit, end = std::min(last * unit, given.rows);
    given.ready->packing->prepare(plan, given.x + row * plan.weight.in, end - row, given.prepared + row * plan.x_stride, given.sums);
}

void prepare_all(const Given& given) {
    const int64_t unit = given.ready->packing->x_rows, units = (given.rows + unit - 1) / unit;
    const bool parted = unit > 1 && given.rows * given.ready->plan.weight.in > SERIAL_NUMBERS;
    Shares shares(prepare, &given, units, parted ? 1 : units);
    share_out(shares, parted ? thread_count() : 1);
}

std::unique_ptr<Ready> make_ready(const Packing* packing, const Weight& weight) {  // null: not by this packing
    std::unique_ptr<Ready> ready(packing ? new (std::nothrow) Ready() : nullptr);
    if (!ready) return nullptr;
    ready->plan.weight = weight;
    ready->packing = packing;
    if (!packing->setup(ready->plan)) ready.reset();
    return ready;
}

// Rows of `width` numbers each, some at a time.
template <class Call, void (*Elementwise::*member)(const Call&, int64_t, int64_t)>
void run_rows(const void* set, const Call& call, int64_t rows, int64_t width) {
    struct Shared { void (*run)(const Call&, int64_t, int64_t); const Call* call; };
    const Shared shared{static_cast<const InstructionSet*>(set)->elementwise.*member, &call};
    const auto run = [](const void* given, int64_t first, int64_t last) {
        const Shared& found = *static_cast<const Shared*>(given);
        found.run(*found.call, first, last);
    };
    Shares shares(run, &shared, rows, std::max<int64_t>(1, SERIAL_NUMBERS / 2 / std::max<int64_t>(width, 1)));
    share_out(shares, rows * width <= SERIAL_NUMBERS ? 1 : thread_count());
}

}  // namespace

int thread_count() { return run_parallel ? std::max(1, max_threads()) : 1; }

void on_threads(int threads, void (*work)(void*), void* job) {
    if (threads <= 1 || !run_parallel) work(job);
    else run_parallel(work, job, unsigned(threads), 0);
}

}  // namespace core_kernels

using namespace core_kernels;

extern "C" {

#define EXPORT __attribute__((visibility("default")))

EXPORT int32_t core_kernels_abi() { return 5; }

// The functions of the OpenMP runtime that torch has loaded; null: one thread.
EXPORT void core_kernels_threads(void* gomp_parallel, void* omp_get_max_threads) {
    run_parallel = reinterpret_cast<Parallel>(gomp_parallel);
    max_threads = reinterpret_cast<MaxThreads>(omp_get_max_threads);
    if (!max_threads) run_parallel = nullptr;
}

// The best instruction set of this machine, or the named one; null if it has none of that name.
EXPORT const void* core_kernels_instruction_set(const char* name) {
    for (const InstructionSet* set : all_sets)
        if (machine_has(*set) && (!*name || !std::strcmp(name, set->name))) return set;
    return nullptr;
}

EXPORT const char* core_kernels_name(const void* set) { return static_cast<const InstructionSet*>(set)->name; }

// Null: no kernel for this weight. Keeps the pointers in it, and copies nothing that they point at but `order`.
EXPORT void* core_kernels_make(const void* given, const Weight* weight) {
    const InstructionSet& set = *static_cast<const InstructionSet*>(given);
    std::unique_ptr<Ready> ready = make_ready(set.find(weight->packing), *weight);
    if (!ready || !set.find_other) return ready.release();
    ready->other = make_ready(set.find_other(*weight), *weight);
    if (ready->other) ready->least_rows = ready->other->packing->least_rows, ready->most_rows = ready->other->packing->most_rows;
    return ready.release();
}

EXPORT void core_kernels_free(void* ready) { delete static_cast<Ready*>(ready); }

// out[rows, out] = x[rows, in] @ weight.T + bias. Nonzero: out of memory.
EXPORT int32_t core_kernels_linear(const void* given, const float* x, float* out, int64_t rows) {
    const Ready& ready = static_cast<const Ready*>(given)->of(rows);
    const Tiled* tiled = ready.packing->tiled;
    if (tiled && rows >= tiled->from_rows) return !multiply_tiled(*tiled, ready.plan, x, out, rows);
    const int64_t floats = ready.packing->x_floats(ready.plan, rows), sum_floats = rows == 1 ? ready.packing->sum_floats(ready.plan) : 0;
    float* memory = scratch.get(floats + sum_floats);
    if (!memory) return 1;
    prepare_all({&ready, x, memory, memory + floats, rows});
    multiply_all({&ready, {memory, memory + floats, out, rows}});
    return 0;
}

// out[rows, width] = RMSNorm of x[rows, width], or of summed = residual + x where there is a residual.
EXPORT void core_kernels_rms_norm(const void* set, const float* x, const float* residual, float* summed, const float* weight,
                                  float* out, int64_t rows, int64_t width, float eps) {
    run_rows<NormCall, &Elementwise::rms_norm>(set, {x, residual, summed, weight, out, rows, width, eps}, rows, width);
}

// out[rows, width] = activation(gate) * up
EXPORT void core_kernels_gate(const void* set, const float* gate, const float* up, float* out, int64_t rows, int64_t width,
                              int64_t gate_stride, int64_t up_stride, int32_t kind) {
    run_rows<GateCall, &Elementwise::gate>(set, {gate, up, out, rows, width, gate_stride, up_stride, width, kind}, rows, width);
}

// Turns x[tokens, heads, width] where it lies.
EXPORT void core_kernels_rotate(const void* set, float* x, const float* cosines, const float* sines, int64_t tokens,
                                int64_t heads, int64_t width, int64_t token_stride, int64_t head_stride, int64_t angle_stride) {
    const RotateCall call{x, cosines, sines, tokens, heads, width, token_stride, head_stride, angle_stride};
    run_rows<RotateCall, &Elementwise::rotate>(set, call, tokens, heads * width);
}
}
