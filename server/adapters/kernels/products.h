// Small matrix products that are added to: a few rows of inputs with one program's weights, which are read once for all of them.
//
// ``a`` has m rows lda apart, ``c`` has m rows of floats ldc apart; a row of c depends on its own row of a alone, and is
// the same bit for bit whatever m is: every sum has one order, also where no vector fits (``fma``, which a compiler rounds in one way only). Tiles are two rows by four
// vectors: eight sums hide the latency of a multiplication, and they and what they are made of fit sixteen registers.
#pragma once
#include <cmath>

#include "simd.h"

template <int M, int N, typename A, typename B>
inline void transposed_tile(const A* a, int64_t lda, const B* b, int64_t k, float* c, int64_t ldc) {
    Vector sums[M][N] = {};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        Vector left[M];
        for (int row = 0; row < M; ++row) left[row] = load(a + row * lda + i);
        for (int column = 0; column < N; ++column) {
            const Vector right = load(b + column * k + i);
            for (int row = 0; row < M; ++row) sums[row][column] = multiply_add(left[row], right, sums[row][column]);
        }
    }
    for (int row = 0; row < M; ++row)
        for (int column = 0; column < N; ++column) {
            float total = sum(sums[row][column]);
            for (int64_t j = i; j < k; ++j) total = std::fma(widen(a[row * lda + j]), widen(b[column * k + j]), total);
            c[row * ldc + column] += total;
        }
}

template <int N, typename A, typename B>
inline void transposed_rows(const A* a, int64_t m, int64_t lda, const B* b, int64_t k, float* c, int64_t ldc) {
    for (; m >= 2; m -= 2, a += 2 * lda, c += 2 * ldc) transposed_tile<2, N>(a, lda, b, k, c, ldc);
    if (m) transposed_tile<1, N>(a, lda, b, k, c, ldc);
}

// c (m, n) += a (m, k) . b (n, k)^T
template <typename A, typename B>
inline void add_transposed(const A* a, int64_t m, int64_t lda, const B* b, int64_t n, int64_t k, float* c, int64_t ldc) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) transposed_rows<4>(a, m, lda, b + j * k, k, c + j, ldc);
    for (; j < n; ++j) transposed_rows<1>(a, m, lda, b + j * k, k, c + j, ldc);
}

template <int M, int N, typename A, typename B>
inline void product_tile(const A* a, int64_t lda, const B* b, int64_t ldb, int64_t k, float* c, int64_t ldc) {
    Vector sums[M][N];
    for (int row = 0; row < M; ++row)
        for (int part = 0; part < N; ++part) sums[row][part] = load(c + row * ldc + part * LANES);
    for (int64_t i = 0; i < k; ++i) {
        Vector left[M];
        for (int row = 0; row < M; ++row) left[row] = splat(widen(a[row * lda + i]));
        for (int part = 0; part < N; ++part) {
            const Vector right = load(b + i * ldb + part * LANES);
            for (int row = 0; row < M; ++row) sums[row][part] = multiply_add(left[row], right, sums[row][part]);
        }
    }
    for (int row = 0; row < M; ++row)
        for (int part = 0; part < N; ++part) store(c + row * ldc + part * LANES, sums[row][part]);
}

template <int N, typename A, typename B>
inline void product_rows(const A* a, int64_t m, int64_t lda, const B* b, int64_t ldb, int64_t k, float* c, int64_t ldc) {
    for (; m >= 2; m -= 2, a += 2 * lda, c += 2 * ldc) product_tile<2, N>(a, lda, b, ldb, k, c, ldc);
    if (m) product_tile<1, N>(a, lda, b, ldb, k, c, ldc);
}

// c (m, n) += a (m, k) . b (k, n)
template <typename A, typename B>
inline void add_product(const A* a, int64_t m, int64_t lda, const B* b, int64_t n, int64_t k, float* c, int64_t ldc) {
    int64_t j = 0;
    for (; j + 4 * LANES <= n; j += 4 * LANES) product_rows<4>(a, m, lda, b + j, n, k, c + j, ldc);
    for (; j + LANES <= n; j += LANES) product_rows<1>(a, m, lda, b + j, n, k, c + j, ldc);
    for (; j < n; ++j)
        for (int64_t row = 0; row < m; ++row)
            for (int64_t i = 0; i < k; ++i) c[row * ldc + j] = std::fma(widen(a[row * lda + i]), widen(b[i * n + j]), c[row * ldc + j]);
}
