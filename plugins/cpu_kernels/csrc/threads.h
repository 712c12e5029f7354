// The threads of torch's OpenMP runtime, for whoever has work to share out.
#pragma once

namespace core_kernels {

int thread_count();
void on_threads(int threads, void (*work)(void*), void* job);  // calls work(job) on each of them, and waits

}  // namespace core_kernels
