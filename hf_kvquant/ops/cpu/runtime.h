// Threads, and memory that they keep.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "vectors.h"

namespace {

template <class Work>
void in_parallel(int64_t num_items, int64_t num_threads, Work work) {
    std::atomic<int64_t> next{0};
    auto take = [&] {
        for (int64_t i; (i = next++) < num_items;) work(i);
    };
    num_threads = std::min(num_threads, num_items);
    if (num_threads <= 1) return take();
#pragma omp parallel num_threads(num_threads)
    take();
}

// Memory of a thread that stays from call to call.
struct Workspace {
    char* start = nullptr;
    size_t size = 0;
    ~Workspace() { std::free(start); }
    char* of(size_t bytes) {
        if (bytes > size) {
            std::free(start);
            size = (bytes + bytes / 4 + 4095) & ~size_t(4095);
            start = static_cast<char*>(std::aligned_alloc(64, size));
            if (!start) std::abort();
        }
        return start;
    }
};
struct Carver {
    char* at;
    size_t used = 0;
    template <class T>
    T* take(int64_t count) {
        T* start = reinterpret_cast<T*>(at + used);
        used += (count * sizeof(T) + 63) & ~size_t(63);
        return start;
    }
};

INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
INLINE int64_t floor_mod(int64_t x, int64_t m) { return (x % m + m) % m; }
INLINE int64_t floor_div(int64_t x, int64_t m) { return (x - floor_mod(x, m)) / m; }

}  // namespace
