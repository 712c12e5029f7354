// The C ABI of attention: one call for one layer, whose tiles are shared out among threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "attention_job.h"
#include "instruction_set.h"
#include "threads.h"
#include "weight.h"

namespace core_kernels {

extern const AttentionSet plain_attention;
#ifdef CORE_KERNELS_X86
extern const AttentionSet avx2_attention, avx512_attention;
#endif

namespace {

constexpr int64_t SERIAL_WORK = 1 << 16;  // multiply-adds below which a second thread costs more than it brings
constexpr int64_t SERIAL_TOKENS = 32;     // that one thread stores
enum Failure : int32_t { NO_MEMORY = 1, NO_SUCH_BLOCK = 2 };

struct Shared {
    AttentionJob job;
    std::atomic<int64_t> next{0};
};

void store_some(void* given) {
    Shared& shared = *static_cast<Shared*>(given);
    const AttentionCall& call = shared.job.call;
    const int64_t tokens = tokens_of(*call.step);
    for (int64_t first; (first = shared.next.fetch_add(SERIAL_TOKENS)) < tokens;)
        shared.job.set->store(call, first, std::min(first + SERIAL_TOKENS, tokens));
}

void attend_some(void* given) {
    Shared& shared = *static_cast<Shared*>(given);
    for (int64_t i; (i = shared.next.fetch_add(1)) < shared.job.size();) shared.job.attend(shared.job.call, i);
}

void share_out(Shared& shared, int threads, void (*work)(void*)) {
    shared.next = 0;
    on_threads(threads, work, &shared);
}

int32_t run(Shared& shared) {
    static thread_local Scratch scratch;
    AttentionJob& job = shared.job;
    if (!job.make(scratch)) return NO_MEMORY;
    const int threads = job.work <= SERIAL_WORK || job.size() < 2 ? 1 : thread_count();
    share_out(shared, tokens_of(*job.call.step) <= SERIAL_TOKENS ? 1 : threads, store_some);
    share_out(shared, threads, attend_some);
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
    if (!std::strncmp(name, "avx512", 6) || !std::strcmp(name, "amx")) return &avx512_attention;
    if (!std::strcmp(name, "avx2")) return &avx2_attention;
#endif
    return &plain_attention;
}

// Store k and v of the step's tokens in the layer's cache, then attend over each request's whole context.
// 0, or a Failure.
EXPORT int32_t core_kernels_attend(const void* set, const AttentionLayer* layer, AttentionStep* step, const void* q, const void* k, const void* v, void* out) try {
    Shared shared;
    shared.job.set = static_cast<const AttentionSet*>(set), shared.job.call = {layer, step, q, k, v, out};
    if (!step->checked && !blocks_exist(shared.job.call)) return NO_SUCH_BLOCK;
    step->checked = 1;
    return run(shared);
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
}
}
