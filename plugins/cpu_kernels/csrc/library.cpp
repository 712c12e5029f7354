// The C ABI: choose the instruction set, make weights ready, share a multiplication out among threads.
//
// There is no pool of threads here: work is handed to the OpenMP runtime that torch runs on, found by the caller and
// passed in as two functions, so that both share one set of threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "threads.h"
#include "weight.h"

namespace core_kernels {

extern const InstructionSet plain_set;
#ifdef CORE_KERNELS_X86
extern const InstructionSet avx2_set, avx512_set;
#endif

namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
using MaxThreads = int (*)();                                           // omp_get_max_threads

Parallel run_parallel = nullptr;
MaxThreads max_threads = nullptr;

bool machine_has(const InstructionSet& set) {
#ifdef CORE_KERNELS_X86
    __builtin_cpu_init();
    if (&set == &avx512_set)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && machine_has(avx2_set);
    if (&set == &avx2_set) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return true;
}

const InstructionSet* const all_sets[] = {
#ifdef CORE_KERNELS_X86
    &avx512_set, &avx2_set,
#endif
    &plain_set,
};

struct Ready {
    Plan plan;
    const Packing* packing = nullptr;
};

// Memory that only grows, one for each calling thread.
struct Scratch {
    float* at = nullptr;
    size_t floats = 0;

    float* get(size_t wanted) {
        if (wanted > floats) {
            std::free(at);
            const size_t bytes = (wanted * sizeof(float) + 4095) / 4096 * 4096;
            at = static_cast<float*>(std::aligned_alloc(64, bytes));
            floats = at ? bytes / sizeof(float) : 0;
        }
        return at;
    }
    ~Scratch() { std::free(at); }
};
thread_local Scratch scratch;

struct Job {
    const Ready* ready;
    Call call;
    int64_t chunk;  // rows of the weight at a time
    std::atomic<int64_t> next;
};

void work(void* given) {
    Job& job = *static_cast<Job*>(given);
    const int64_t out = job.ready->plan.weight.out;
    for (int64_t first = job.next.fetch_add(job.chunk); first < out; first = job.next.fetch_add(job.chunk))
        job.ready->packing->multiply(job.ready->plan, job.call, first, std::min(first + job.chunk, out));
}

constexpr int64_t SERIAL_WORK = 1 << 15;  // multiply-adds below which a second thread costs more than it brings

void share_out(Job& job) {
    const Weight& weight = job.ready->plan.weight;
    const bool serial = !run_parallel || weight.out * weight.in * job.call.rows <= SERIAL_WORK;
    const int threads = serial ? 1 : std::max(1, max_threads());
    const int64_t even = weight.out / (int64_t(threads) * 8);
    job.chunk = threads == 1 ? weight.out : std::min<int64_t>(std::max<int64_t>(even / 32 * 32, 32), 1024);
    job.next = 0;
    if (threads == 1) work(&job);
    else run_parallel(work, &job, unsigned(threads), 0);
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

EXPORT int32_t core_kernels_abi() { return 2; }

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
EXPORT void* core_kernels_make(const void* set, const Weight* weight) {
    const Packing* packing = static_cast<const InstructionSet*>(set)->find(weight->packing);
    Ready* ready = packing ? new (std::nothrow) Ready() : nullptr;
    if (!ready) return nullptr;
    ready->plan.weight = *weight;
    ready->packing = packing;
    if (!packing->setup(ready->plan)) {
        delete ready;
        ready = nullptr;
    }
    return ready;
}

EXPORT void core_kernels_free(void* ready) { delete static_cast<Ready*>(ready); }

// out[rows, out] = x[rows, in] @ weight.T + bias. Nonzero: out of memory.
EXPORT int32_t core_kernels_linear(const void* given, const float* x, float* out, int64_t rows) {
    const Ready& ready = *static_cast<const Ready*>(given);
    const int64_t floats = rows * ready.plan.x_stride, sum_floats = rows == 1 ? ready.packing->sum_floats(ready.plan) : 0;
    float* memory = scratch.get(size_t(floats + sum_floats));
    if (!memory) return 1;
    ready.packing->prepare(ready.plan, x, rows, memory, memory + floats);
    Job job{&ready, {memory, memory + floats, out, rows}, 0, {0}};
    share_out(job);
    return 0;
}
}
