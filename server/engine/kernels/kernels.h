// The kernels that blocks are made of, under one name for either type of activations. What they compute is said where they are defined.
#pragma once
#include <cstdint>

#include "simd.h"

extern "C" {
void linear_f32_f32(const float*, const float*, const float*, float*, int64_t, int64_t, int64_t);
void linear_bf16_f32(const float*, const uint32_t*, const float*, float*, int64_t, int64_t, int64_t);
void linear_bf16_bf16(const float*, const uint32_t*, const float*, BFloat16*, int64_t, int64_t, int64_t);
}

#define MEDLEY_KERNELS(SUFFIX, T)                                                                                                               \
    extern "C" void rms_norm_##SUFFIX(const T*, const float*, T*, int64_t, int64_t, float);                                                     \
    extern "C" void silu_mul_##SUFFIX(const T*, const T*, T*, int64_t);                                                                         \
    extern "C" void add_##SUFFIX(const T*, const T*, T*, int64_t);                                                                              \
    extern "C" void rotate_and_keep_##SUFFIX(T*, const T*, const T*, const T*, const T*, T*, T*, const int64_t*, int64_t, int64_t, int64_t,     \
                                             int64_t, int64_t);                                                                                 \
    extern "C" void attention_##SUFFIX(T*, const T*, const T*, const T*, const int32_t*, const int32_t*, const int32_t*, int64_t, int64_t,      \
                                       int64_t, int64_t, int64_t, int64_t, int64_t, float, int64_t, float);                                     \
    template <>                                                                                                                                 \
    struct Kernels<T> {                                                                                                                         \
        static constexpr auto rms_norm = rms_norm_##SUFFIX;                                                                                     \
        static constexpr auto silu_mul = silu_mul_##SUFFIX;                                                                                     \
        static constexpr auto add = add_##SUFFIX;                                                                                               \
        static constexpr auto rotate_and_keep = rotate_and_keep_##SUFFIX;                                                                       \
        static constexpr auto attention = attention_##SUFFIX;                                                                                   \
    };

template <typename T>
struct Kernels;
MEDLEY_KERNELS(f32, float)
MEDLEY_KERNELS(bf16, BFloat16)
