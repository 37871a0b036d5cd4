// Bottlenecks of many programs at a sub-layer's output, each on its own rows. The meaning is ir.BottleneckEdit's.
#include <cmath>

#include "norms.h"
#include "pieces.h"
#include "products.h"
#include "rows.h"

namespace {

// Codes as in native_bottleneck.py.
enum Stream : int64_t { SUBLAYER, RESIDUAL, SUM, NORMED };

// One program's bottleneck, as native_bottleneck.py lays it out; addresses are null where there is no such part.
template <typename T>
struct Bottleneck {
    const void *down, *up;  // T, or bf16
    int64_t rank, is_bf16;
    const float *down_bias, *up_bias, *before_weight, *before_bias, *after_weight, *after_bias;
    int64_t source, residual, norm_first, activation;
    double weight, eps;
};

// What meets at the sub-layer's output, each (num_rows, hidden); null where no bottleneck reads it.
template <typename T>
struct Streams {
    const T *sublayer, *residual, *normed;
};

template <typename T>
void read(const Streams<T>& streams, int64_t name, int64_t first, int64_t size, float* out) {
    const T* from = name == RESIDUAL ? streams.residual : name == NORMED ? streams.normed : streams.sublayer;
    for (int64_t i = 0; i < size; ++i) out[i] = widen(from[first + i]);
    if (name == SUM)
        for (int64_t i = 0; i < size; ++i) out[i] += widen(streams.residual[first + i]);
}

void norm(float* x, int64_t rows, int64_t hidden, const float* weight, const float* bias, float eps) {
    for (int64_t row = 0; row < rows; ++row) normalize(x + row * hidden, hidden, weight, bias, true, 0.0f, eps);
}

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

// Every row of ``to`` is the vector, or zero where there is none.
void fill(float* to, int64_t rows, int64_t width, const float* vector) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < width; ++i) to[row * width + i] = vector ? vector[i] : 0.0f;
}

template <typename W, typename T>
void run(const Bottleneck<T>& edit, const W* down, const W* up, const Streams<T>& streams, T* t, int64_t start, int64_t rows, int64_t hidden) {
    const int64_t size = rows * hidden, first = start * hidden;
    float* x = scratch(2 * size + rows * edit.rank);
    float* u = x + size;
    float* inner = u + size;
    read(streams, edit.source, first, size, x);
    if (edit.before_weight) norm(x, rows, hidden, edit.before_weight, edit.before_bias, edit.eps);
    fill(inner, rows, edit.rank, edit.down_bias);
    add_transposed(x, rows, hidden, down, edit.rank, hidden, inner, edit.rank);
    for (int64_t i = 0; i < rows * edit.rank; ++i) inner[i] = activate(inner[i], edit.activation);
    fill(u, rows, hidden, edit.up_bias);
    add_product(inner, rows, edit.rank, up, hidden, edit.rank, u, hidden);
    const float weight = edit.weight;
    t += first;
    if (edit.residual == SUBLAYER && !edit.after_weight) {
        for (int64_t i = 0; i < size; ++i) narrow(widen(t[i]) + weight * u[i], t + i);
        return;
    }
    float* residual = x;
    read(streams, edit.residual, first, size, residual);
    if (!edit.norm_first)
        for (int64_t i = 0; i < size; ++i) u[i] += residual[i];
    if (edit.after_weight) norm(u, rows, hidden, edit.after_weight, edit.after_bias, edit.eps);
    if (edit.norm_first)
        for (int64_t i = 0; i < size; ++i) u[i] += residual[i];
    for (int64_t i = 0; i < size; ++i) narrow(widen(t[i]) + weight * (u[i] - widen(streams.sublayer[first + i])), t + i);
}

template <typename T>
void all_runs(T* t, const Streams<T>& streams, int64_t num_rows, int64_t hidden, int64_t count, const int64_t* bounds, const Bottleneck<T>* edits) {
    const std::vector<Piece> pieces = cut_runs(bounds, count, num_rows, false);
    const int64_t size = pieces.size();
    int64_t work = 0;
    for (const Piece& piece : pieces) work += (piece.end - piece.start) * (2 * edits[piece.run].rank + 4) * hidden;
#pragma omp parallel for schedule(dynamic, 1) if (size > 1 && work > WORTH_THREADS)
    for (int64_t i = 0; i < size; ++i) {
        const Piece& piece = pieces[i];
        const Bottleneck<T>& edit = edits[piece.run];
        const auto with = [&](auto* down, auto* up) { run(edit, down, up, streams, t, piece.start, piece.end - piece.start, hidden); };
        if (edit.is_bf16)
            with(static_cast<const BFloat16*>(edit.down), static_cast<const BFloat16*>(edit.up));
        else
            with(static_cast<const T*>(edit.down), static_cast<const T*>(edit.up));
    }
}

}  // namespace

// t (num_rows, hidden), which is not one of the streams, gets run i's difference to the sub-layer's output by edits[i], in place.
extern "C" void bottlenecks_f32(float* t, const float* sublayer, const float* residual, const float* normed, int64_t num_rows, int64_t hidden,
                                int64_t count, const int64_t* bounds, const void* edits) {
    all_runs(t, Streams<float>{sublayer, residual, normed}, num_rows, hidden, count, bounds, static_cast<const Bottleneck<float>*>(edits));
}
extern "C" void bottlenecks_bf16(BFloat16* t, const BFloat16* sublayer, const BFloat16* residual, const BFloat16* normed, int64_t num_rows, int64_t hidden,
                                 int64_t count, const int64_t* bounds, const void* edits) {
    all_runs(t, Streams<BFloat16>{sublayer, residual, normed}, num_rows, hidden, count, bounds, static_cast<const Bottleneck<BFloat16>*>(edits));
}
