// What programs do at a linear: their terms on their own rows, weights read where they lie. The meaning is ir.LinearEdit's.
//
// fp32 and bf16, computed in fp32; a low rank's matrices may be bf16 beside fp32 rows. A row is computed from itself and its own program
// alone, so that a row's NaN stays its own. OpenMP symbols come from the runtime that PyTorch has already loaded.
#include "pieces.h"
#include "products.h"
#include "rows.h"

namespace {

// One program's edit at one linear, as native_linear.py lays it out; addresses are null where there is no such term.
template <typename T>
struct Terms {
    const float *in_scale, *out_scale, *shift, *pair_scale;
    int64_t pair_group;
    const void *down, *up;  // T, or bf16
    int64_t rank, is_bf16;
    const T* rotation;
    int64_t block, is_shared;
    const T *dense, *left, *right;
    int64_t left_rows, left_columns;

    int64_t weights(int64_t in, int64_t out) const {
        const int64_t rotated = rotation ? in * block : 0;
        const int64_t dense_size = dense ? in * out : 0;
        const int64_t factors = left ? in * (out / left_rows) + left_rows * left_columns * (out / left_rows) : 0;
        return in + out + rank * (in + out) + rotated + dense_size + factors;
    }
};

template <typename T, typename X>
void rotate(const Terms<T>& terms, const X* x, float* rotated, int64_t rows, int64_t in) {
    const int64_t block = terms.block;
    std::fill(rotated, rotated + rows * in, 0.0f);
    for (int64_t i = 0; i < in; i += block)
        add_product(x + i, rows, in, terms.rotation + (terms.is_shared ? 0 : i * block), block, block, rotated + i, in);
}

// out = rotate(in_scale * x)
template <typename T>
void transform(const Terms<T>& terms, const T* x, T* out, int64_t rows, int64_t in) {
    const int64_t size = rows * in, held = held_size(out, size);
    float* scaled = scratch(held + size);
    float* made = writable(out, scaled + size);
    if (terms.in_scale) {
        float* to = terms.rotation ? scaled : made;
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t i = 0; i < in; ++i) to[row * in + i] = terms.in_scale[i] * widen(x[row * in + i]);
        if (terms.rotation) rotate(terms, scaled, made, rows, in);
    } else {
        rotate(terms, x, made, rows, in);
    }
    close_rows(made, size, out);
}

// z = out_scale * z + pair_scale * swap(z) + shift
template <typename T>
void scale(const Terms<T>& terms, float* z, int64_t out) {
    const float *scales = terms.out_scale, *pairs = terms.pair_scale, *shift = terms.shift;
    if (pairs) {
        const int64_t half = terms.pair_group / 2;
        for (int64_t group = 0; group < out; group += 2 * half)
#pragma omp simd
            for (int64_t i = group; i < group + half; ++i) {
                const int64_t j = i + half;
                const float first = z[i], second = z[j];
                z[i] = (scales ? scales[i] * first : first) - pairs[i] * second;
                z[j] = (scales ? scales[j] * second : second) + pairs[j] * first;
            }
    } else if (scales) {
        for (int64_t i = 0; i < out; ++i) z[i] *= scales[i];
    }
    if (shift)
        for (int64_t i = 0; i < out; ++i) z[i] += shift[i];
}

template <typename W, typename T>
void add_low_rank(const W* down, const W* up, int64_t rank, const T* x, float* inner, float* sums, int64_t rows, int64_t in, int64_t out) {
    std::fill(inner, inner + rows * rank, 0.0f);
    add_transposed(x, rows, in, down, rank, in, inner, rank);
    add_product(inner, rows, rank, up, out, rank, sums, out);
}

template <typename T>
void add_terms(const Terms<T>& terms, const T* x, T* y, int64_t rows, int64_t in, int64_t out) {
    const int64_t held = held_size(y, rows * out), right_rows = terms.left ? out / terms.left_rows : 0;
    float* sums = scratch(held + rows * terms.rank + terms.left_columns * right_rows);
    float* inner = sums + held;
    sums = open_rows(y, rows * out, sums);
    if (terms.out_scale || terms.pair_scale || terms.shift)
        for (int64_t row = 0; row < rows; ++row) scale(terms, sums + row * out, out);
    const auto low_rank = [&](auto* down, auto* up) { add_low_rank(down, up, terms.rank, x, inner, sums, rows, in, out); };
    if (terms.is_bf16)
        low_rank(static_cast<const BFloat16*>(terms.down), static_cast<const BFloat16*>(terms.up));
    else
        low_rank(static_cast<const T*>(terms.down), static_cast<const T*>(terms.up));
    if (terms.dense) add_transposed(x, rows, in, terms.dense, out, in, sums, out);
    if (terms.left) {
        const int64_t columns = in / terms.left_columns;
        float* made = inner + rows * terms.rank;
        for (int64_t row = 0; row < rows; ++row) {
            std::fill(made, made + terms.left_columns * right_rows, 0.0f);
            add_transposed(x + row * in, terms.left_columns, columns, terms.right, right_rows, columns, made, right_rows);
            add_product(terms.left, terms.left_rows, terms.left_columns, made, right_rows, terms.left_columns, sums + row * out, right_rows);
        }
    }
    close_rows(sums, rows * out, y);
}

template <typename T>
bool is_worth_threads(const std::vector<Piece>& pieces, const Terms<T>* terms, int64_t in, int64_t out) {
    int64_t work = 0;
    for (const Piece& piece : pieces) work += (piece.end - piece.start) * (piece.run == NOBODY ? in : terms[piece.run].weights(in, out));
    return pieces.size() > 1 && work > WORTH_THREADS;
}

template <typename T>
void before(const T* x, T* out, int64_t num_rows, int64_t in, int64_t count, const int64_t* bounds, const Terms<T>* terms) {
    const std::vector<Piece> pieces = cut_runs(bounds, count, num_rows, true);
    const int64_t size = pieces.size();
#pragma omp parallel for schedule(dynamic, 1) if (is_worth_threads(pieces, terms, in, 0))
    for (int64_t i = 0; i < size; ++i) {
        const Piece& piece = pieces[i];
        const T* from = x + piece.start * in;
        T* to = out + piece.start * in;
        const int64_t rows = piece.end - piece.start;
        if (piece.run == NOBODY)
            std::copy(from, from + rows * in, to);
        else
            transform(terms[piece.run], from, to, rows, in);
    }
}

template <typename T>
void after(const T* x, T* y, int64_t num_rows, int64_t in, int64_t out, int64_t count, const int64_t* bounds, const Terms<T>* terms) {
    const std::vector<Piece> pieces = cut_runs(bounds, count, num_rows, false);
    const int64_t size = pieces.size();
#pragma omp parallel for schedule(dynamic, 1) if (is_worth_threads(pieces, terms, in, out))
    for (int64_t i = 0; i < size; ++i) {
        const Piece& piece = pieces[i];
        add_terms(terms[piece.run], x + piece.start * in, y + piece.start * out, piece.end - piece.start, in, out);
    }
}

}  // namespace

// out (num_rows, in) = what the base's linear is to read: of run i, rotate(in_scale * x) by terms[i]; of all other rows, x as it is.
extern "C" void linear_before_f32(const float* x, float* out, int64_t num_rows, int64_t in, int64_t count, const int64_t* bounds, const void* terms) {
    before(x, out, num_rows, in, count, bounds, static_cast<const Terms<float>*>(terms));
}
extern "C" void linear_before_bf16(const BFloat16* x, BFloat16* out, int64_t num_rows, int64_t in, int64_t count, const int64_t* bounds, const void* terms) {
    before(x, out, num_rows, in, count, bounds, static_cast<const Terms<BFloat16>*>(terms));
}

// y (num_rows, out), the base's output, is changed in place: run i's rows by the remaining terms of terms[i] on x (num_rows, in), before any of this.
extern "C" void linear_after_f32(const float* x, float* y, int64_t num_rows, int64_t in, int64_t out, int64_t count, const int64_t* bounds, const void* terms) {
    after(x, y, num_rows, in, out, count, bounds, static_cast<const Terms<float>*>(terms));
}
extern "C" void linear_after_bf16(const BFloat16* x, BFloat16* y, int64_t num_rows, int64_t in, int64_t out, int64_t count, const int64_t* bounds, const void* terms) {
    after(x, y, num_rows, in, out, count, bounds, static_cast<const Terms<BFloat16>*>(terms));
}
