// Rows of a step as floats: where they hold floats they are read and written in place, otherwise by way of a copy.
#pragma once
#include <cstdint>
#include <vector>

#include "simd.h"

inline float* writable(float* rows, float*) { return rows; }
inline float* writable(BFloat16*, float* held) { return held; }

inline float* open_rows(float* rows, int64_t, float*) { return rows; }
inline float* open_rows(const BFloat16* rows, int64_t size, float* held) {
    for (int64_t i = 0; i < size; ++i) held[i] = widen(rows[i]);
    return held;
}
inline void close_rows(const float*, int64_t, float*) {}
inline void close_rows(const float* held, int64_t size, BFloat16* rows) {
    for (int64_t i = 0; i < size; ++i) narrow(held[i], rows + i);
}
// How much ``held`` must hold.
inline int64_t held_size(const float*, int64_t) { return 0; }
inline int64_t held_size(const BFloat16*, int64_t size) { return size; }

// Floats of the calling thread's own, at the start of a cache line, valid until its next call.
inline float* scratch(int64_t size) {
    constexpr int64_t LINE = 64 / sizeof(float);
    static thread_local std::vector<float> held;
    if (static_cast<int64_t>(held.size()) < size + LINE) held.resize(size + LINE);
    const int64_t ahead = reinterpret_cast<uintptr_t>(held.data()) / sizeof(float) % LINE;
    return held.data() + (ahead ? LINE - ahead : 0);
}
