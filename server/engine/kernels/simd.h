// Vectors of fp32 as wide as the machine has them, in the compiler's own vector types: one source for all processors.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __FMA__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif

// 16 registers allow 6 rows of 2 vectors beside the operands, 32 allow 12.
constexpr int64_t MAX_TILE_ROWS = LANES == 16 ? 12 : 6;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t VecInt __attribute__((vector_size(LANES * 4)));
typedef uint32_t VecBits __attribute__((vector_size(LANES * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(LANES * 2)));
// The same in memory, at any address.
typedef float VecAt __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t VecBitsAt __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t VecHalfAt __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

struct BFloat16 {
    uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
inline void narrow(float value, float* out) { *out = value; }
inline void narrow(float value, BFloat16* out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    // Round to nearest even, as PyTorch does.
    out->bits = is_nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline Vec load(const float* at) { return *reinterpret_cast<const VecAt*>(at); }
inline Vec load(const BFloat16* at) {
    const VecHalf half = *reinterpret_cast<const VecHalfAt*>(at);
    return reinterpret_cast<Vec>(__builtin_convertvector(half, VecBits) << 16);
}
inline void store(Vec value, float* at) { *reinterpret_cast<VecAt*>(at) = value; }
inline void store(Vec value, BFloat16* at) {
    for (int64_t lane = 0; lane < LANES; ++lane) narrow(value[lane], at + lane);
}

// a * b + c, rounded once wherever the processor can: left to the compiler, which of two loops does so is its choice, and with it the last bit.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// x - 0 is x for every x, which the compiler knows; x + 0 is not (of -0).
inline Vec splat(float value) { return value - Vec{}; }

typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec4 __attribute__((vector_size(16)));

#if defined(__AVX512F__)
inline Vec8 fold(Vec value) {
    return __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
}
#else
inline Vec8 fold(Vec value) { return value; }
#endif

// The sums of four vectors' lanes, each in the same order.
inline Vec4 sums(Vec a, Vec b, Vec c, Vec d) {
    const Vec8 e = fold(a), f = fold(b), g = fold(c), h = fold(d);
    const Vec8 ef = __builtin_shufflevector(e, f, 0, 8, 2, 10, 4, 12, 6, 14) + __builtin_shufflevector(e, f, 1, 9, 3, 11, 5, 13, 7, 15);
    const Vec8 gh = __builtin_shufflevector(g, h, 0, 8, 2, 10, 4, 12, 6, 14) + __builtin_shufflevector(g, h, 1, 9, 3, 11, 5, 13, 7, 15);
    const Vec8 all = __builtin_shufflevector(ef, gh, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(ef, gh, 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(all, all, 0, 1, 2, 3) + __builtin_shufflevector(all, all, 4, 5, 6, 7);
}
inline float sum(Vec value) { return sums(value, value, value, value)[0]; }

// e^x to about 2 units in the last place: 2^n · e^r with |r| <= ln(2)/2, the polynomial of Cephes' expf. NaN stays NaN, below -87.3 is 0.
inline Vec exponential(Vec x) {
    const VecInt is_low = x < -87.3f, is_high = x > 88.3f;
    const Vec scaled = x * 1.44269504088896341f;
    const Vec bounded = is_low | is_high | (x != x) ? Vec{} : scaled;
    const VecInt n = __builtin_convertvector(bounded + (bounded < 0 ? splat(-0.5f) : splat(0.5f)), VecInt);
    const Vec whole = __builtin_convertvector(n, Vec);
    const Vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const Vec value = (p * r * r + r + 1.0f) * reinterpret_cast<Vec>((n + 127) << 23);
    return x != x ? x : (is_low ? Vec{} : (is_high ? splat(__builtin_inff()) : value));
}
