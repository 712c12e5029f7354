// Products with one input, whose outputs threads share or have to themselves.
#pragma once

#include <algorithm>

#include "product.h"

namespace core_kernels { namespace {

constexpr int64_t SMALL_PRODUCTS = 1 << 13;  // multiply-adds that one thread has to itself

struct Products {
    Product parts[3];
    int64_t count = 0, chunk = 0, chunks = 0;

    // The weight is taken as it is for `of` rows, of which these are `rows`.
    void add(const void* ready, int64_t rows, int64_t of) {
        if (ready) parts[count++] = {&static_cast<const Ready*>(ready)->of(of), rows, nullptr, nullptr};
    }
    int64_t outputs() const {
        int64_t found = 0;
        for (int64_t i = 0; i < count; i++) found += parts[i].outputs();
        return found;
    }
    int64_t floats() const {
        int64_t found = 0;
        for (int64_t i = 0; i < count; i++) found += (parts[i].floats() + 15) / 16 * 16;
        return found;
    }
    int64_t x_rows() const {
        int64_t found = 1;
        for (int64_t i = 0; i < count; i++) found = std::max(found, parts[i].x_rows());
        return found;
    }
    bool are_tiled() const {
        return std::any_of(parts, parts + count, [](const Product& part) { return part.tiled(); });
    }
    // `out`: a buffer for each part, one behind the other, of `of` rows.
    void place(float* memory, float* out, int64_t of) {
        for (int64_t i = 0; i < count; i++) {
            parts[i].memory = memory, parts[i].out = out;
            memory += (parts[i].floats() + 15) / 16 * 16;
            out += of * parts[i].outputs();
        }
    }
    void cut(int threads) {
        int64_t work = 0;
        for (int64_t i = 0; i < count; i++) work += parts[i].rows * parts[i].outputs() * parts[i].inputs();
        const int64_t even = outputs() / (int64_t(threads) * 8) / 32 * 32;
        chunk = threads == 1 || work <= SMALL_PRODUCTS ? outputs() : std::min<int64_t>(std::max<int64_t>(even, 32), 1024);
        for (int64_t i = 0; i < count; i++) chunks += (parts[i].outputs() + chunk - 1) / chunk;
        if (chunk == outputs()) chunks = 1;
    }
    // `offset`: of the memory for x from where it was placed.
    void prepare(const float* x, int64_t first, int64_t last, int64_t offset) const {
        for (int64_t i = 0; i < count; i++) parts[i].at(offset).prepare(x, first, last);
    }
    void multiply(int64_t at, Stretch after, int64_t offset) const {
        for (int64_t i = 0; i < count; i++) {
            const int64_t mine = (parts[i].outputs() + chunk - 1) / chunk;
            const Product part = parts[i].at(offset);
            if (chunks == 1) part.multiply(0, part.outputs(), after);
            else if (at >= 0 && at < mine) part.multiply(at * chunk, std::min((at + 1) * chunk, part.outputs()), after);
            at -= mine;
        }
    }
    // Gates and what they are multiplied with, side by side in one product or in two: a chunk has some columns of both.
    int64_t inner() const { return outputs() / 2; }
    void cut_pairs(int threads) {
        cut(threads);
        chunk = chunks == 1 ? inner() : std::min<int64_t>(std::max<int64_t>(inner() / (int64_t(threads) * 8) / 32 * 32, 32), 1024);
        chunks = (inner() + chunk - 1) / chunk;
    }
    void multiply_pair(int64_t at, Stretch after, int64_t offset) const {
        const int64_t first = at * chunk, last = std::min(first + chunk, inner()), second = count == 1 ? inner() : 0;
        const Product gate = parts[0].at(offset), up = parts[count - 1].at(offset);
        gate.multiply(first, last, codes_of(up.ready->plan.weight, second + first, second + last));
        up.multiply(second + first, second + last, after);
    }
    // What a chunk reads first.
    Stretch codes(int64_t at) const {
        for (int64_t i = 0; i < count; i++) {
            const int64_t mine = (parts[i].outputs() + chunk - 1) / chunk;
            if (at < mine) return codes_of(parts[i].ready->plan.weight, at * chunk, std::min((at + 1) * chunk, parts[i].outputs()));
            at -= mine;
        }
        return {};
    }
};

}}  // namespace core_kernels
