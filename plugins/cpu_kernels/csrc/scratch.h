// Memory that only grows: one for each thread that needs some.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace core_kernels { namespace {

struct Scratch {
    float* at = nullptr;
    int64_t floats = 0;

    float* get(int64_t wanted) {  // null: there is no memory
        if (wanted <= floats) return at;
        std::free(at);
        floats = (wanted + 1023) / 1024 * 1024;
        at = static_cast<float*>(std::aligned_alloc(64, size_t(floats) * sizeof(float)));
        if (!at) floats = 0;
        return at;
    }
    void give_back() {
        std::free(at);
        at = nullptr, floats = 0;
    }
    ~Scratch() { std::free(at); }
};

}}  // namespace core_kernels
