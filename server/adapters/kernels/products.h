// Small matrix products that are added to: a few rows of inputs with one program's weights.
//
// ``a`` has m rows lda apart, ``c`` has m rows of floats ldc apart; a row of c depends on its own row of a alone, and is the same bit for bit
// whatever m is and whatever type holds the weights: every sum has one order, also where no vector fits (``fma``, which a compiler rounds in
// one way only). One row is bound by how fast weights come from memory: they are read as several streams side by side, and while the first
// rows are computed, the weights behind are fetched. Many rows are bound by multiplications: tiles keep their sums in registers.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "simd.h"

constexpr int64_t LINE = 64;    // bytes of a cache line
constexpr int64_t STREAMS = 8;  // rows of a wide b that a product reads side by side
constexpr int64_t WIDE = 256;   // from this width on, a row of b is worth a stream of its own
constexpr int COLUMNS = 4;      // rows of b that a transposed product reads side by side
// Rows of a in a tile: so many that its sums fit sixteen registers beside what they are made of.
constexpr int TRANSPOSED_ROWS = 3, PRODUCT_ROWS = 4;

template <int M, typename Work>
inline void tile_of(int64_t height, int64_t first, const Work& work) {
    if (height == M)
        work(std::integral_constant<int, M>{}, first);
    else if constexpr (M > 1)
        tile_of<M - 1>(height, first, work);
}

// work(height, first row) for tiles as high as can be; the last two share what is left, since a low one does not keep the processor busy.
template <int MOST, typename Work>
inline void in_tiles(int64_t m, const Work& work) {
    for (int64_t first = 0; first < m;) {
        const int64_t left = m - first, height = left <= MOST ? left : left < 2 * MOST ? (left + 1) / 2 : MOST;
        tile_of<MOST>(height, first, work);
        first += height;
    }
}

// The weights behind this tile's are fetched meanwhile, if ``fetches``: they lie right behind, or are nobody's and never read.
template <int M, int N, typename A, typename B>
inline void transposed_tile(const A* a, int64_t lda, const B* b, int64_t k, float* c, int64_t ldc, bool fetches) {
    Vector totals[M][N];
    UNROLLED for (int row = 0; row < M; ++row)
        UNROLLED for (int column = 0; column < N; ++column) totals[row][column] = Vector{};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        if (fetches && i % (LINE / sizeof(B)) == 0)
            UNROLLED for (int column = 0; column < N; ++column) __builtin_prefetch(b + (N + column) * k + i);
        Vector left[M];
        UNROLLED for (int row = 0; row < M; ++row) left[row] = load(a + row * lda + i);
        UNROLLED for (int column = 0; column < N; ++column) {
            const Vector right = held(load(b + column * k + i));
            UNROLLED for (int row = 0; row < M; ++row) totals[row][column] = multiply_add(left[row], right, totals[row][column]);
        }
    }
    UNROLLED for (int row = 0; row < M; ++row) {
        const Vector* of = totals[row];
        const Quad found = N == COLUMNS ? sums(of[0], of[1 % N], of[2 % N], of[3 % N]) : Quad{sum(of[0])};
        UNROLLED for (int column = 0; column < N; ++column) {
            float total = found[column];
            for (int64_t j = i; j < k; ++j) total = std::fma(widen(a[row * lda + j]), widen(b[column * k + j]), total);
            c[row * ldc + column] += total;
        }
    }
}

template <int N, typename A, typename B>
inline void transposed_columns(const A* a, int64_t m, int64_t lda, const B* b, int64_t k, float* c, int64_t ldc) {
    in_tiles<TRANSPOSED_ROWS>(m, [=](auto height, int64_t first) {
        transposed_tile<height, N>(a + first * lda, lda, b, k, c + first * ldc, ldc, first == 0);
    });
}

// c (m, n) += a (m, k) . b (n, k)^T
template <typename A, typename B>
inline void add_transposed(const A* a, int64_t m, int64_t lda, const B* b, int64_t n, int64_t k, float* c, int64_t ldc) {
    int64_t j = 0;
    for (; j + COLUMNS <= n; j += COLUMNS) transposed_columns<COLUMNS>(a, m, lda, b + j * k, k, c + j, ldc);
    for (; j < n; ++j) transposed_columns<1>(a, m, lda, b + j * k, k, c + j, ldc);
}

template <int M, int N, typename A, typename B>
inline void product_tile(const A* a, int64_t lda, const B* b, int64_t ldb, int64_t k, float* c, int64_t ldc) {
    Vector totals[M][N];
    UNROLLED for (int row = 0; row < M; ++row)
        UNROLLED for (int part = 0; part < N; ++part) totals[row][part] = load(c + row * ldc + part * LANES);
    for (int64_t i = 0; i < k; ++i) {
        Vector right[N];
        UNROLLED for (int part = 0; part < N; ++part) right[part] = held(load(b + i * ldb + part * LANES));
        UNROLLED for (int row = 0; row < M; ++row) {
            const Vector left = splat(widen(a[row * lda + i]));
            UNROLLED for (int part = 0; part < N; ++part) totals[row][part] = multiply_add(left, right[part], totals[row][part]);
        }
    }
    UNROLLED for (int row = 0; row < M; ++row)
        UNROLLED for (int part = 0; part < N; ++part) store(c + row * ldc + part * LANES, totals[row][part]);
}

// Of the rows of b behind these, ``ahead`` are fetched meanwhile.
template <int M, typename A, typename B>
inline void product_rows(const A* a, int64_t lda, const B* b, int64_t n, int64_t k, float* c, int64_t ldc, int64_t ahead) {
    constexpr int N = M == 1 ? 4 : 2;  // enough sums to hide the latency of a multiplication
    int64_t j = 0;
    for (; j + N * LANES <= n; j += N * LANES) {
        for (int64_t i = 0; i < ahead; ++i)
            for (int64_t line = j; line < j + N * LANES; line += LINE / sizeof(B)) __builtin_prefetch(b + (k + i) * n + line);
        product_tile<M, N>(a, lda, b + j, n, k, c + j, ldc);
    }
    for (; j + LANES <= n; j += LANES) product_tile<M, 1>(a, lda, b + j, n, k, c + j, ldc);
    for (; j < n; ++j)
        for (int64_t row = 0; row < M; ++row)
            for (int64_t i = 0; i < k; ++i) c[row * ldc + j] = std::fma(widen(a[row * lda + i]), widen(b[i * n + j]), c[row * ldc + j]);
}

// c (m, n) += a (m, k) . b (k, n)
template <typename A, typename B>
inline void add_product(const A* a, int64_t m, int64_t lda, const B* b, int64_t n, int64_t k, float* c, int64_t ldc) {
    const int64_t most = n < WIDE ? k : STREAMS;
    for (int64_t i = 0; i < k; i += most) {
        const int64_t streams = std::min(most, k - i);
        in_tiles<PRODUCT_ROWS>(m, [=](auto height, int64_t first) {
            const int64_t ahead = first == 0 && n >= WIDE ? std::min(STREAMS, k - i - streams) : 0;
            product_rows<height>(a + first * lda + i, lda, b + i * n, n, streams, c + first * ldc, ldc, ahead);
        });
    }
}
