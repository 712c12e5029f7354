// The C ABI of decoder layers that run in one call.
#include <new>

#include "stack_blocks.h"
#include "stack_run.h"
#include "threads.h"

using namespace core_kernels;

namespace {

constexpr int64_t KEPT_FLOATS = 1 << 22;  // between runs; what more than OWN_ROWS rows need beyond it is given back
enum Failure : int32_t { NO_MEMORY = 1, NO_SUCH_BLOCK = 2 };

template <class Run> int32_t run_stack(Run& run, Scratch& scratch, int threads) {
    if (!run.prepare(scratch)) return NO_MEMORY;
    if (!run.blocks_exist()) return NO_SUCH_BLOCK;
    run.start();
    Stages<Run>(run, run.count(), threads).run();
    return run.out_of_memory() ? NO_MEMORY : 0;
}

template <class Run> int32_t run_as(const void* set, const void* attention, const StackLayer* layers, const StackCall& call, Scratch& scratch, int threads) {
    Run run(*static_cast<const InstructionSet*>(set), *static_cast<const AttentionSet*>(attention), layers, call, threads);
    return run_stack(run, scratch, threads);
}

}  // namespace

extern "C" {

#define EXPORT __attribute__((visibility("default")))

// Layers [first, last) of `layers`, added to x. 0, or a Failure.
EXPORT int32_t core_kernels_stack(const void* set, const void* attention, const StackLayer* layers, const StackCall* call) try {
    static thread_local Scratch kept;
    const int threads = thread_count();
    const bool in_blocks = StackBlocks::fits(layers, *call, threads);
    const int32_t failure = in_blocks ? run_as<StackBlocks>(set, attention, layers, *call, kept, threads) : run_as<StackRun>(set, attention, layers, *call, kept, threads);
    if (kept.floats > KEPT_FLOATS && call->tokens > OWN_ROWS) kept.give_back();
    return failure;
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
}
}
