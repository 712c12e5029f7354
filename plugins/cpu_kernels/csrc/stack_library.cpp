// The C ABI of decoder layers that run in one call.
#include <new>

#include "stack_run.h"
#include "threads.h"

using namespace core_kernels;

namespace {

constexpr int64_t KEPT_FLOATS = 1 << 22;  // between runs; what a long prompt needs beyond it is given back
enum Failure : int32_t { NO_MEMORY = 1, NO_SUCH_BLOCK = 2 };

int32_t run_stack(StackRun& run, Scratch& scratch, int threads) {
    if (!run.prepare(scratch)) return NO_MEMORY;
    if (!run.blocks_exist()) return NO_SUCH_BLOCK;
    run.start();
    Stages<StackRun>(run, run.count(), threads).run();
    return 0;
}

}  // namespace

extern "C" {

#define EXPORT __attribute__((visibility("default")))

// Layers [first, last) of `layers`, added to x. 0, or a Failure.
EXPORT int32_t core_kernels_stack(const void* set, const void* attention, const StackLayer* layers, const StackCall* call) try {
    static thread_local Scratch kept;
    const int threads = thread_count();
    StackRun run(*static_cast<const InstructionSet*>(set), *static_cast<const AttentionSet*>(attention), layers, *call, threads);
    const int32_t failure = run_stack(run, kept, threads);
    if (kept.floats > KEPT_FLOATS) kept.give_back();
    return failure;
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
}
}
