// The C ABI of screened heads: make the copy in bytes, find the highest outputs of some rows.
#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

#include "instruction_set.h"
#include "ready.h"
#include "scratch.h"
#include "shares.h"

using namespace core_kernels;

namespace {

constexpr int64_t CHUNK_COLUMNS = 1024;

struct Filling {
    const Screen* screen;
    const ScreenWeight* weight;
    const Weight* floats;
};

void fill(const void* given, int64_t first, int64_t last) {
    const Filling& filling = *static_cast<const Filling*>(given);
    filling.screen->fill(*filling.weight, *filling.floats, first, last);
}

// One search: chunks of columns by what bytes say, then the columns that are left by floats.
struct Search {
    const Screen& screen;
    const ScreenCall& call;
    const Ready& ready;
    const Call exact;
    const int64_t blocks, chunk, chunks;  // blocks of W columns
    float *lower, *upper;                 // [chunks, rows]
    float* goals;                         // [rows]

    int64_t end(int64_t at) const { return std::min((at + 1) * chunk, blocks); }

    static void screen_chunks(const void* given, int64_t first, int64_t last) {
        const Search& search = *static_cast<const Search*>(given);
        for (int64_t at = first; at < last; at++)
            search.screen.multiply(search.call, at * search.chunk, search.end(at), search.lower + at * search.call.count, search.upper + at * search.call.count);
    }

    static void finish_chunks(const void* given, int64_t first, int64_t last) {
        const Search& search = *static_cast<const Search*>(given);
        for (int64_t at = first; at < last; at++) search.finish(at);
    }

    bool may_have(int64_t at, int64_t row) const { return upper[at * call.count + row] >= goals[row]; }

    void finish(int64_t at) const {
        const int64_t from = at * chunk * screen.width, columns = std::min(call.weight->out, end(at) * screen.width) - from;
        uint8_t marks[CHUNK_COLUMNS + 1] = {};
        for (int64_t row = 0; row < call.count; row++)
            if (may_have(at, row)) screen.mark(call, row, goals[row], at * chunk, end(at), marks);
        for (int64_t n = 0; n < columns; n++) {
            if (!marks[n]) continue;
            const int64_t first = n;
            while (marks[n]) n++;  // a zero follows the last
            ready.packing->multiply(ready.plan, exact, from + first, from + n);
        }
    }

    int64_t set_goals() const {  // how many chunks may have what is sought
        for (int64_t row = 0; row < call.count; row++) {
            goals[row] = -std::numeric_limits<float>::infinity();
            for (int64_t at = 0; at < chunks; at++) goals[row] = std::max(goals[row], lower[at * call.count + row]);
        }
        int64_t found = 0;
        for (int64_t at = 0; at < chunks; at++)
            for (int64_t row = 0; row < call.count; row++) found += may_have(at, row);
        return found;
    }
};

constexpr int64_t FEW_CHUNKS = 4;  // that one thread finishes sooner than it calls others

}  // namespace

extern "C" {

#define EXPORT __attribute__((visibility("default")))

// Rows of a head's copy that lie side by side; 0: this instruction set has none.
EXPORT int64_t core_kernels_screen_width(const void* given) {
    const InstructionSet& set = *static_cast<const InstructionSet*>(given);
    return set.find_screen ? set.find_screen()->width : 0;
}

// Fills the memory that `weight` points at from a head of plain floats, of core_kernels_make.
EXPORT void core_kernels_screen_fill(const void* given, ScreenWeight* weight, const void* head) {
    const Screen* screen = static_cast<const InstructionSet*>(given)->find_screen();
    const Weight& floats = static_cast<const Ready*>(head)->plan.weight;
    const Filling filling{screen, weight, &floats};
    weight->bias = floats.bias;
    const int64_t blocks = (weight->out + screen->width - 1) / screen->width;
    Shares shares(fill, &filling, blocks, 16);
    share_out(shares, thread_count());
    weight->longest = *std::max_element(weight->code_length, weight->code_length + blocks);
}

// out[rows, out] = x[rows, in] @ weight.T + bias: in each row the highest and what is as high as `ready` gives it; the others
// are that as well or near it, and lower. Nonzero: out of memory.
EXPORT int32_t core_kernels_highest(const void* given, const ScreenWeight* weight, const void* head, const float* x, float* out, int64_t rows) {
    static thread_local Scratch scratch;
    const Screen& screen = *static_cast<const InstructionSet*>(given)->find_screen();
    const Ready& ready = static_cast<const Ready*>(head)->of(rows);
    const int64_t blocks = (weight->out + screen.width - 1) / screen.width, chunk = CHUNK_COLUMNS / screen.width, chunks = (blocks + chunk - 1) / chunk;
    const int64_t row_bytes = screen.row_bytes(weight->in), number_floats = (rows * row_bytes + 63) / 64 * 16;
    const int64_t exact_floats = ready.packing->x_floats(ready.plan, rows), sum_floats = rows == 1 ? ready.packing->sum_floats(ready.plan) : 0;
    const int64_t row_floats = rows * int64_t(sizeof(ScreenRow) / sizeof(float));
    float* memory = scratch.get(number_floats + exact_floats + sum_floats + row_floats + (2 * chunks + 1) * rows + 64);
    if (!memory) return 1;
    int8_t* numbers = reinterpret_cast<int8_t*>(memory);
    float *prepared = memory + number_floats, *sums = prepared + exact_floats, *made = sums + sum_floats, *bounds = made + row_floats;
    ScreenRow* in_numbers = reinterpret_cast<ScreenRow*>(made);
    screen.prepare(*weight, x, rows, numbers, in_numbers);
    ready.packing->prepare(ready.plan, x, rows, prepared, sums);
    const ScreenCall call{weight, in_numbers, numbers, rows, row_bytes, out};
    const Search search{screen, call, ready, {prepared, sums, out, rows, {}}, blocks, chunk, chunks, bounds, bounds + chunks * rows, bounds + 2 * chunks * rows};
    Shares first(Search::screen_chunks, &search, chunks, 1);
    share_out(first, thread_count());
    const int64_t left = search.set_goals();
    Shares second(Search::finish_chunks, &search, chunks, left > FEW_CHUNKS ? 1 : chunks);
    share_out(second, left > FEW_CHUNKS ? thread_count() : 1);
    return 0;
}
}
