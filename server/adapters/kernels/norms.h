// The norm of one vector of floats, in place: RMS norms as they are, layer norms with ``is_centered``. Some families add an offset to the weight.
#pragma once
#include <cmath>

#include "simd.h"

template <typename W>
inline void normalize(float* x, int64_t width, const W* weight, const W* bias, bool is_centered, float offset, float eps) {
    float total = 0, squares = 0;
    if (is_centered)
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < width; ++i) total += x[i];
    const float mean = total / width;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(squares / width + eps);
    for (int64_t i = 0; i < width; ++i) x[i] = (x[i] - mean) * scale * (widen(weight[i]) + offset);
    if (bias)
        for (int64_t i = 0; i < width; ++i) x[i] += widen(bias[i]);
}
