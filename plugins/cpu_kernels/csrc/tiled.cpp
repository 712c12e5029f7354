// Shares a multiplication with tiles out among threads, a block of x at a time. Knows no instruction set.
//
// A block of x, cut into tiles, stays in the second cache of a core while all weights go past it.
#include "tiled.h"

#ifdef CORE_KERNELS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "scratch.h"
#include "shares.h"

namespace core_kernels { namespace {

constexpr int64_t LANES = 16;                            // of a vector
constexpr int64_t BLOCK_ROWS = 256, BLOCK_DEPTH = 2048;  // of x at a time, at the most
constexpr int64_t BLOCK_NUMBERS = 1 << 17;               // of x, before they are cut
constexpr int64_t SERIAL_NUMBERS = 1 << 14;              // of x, below which one thread cuts them

thread_local Scratch scratch;

struct Job {
    const Tiled& tiled;
    const Plan& plan;
    const float* x;
    uint16_t* tiles;
    TiledCall call;
    int64_t tile_numbers;  // of 16 rows of x
};

void cut(const void* given, int64_t first, int64_t last) {
    const Job& job = *static_cast<const Job*>(given);
    for (int64_t t = first; t < last; t++)
        job.tiled.cut_x(job.plan, job.x, t * TILED_X_ROWS, job.call.rows, job.call.from, job.call.to, job.tiles + t * job.tile_numbers);
}

void multiply(const void* given, int64_t first, int64_t last) {
    const Job& job = *static_cast<const Job*>(given);
    job.tiled.multiply(job.plan, job.call, first, last);
}

void multiply_block(Job& job, int64_t tiles, int threads) {
    const int64_t out = job.plan.weight.out;
    Shares cuts(cut, &job, tiles, 1);
    share_out(cuts, tiles * job.tile_numbers < SERIAL_NUMBERS * job.tiled.x_terms ? 1 : threads);
    const int64_t even = out / (int64_t(threads) * 8);
    Shares products(multiply, &job, out, std::min<int64_t>(std::max<int64_t>(even / 32 * 32, 32), 512));
    share_out(products, threads);
}

}  // namespace

TiledColumns::TiledColumns(const Tiled& tiled, const Plan& plan, int64_t rows)
    : rows(rows), segments(plan.segments), lanes(plan.vectors / plan.segments * LANES), x_terms(tiled.x_terms) {
    const int64_t depth = std::min(BLOCK_DEPTH, BLOCK_NUMBERS / (tiles() * TILED_X_ROWS));
    blocks = std::min((segments * lanes + depth - 1) / depth, segments);
}

bool multiply_tiled(const Tiled& tiled, const Plan& plan, const float* x, float* out, int64_t rows) {
    const int64_t tiles = (rows + TILED_X_ROWS - 1) / TILED_X_ROWS, blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t first = tiles * b / blocks * TILED_X_ROWS, last = std::min(rows, tiles * (b + 1) / blocks * TILED_X_ROWS);
        const TiledColumns columns(tiled, plan, last - first);
        uint16_t* memory = reinterpret_cast<uint16_t*>(scratch.get((columns.offset(columns.blocks) + 1) / 2));
        if (!memory) return false;
        for (int64_t d = 0; d < columns.blocks; d++) {
            const TiledCall call{memory, out + first * plan.weight.out, last - first, columns.from(d), columns.from(d + 1)};
            Job job{tiled, plan, x + first * plan.weight.in, memory, call, columns.numbers(d)};
            multiply_block(job, columns.tiles(), thread_count());
        }
    }
    return true;
}

#ifdef CORE_KERNELS_AMX
// Tiles of bytes and of bfloat16 in the processor, their registers kept by the system, and the system's leave to use them.
bool machine_has_tiles() {
    constexpr unsigned NEEDED = 1u << 22 | 1u << 24 | 1u << 25, STATE = 3u << 17;  // bfloat16, tiles, bytes
    constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & NEEDED) != NEEDED) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & STATE) == STATE && syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}
#endif

}  // namespace core_kernels
