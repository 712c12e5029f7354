// Work that goes through many stages, each of which needs all of the one before: no fork and join for each of them.
//
// The chunks of a stage are done by whoever comes, in the order of turns.h. The thread that finishes the last one opens the
// next stage, and does stages of a single chunk at once, by itself. So nobody waits for a thread that holds no chunk: one that another process
// keeps off its core is not missed. Who waits spins for some microseconds, then leaves the core to others.
#pragma once

#include <sched.h>

#include <atomic>
#include <memory>

#include "threads.h"
#include "turns.h"

namespace core_kernels { namespace {

inline void breathe() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// `Job` has  int64_t chunks(stage)            at least 1
//            void run(stage, chunk, run, worker)   chunks of a stage in any order, on any of `threads` workers; `run` is one of
//                                                  turns.h
//            void finished(stage)             after its last chunk and before the next stage, stage after stage
template <class Job> class Stages {
  public:
    Stages(Job& job, int64_t count, int threads)
        : job(job), count(count), threads(threads), stride((size_t(threads) + 1 + 15) / 16 * 16), counters(new std::atomic<int32_t>[stride * size_t(count)]()) {}

    void run() {
        advance(0, 0);
        if (open.load() < count) on_threads(threads, [](void* given) { static_cast<Stages*>(given)->work(); }, this);
    }

  private:
    static constexpr int SPINS = 400;

    Job& job;
    const int64_t count;
    const int threads;
    const size_t stride;  // of a stage's counters
    // [count][chunks that are done, then those taken by run]: who comes late to a stage finds nothing left of it
    std::unique_ptr<std::atomic<int32_t>[]> counters;
    std::atomic<int> workers{0};
    alignas(64) std::atomic<int64_t> open{0};  // the stage that is worked on

    void work() {
        const int worker = workers.fetch_add(1) % threads;
        for (int64_t stage = open.load(std::memory_order_acquire); stage < count; stage = wait(stage)) {
            std::atomic<int32_t>* done = &counters[stride * size_t(stage)];
            const Turns turns{done + 1, job.chunks(stage), threads};
            turns.take(worker, [&](int64_t chunk, int run) {
                job.run(stage, chunk, run, worker);
                if (done->fetch_add(1) + 1 < turns.chunks) return;
                job.finished(stage);
                advance(stage + 1, worker);
            });
        }
    }

    void advance(int64_t stage, int worker) {
        for (; stage < count && job.chunks(stage) == 1; stage++) {
            job.run(stage, 0, 0, worker);
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
