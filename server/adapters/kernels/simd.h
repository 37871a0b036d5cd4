// Vectors of floats as wide as the processor's, and the two types that weights come in; everything is computed in fp32.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __FMA__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define MEDLEY_LANES 16
#else
#define MEDLEY_LANES 8
#endif

constexpr int64_t LANES = MEDLEY_LANES;
typedef float Vector __attribute__((vector_size(MEDLEY_LANES * 4)));
typedef float Quad __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(MEDLEY_LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(MEDLEY_LANES * 2)));

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

inline Vector load(const float* from) {
    Vector values;
    std::memcpy(&values, from, sizeof values);
    return values;
}
inline Vector load(const BFloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    Vector values;
    std::memcpy(&values, &words, sizeof values);
    return values;
}
inline void store(float* to, Vector values) { std::memcpy(to, &values, sizeof values); }

inline Vector splat(float value) { return value - Vector{}; }

// a * b + c, rounded once wherever the processor can: left to the compiler, which of two loops does so is its choice, and with it the last bit.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

inline float sum(Vector values) {
    Quad parts[LANES / 4];
    std::memcpy(parts, &values, sizeof values);
    Quad total = parts[0];
    for (int64_t i = 1; i < LANES / 4; ++i) total += parts[i];
    return (total[0] + total[2]) + (total[1] + total[3]);
}
