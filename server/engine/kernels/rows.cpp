// What a layer does to each row on its own between two linears: the root-mean-square norm, the gated activation, the sum with the residual
// stream, and the rotation of queries and keys. Arithmetic is fp32. OpenMP symbols come from the runtime that PyTorch has already loaded.
#include <cmath>

#include "exponential.h"
#include "simd.h"

namespace {

template <typename T>
void rms_norm(const T* x, const float* weight, T* y, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for if (rows > 64)
    for (int64_t row = 0; row < rows; ++row) {
        const T* from = x + row * width;
        T* to = y + row * width;
        Vector squares{};
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            const Vector value = load(from + i);
            squares += value * value;
        }
        float total = sum(squares);
        for (; i < width; ++i) total += widen(from[i]) * widen(from[i]);
        const float scale = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
        for (i = 0; i + LANES <= width; i += LANES) store(to + i, load(from + i) * scale * load(weight + i));
        for (; i < width; ++i) narrow(widen(from[i]) * scale * weight[i], to + i);
    }
}

inline Vector silu(Vector x) { return x / (exponential(-x) + 1.0f); }

// y = silu(gate) * up, which may be gate itself
template <typename T>
void silu_mul(const T* gate, const T* up, T* y, int64_t count) {
    constexpr int64_t PIECE = 4096;
#pragma omp parallel for if (count > 8 * PIECE)
    for (int64_t piece = 0; piece < (count + PIECE - 1) / PIECE; ++piece) {
        const int64_t end = count < (piece + 1) * PIECE ? count : (piece + 1) * PIECE;
        int64_t i = piece * PIECE;
        for (; i + LANES <= end; i += LANES) store(y + i, silu(load(gate + i)) * load(up + i));
        if (i < end) {
            // The rest as a vector too: a number's result must not depend on where it lies.
            float rest[LANES] = {};
            for (int64_t lane = 0; i + lane < end; ++lane) rest[lane] = widen(gate[i + lane]);
            store(rest, silu(load(rest)));
            for (int64_t lane = 0; i + lane < end; ++lane) narrow(rest[lane] * widen(up[i + lane]), y + i + lane);
        }
    }
}

// y = a + b, and y may be either of them.
template <typename T>
void add(const T* a, const T* b, T* y, int64_t count) {
#pragma omp parallel for if (count > 65536)
    for (int64_t i = 0; i < count; ++i) narrow(widen(a[i]) + widen(b[i]), y + i);
}

// x (rows, heads, width) → to: pairs of the two halves turned by the row's angles. Where `to` puts a row is the caller's business.
template <typename T>
void rotate(const T* x, const T* cosines, const T* sines, T* to, int64_t width) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float first = widen(x[i]), second = widen(x[half + i]);
        narrow(first * widen(cosines[i]) - second * widen(sines[i]), to + i);
        narrow(second * widen(cosines[half + i]) + first * widen(sines[half + i]), to + half + i);
    }
}

template <typename T>
void rotate_and_keep(T* query, const T* key, const T* value, const T* cosines, const T* sines, T* keys, T* values, const int64_t* kv_slots, int64_t rows,
                     int64_t heads, int64_t kv_heads, int64_t width, int64_t num_slots) {
#pragma omp parallel for if (rows > 16)
    for (int64_t row = 0; row < rows; ++row) {
        const T *c = cosines + row * width, *s = sines + row * width;
        for (int64_t head = 0; head < heads; ++head) {
            T* here = query + (row * heads + head) * width;
            rotate(here, c, s, here, width);
        }
        for (int64_t head = 0; head < kv_heads; ++head) {
            const int64_t from = (row * kv_heads + head) * width, to = (head * num_slots + kv_slots[row]) * width;
            rotate(key + from, c, s, keys + to, width);
            std::memcpy(values + to, value + from, width * sizeof(T));
        }
    }
}

}  // namespace

// x and y (rows, width), weight (width,) fp32, all contiguous.
extern "C" void rms_norm_f32(const float* x, const float* weight, float* y, int64_t rows, int64_t width, float eps) { rms_norm(x, weight, y, rows, width, eps); }
extern "C" void rms_norm_bf16(const BFloat16* x, const float* weight, BFloat16* y, int64_t rows, int64_t width, float eps) { rms_norm(x, weight, y, rows, width, eps); }

// gate, up and y, or a, b and y, hold `count` numbers each.
extern "C" void silu_mul_f32(const float* gate, const float* up, float* y, int64_t count) { silu_mul(gate, up, y, count); }
extern "C" void silu_mul_bf16(const BFloat16* gate, const BFloat16* up, BFloat16* y, int64_t count) { silu_mul(gate, up, y, count); }
extern "C" void add_f32(const float* a, const float* b, float* y, int64_t count) { add(a, b, y, count); }
extern "C" void add_bf16(const BFloat16* a, const BFloat16* b, BFloat16* y, int64_t count) { add(a, b, y, count); }

// query (rows, heads, width) is rotated in place; key and value (rows, kv_heads, width) go, the former rotated, to kv_slots (rows,) of the
// caches (kv_heads, num_slots, width). cosines and sines (rows, width). All contiguous.
#define ROTATE(NAME, T)                                                                                                                          \
    extern "C" void NAME(T* query, const T* key, const T* value, const T* cosines, const T* sines, T* keys, T* values, const int64_t* kv_slots,  \
                         int64_t rows, int64_t heads, int64_t kv_heads, int64_t width, int64_t num_slots) {                                      \
        rotate_and_keep(query, key, value, cosines, sines, keys, values, kv_slots, rows, heads, kv_heads, width, num_slots);                     \
    }
ROTATE(rotate_and_keep_f32, float)
ROTATE(rotate_and_keep_bf16, BFloat16)
