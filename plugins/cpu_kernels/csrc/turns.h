// In which order threads take the chunks of a piece of work.
//
// Each worker has a run of neighbouring chunks to itself, so that it reads on in memory where it stopped, and can ask for what
// comes next while it computes. Who is done with its own run takes from the others' (Blumofe and Leiserson 1999), so nobody
// waits for a thread that another process keeps off its core.
#pragma once

#include <atomic>
#include <cstdint>

namespace core_kernels {

struct Turns {
    std::atomic<int32_t>* taken;  // [runs], of each run; zeros at first
    int64_t chunks;
    int runs;

    static int64_t first_of(int64_t chunks, int runs, int run) { return chunks * run / runs; }

    // Calls body(chunk, run it is of) until no chunk is left.
    template <class Body> void take(int worker, const Body& body) const {
        for (int i = 0; i < runs; i++) {
            const int run = (worker + i) % runs;
            const int64_t first = first_of(chunks, runs, run), count = first_of(chunks, runs, run + 1) - first;
            while (taken[run].load(std::memory_order_relaxed) < count) {
                const int32_t at = taken[run].fetch_add(1);
                if (at < count) body(first + at, run);
            }
        }
    }
};

}  // namespace core_kernels
