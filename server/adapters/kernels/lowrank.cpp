// The low-rank term for rows of many programs, read from the arena in place: y[row] += act(x[row] . down^T + bias) . up.
//
// Built by native.py with the machine's own compiler; fp32 and bf16, accumulated in fp32. Rows are independent, so that a row's
// NaN stays its own. OpenMP symbols come from the runtime that PyTorch has already loaded.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct BFloat16 {
    uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) {
    uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
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

// Codes as in native.py.
inline float activate(float x, int64_t code) {
    switch (code) {
        case 1: return x < 0 ? 0 : x;  // NaN stays NaN
        case 2: return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
        case 3: return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case 4: return x / (1.0f + std::exp(-x));
        case 5: return std::tanh(x);
        default: return x;
    }
}

template <typename T>
void one_row(const T* down, const T* up, const T* bias, const T* x, T* y, int64_t in, int64_t out, int64_t rank, int64_t activation,
             std::vector<float>& scratch) {
    scratch.resize(in + out + rank);
    float* wide = scratch.data();
    float* sum = wide + in;
    float* inner = sum + out;
#pragma omp simd
    for (int64_t i = 0; i < in; ++i) wide[i] = widen(x[i]);
    int64_t j = 0;
    for (; j + 4 <= rank; j += 4) {
        const T *a = down + j * in, *b = a + in, *c = b + in, *d = c + in;
        float sa = 0, sb = 0, sc = 0, sd = 0;
#pragma omp simd reduction(+ : sa, sb, sc, sd)
        for (int64_t i = 0; i < in; ++i) {
            sa += widen(a[i]) * wide[i];
            sb += widen(b[i]) * wide[i];
            sc += widen(c[i]) * wide[i];
            sd += widen(d[i]) * wide[i];
        }
        inner[j] = sa, inner[j + 1] = sb, inner[j + 2] = sc, inner[j + 3] = sd;
    }
    for (; j < rank; ++j) {
        float s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t i = 0; i < in; ++i) s += widen(down[j * in + i]) * wide[i];
        inner[j] = s;
    }
    if (bias)
        for (j = 0; j < rank; ++j) inner[j] += widen(bias[j]);
    if (activation)
        for (j = 0; j < rank; ++j) inner[j] = activate(inner[j], activation);
    for (int64_t o = 0; o < out; ++o) sum[o] = 0;
    for (j = 0; j + 4 <= rank; j += 4) {
        const T *a = up + j * out, *b = a + out, *c = b + out, *d = c + out;
        const float sa = inner[j], sb = inner[j + 1], sc = inner[j + 2], sd = inner[j + 3];
#pragma omp simd
        for (int64_t o = 0; o < out; ++o)
            sum[o] += sa * widen(a[o]) + sb * widen(b[o]) + sc * widen(c[o]) + sd * widen(d[o]);
    }
    for (; j < rank; ++j) {
        const float s = inner[j];
#pragma omp simd
        for (int64_t o = 0; o < out; ++o) sum[o] += s * widen(up[j * out + o]);
    }
#pragma omp simd
    for (int64_t o = 0; o < out; ++o) narrow(widen(y[o]) + sum[o], y + o);
}

template <typename T>
void all_rows(const T* downs, const T* ups, const T* x, T* y, int64_t count, int64_t in, int64_t out, const int64_t* rows, const int64_t* down,
              const int64_t* up, const int64_t* rank, const int64_t* offset, const T* bias, int64_t activation) {
#pragma omp parallel if (count > 1)
    {
        std::vector<float> scratch;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = rows ? rows[i] : i;
            one_row(downs + down[i] * in, ups + up[i] * out, bias ? bias + offset[i] : nullptr, x + row * in, y + row * out, in, out, rank[i],
                    activation, scratch);
        }
    }
}

}  // namespace

// Row i of the count rows is rows[i] of x (count, in) and y (count, out), both contiguous; down[i] and up[i] are its first rows of
// downs (n, in) and ups (m, out), which are the arena read twice; rank[i] is how many, and its inner biases start at bias[offset[i]].
// rows may be null: all rows in order; bias may be null: none. x may be y: a row is read before it is written.
extern "C" void lowrank_f32(const float* downs, const float* ups, const float* x, float* y, int64_t count, int64_t in, int64_t out, const int64_t* rows,
                            const int64_t* down, const int64_t* up, const int64_t* rank, const int64_t* offset, const float* bias, int64_t activation) {
    all_rows(downs, ups, x, y, count, in, out, rows, down, up, rank, offset, bias, activation);
}

extern "C" void lowrank_bf16(const void* downs, const void* ups, const void* x, void* y, int64_t count, int64_t in, int64_t out, const int64_t* rows,
                             const int64_t* down, const int64_t* up, const int64_t* rank, const int64_t* offset, const void* bias, int64_t activation) {
    all_rows(static_cast<const BFloat16*>(downs), static_cast<const BFloat16*>(ups), static_cast<const BFloat16*>(x), static_cast<BFloat16*>(y), count, in, out, rows,
             down, up, rank, offset, static_cast<const BFloat16*>(bias), activation);
}
