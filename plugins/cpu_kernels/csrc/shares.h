// Work that threads take in turn.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "threads.h"
#include "turns.h"

namespace core_kernels {

// Hands ranges of [0, total) to the threads of torch until none is left; `run(shared, first, last)` does one.
struct Shares {
    static constexpr int MOST_RUNS = 64;

    void (*run)(const void* shared, int64_t first, int64_t last);
    const void* shared;
    int64_t total, chunk;
    int runs = 1;
    std::atomic<int> workers{0};
    std::atomic<int32_t> taken[MOST_RUNS] = {};

    Shares(void (*run)(const void*, int64_t, int64_t), const void* shared, int64_t total, int64_t chunk)
        : run(run), shared(shared), total(total), chunk(chunk) {}
};

inline void work(void* given) {
    Shares& shares = *static_cast<Shares*>(given);
    const Turns turns{shares.taken, (shares.total + shares.chunk - 1) / shares.chunk, shares.runs};
    turns.take(shares.workers.fetch_add(1) % shares.runs, [&](int64_t at, int) {
        shares.run(shares.shared, at * shares.chunk, std::min((at + 1) * shares.chunk, shares.total));
    });
}

inline void share_out(Shares& shares, int threads) {
    if (threads == 1 || shares.chunk >= shares.total) return shares.run(shares.shared, 0, shares.total);
    shares.runs = std::min(threads, Shares::MOST_RUNS);
    on_threads(threads, work, &shares);
}

}  // namespace core_kernels
