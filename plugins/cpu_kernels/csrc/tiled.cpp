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

constexpr int64_t TILE_ROWS = 16, LANES = 16;
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

// Columns of x with place for the sums over each 32 of them.
int64_t tile_columns(int64_t columns) { return columns + (columns + 1023) / 1024 * 32; }

void cut(const void* given, int64_t first, int64_t last) {
    const Job& job = *static_cast<const Job*>(given);
    for (int64_t t = first; t < last; t++)
        job.tiled.cut_x(job.plan, job.x, t * TILE_ROWS, job.call.rows, job.call.from, job.call.to, job.tiles + t * job.tile_numbers);
}

void multiply(const void* given, int64_t first, int64_t last) {
    const Job& job = *static_cast<const Job*>(given);
    job.tiled.multiply(job.plan, job.call, first, last);
}

void multiply_block(Job& job, int threads) {
    const int64_t tiles = (job.call.rows + TILE_ROWS - 1) / TILE_ROWS, out = job.plan.weight.out;
    Shares cuts{cut, &job, tiles, 1, {0}};
    share_out(cuts, tiles * job.tile_numbers < SERIAL_NUMBERS * job.tiled.x_terms ? 1 : threads);
    const int64_t even = out / (int64_t(threads) * 8);
    Shares products{multiply, &job, out, std::min<int64_t>(std::max<int64_t>(even / 32 * 32, 32), 512), {0}};
    share_out(products, threads);
}

}  // namespace

bool multiply_tiled(const Tiled& tiled, const Plan& plan, const float* x, float* out, int64_t rows) {
    const int threads = thread_count();
    const int64_t segment = plan.vectors / plan.segments * LANES;
    const int64_t whole = std::min<int64_t>(rows, BLOCK_ROWS), depth = std::min(BLOCK_DEPTH, BLOCK_NUMBERS / ((whole + 15) / 16 * 16));
    const int64_t deep = (plan.segments * segment + depth - 1) / depth, high = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t longest = (plan.segments + deep - 1) / deep * segment, most = ((rows + high - 1) / high + TILE_ROWS) / TILE_ROWS * TILE_ROWS;
    uint16_t* tiles = reinterpret_cast<uint16_t*>(scratch.get((most + TILE_ROWS) * tile_columns(longest) * tiled.x_terms / 2));
    if (!tiles) return false;
    for (int64_t h = 0; h < high; h++) {
        const int64_t first = (rows + 15) / 16 * h / high * 16, last = std::min(rows, (rows + 15) / 16 * (h + 1) / high * 16);
        for (int64_t d = 0; d < deep; d++) {
            const int64_t from = plan.segments * d / deep, to = plan.segments * (d + 1) / deep;
            Job job{tiled, plan, x + first * plan.weight.in, tiles, {tiles, out + first * plan.weight.out, last - first, from, to},
                    tile_columns((to - from) * segment) * tiled.x_terms * TILE_ROWS};
            multiply_block(job, threads);
        }
    }
    return true;
}

#ifdef CORE_KERNELS_AMX
// Tiles of bfloat16 in the processor, their registers kept by the system, and the system's leave to use them.
bool machine_has_tiles() {
    constexpr unsigned TILES = 1u << 24, BFLOAT16 = 1u << 22, STATE = 3u << 17;
    constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & TILES) == 0 || (d & BFLOAT16) == 0) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & STATE) == STATE && syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}
#endif

}  // namespace core_kernels
