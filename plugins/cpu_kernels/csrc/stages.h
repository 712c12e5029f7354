// Work that goes through many stages, each of which needs all of the one before: no fork and join for each of them.
//
// The chunks of a stage are done by whoever comes. The thread that finishes the last one opens the next stage, and does
// stages of a single chunk at once, by itself. So nobody waits for a thread that holds no chunk: one that another process
// keeps off its core is not missed. Who waits spins for some microseconds, then leaves the core to others.
#pragma once

#include <sched.h>

#include <atomic>
#include <memory>

#include "threads.h"

namespace core_kernels { namespace {

inline void breathe() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// `Job` has  int64_t chunks(stage)            at least 1
//            void run(stage, chunk)           chunks of a stage in any order, on any thread
//            void finished(stage)             after its last chunk and before the next stage, stage after stage
template <class Job> class Stages {
  public:
    Stages(Job& job, int64_t count) : job(job), count(count), counters(new Counter[size_t(count)]) {}

    void run(int threads) {
        advance(0);
        if (open.load() < count) on_threads(threads, [](void* given) { static_cast<Stages*>(given)->work(); }, this);
    }

  private:
    static constexpr int SPINS = 400;

    struct alignas(64) Counter {  // each stage has its own: who comes late to one finds nothing left of it
        std::atomic<int64_t> next{0}, done{0};
    };

    Job& job;
    const int64_t count;
    std::unique_ptr<Counter[]> counters;
    alignas(64) std::atomic<int64_t> open{0};  // the stage that is worked on

    void work() {
        for (int64_t stage = open.load(std::memory_order_acquire); stage < count; stage = wait(stage)) {
            Counter& counter = counters[size_t(stage)];
            const int64_t chunks = job.chunks(stage);
            for (int64_t chunk; (chunk = counter.next.fetch_add(1)) < chunks;) {
                job.run(stage, chunk);
                if (counter.done.fetch_add(1) + 1 < chunks) continue;
                job.finished(stage);
                advance(stage + 1);
            }
        }
    }

    void advance(int64_t stage) {
        for (; stage < count && job.chunks(stage) == 1; stage++) {
            job.run(stage, 0);
            job.finished(stage);
        }
        open.store(stage, std::memory_order_release);
    }

    int64_t wait(int64_t stage) {
        int64_t now;
        for (int spins = 0; (now = open.load(std::memory_order_acquire)) == stage; spins++)
            if (spins < SPINS) breathe();
            else sched_yield();
        return now;
    }
};

}}  // namespace core_kernels
