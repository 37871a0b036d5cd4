// Vectors of floats as wide as the processor's, and the two types that numbers come in; everything is computed in fp32. For all native kernels,
// the base's too: the build looks for headers here.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__FMA__)
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define MEDLEY_LANES 16
#else
#define MEDLEY_LANES 8
#endif

constexpr int64_t LANES = MEDLEY_LANES;
typedef float Vector __attribute__((vector_size(MEDLEY_LANES * 4)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Quad __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(MEDLEY_LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(MEDLEY_LANES * 2)));
// The same in memory, at any address.
typedef uint32_t WordsAt __attribute__((vector_size(MEDLEY_LANES * 4), aligned(4), may_alias));
typedef float VectorAt __attribute__((vector_size(MEDLEY_LANES * 4), aligned(4), may_alias));
typedef uint16_t HalvesAt __attribute__((vector_size(MEDLEY_LANES * 2), aligned(2), may_alias));

// Before a loop over an array of vectors, which GCC keeps in registers only where every index is a constant.
#define UNROLLED _Pragma("GCC unroll 16")

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

inline Vector load(const float* from) { return *reinterpret_cast<const VectorAt*>(from); }
inline Vector load(const BFloat16* from) {
    // By name, since GCC makes five instructions of a conversion that is one.
#if defined(__AVX512F__)
    return reinterpret_cast<Vector>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
#elif defined(__AVX2__)
    return reinterpret_cast<Vector>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16));
#else
    const Halves halves = *reinterpret_cast<const HalvesAt*>(from);
    return reinterpret_cast<Vector>(__builtin_convertvector(halves, Words) << 16);
#endif
}
inline void store(float* to, Vector values) { *reinterpret_cast<VectorAt*>(to) = values; }
inline void store(BFloat16* to, Vector values) {
    for (int64_t lane = 0; lane < LANES; ++lane) narrow(values[lane], to + lane);
}

// A vector that stays in a register: GCC would read one that many multiplications use from memory again for each of them.
inline Vector held(Vector value) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(value));
#elif defined(__FMA__)
    __asm__("" : "+x"(value));
#endif
    return value;
}

// x - 0 is x for every x, which the compiler knows; x + 0 is not (of -0).
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

#if defined(__AVX512F__)
inline Eight fold(Vector value) {
    return __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
}
#else
inline Eight fold(Vector value) { return value; }
#endif

// The lanes of each of four vectors added up, every one in the same order.
inline Quad sums(Vector a, Vector b, Vector c, Vector d) {
    const Eight e = fold(a), f = fold(b), g = fold(c), h = fold(d);
    const Eight ef = __builtin_shufflevector(e, f, 0, 8, 2, 10, 4, 12, 6, 14) + __builtin_shufflevector(e, f, 1, 9, 3, 11, 5, 13, 7, 15);
    const Eight gh = __builtin_shufflevector(g, h, 0, 8, 2, 10, 4, 12, 6, 14) + __builtin_shufflevector(g, h, 1, 9, 3, 11, 5, 13, 7, 15);
    const Eight all = __builtin_shufflevector(ef, gh, 0, 1, 8, 9, 4, 5, 12, 13) + __builtin_shufflevector(ef, gh, 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(all, all, 0, 1, 2, 3) + __builtin_shufflevector(all, all, 4, 5, 6, 7);
}
inline float sum(Vector values) { return sums(values, values, values, values)[0]; }
