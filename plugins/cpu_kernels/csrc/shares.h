// Work that threads take in turn.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "threads.h"

namespace core_kernels {

// Hands ranges of [0, total) to the threads of torch until none is left; `run(shared, first, last)` does one.
struct Shares {
    void (*run)(const void* shared, int64_t first, int64_t last);
    const void* shared;
    int64_t total, chunk;
    std::atomic<int64_t> next;
};

inline void work(void* given) {
    Shares& shares = *static_cast<Shares*>(given);
    for (int64_t first = shares.next.fetch_add(shares.chunk); first < shares.total; first = shares.next.fetch_add(shares.chunk))
        shares.run(shares.shared, first, std::min(first + shares.chunk, shares.total));
}

inline void share_out(Shares& shares, int threads) {
    if (threads == 1 || shares.chunk >= shares.total) return shares.run(shares.shared, 0, shares.total);
    on_threads(threads, work, &shares);
}

}  // namespace core_kernels
