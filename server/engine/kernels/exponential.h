// e^x of vectors.
#pragma once
#include "simd.h"

typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

// e^x to about 2 units in the last place: 2^n · e^r with |r| <= ln(2)/2, the polynomial of Cephes' expf. NaN stays NaN, below -87.3 is 0.
inline Vector exponential(Vector x) {
    const Integers is_low = x < -87.3f, is_high = x > 88.3f;
    const Vector scaled = x * 1.44269504088896341f;
    const Vector bounded = is_low | is_high | (x != x) ? Vector{} : scaled;
    const Integers n = __builtin_convertvector(bounded + (bounded < 0 ? splat(-0.5f) : splat(0.5f)), Integers);
    const Vector whole = __builtin_convertvector(n, Vector);
    const Vector r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vector p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const Vector value = (p * r * r + r + 1.0f) * reinterpret_cast<Vector>((n + 127) << 23);
    return x != x ? x : (is_low ? Vector{} : (is_high ? splat(__builtin_inff()) : value));
}
