// Norms of rows with parameters of their own. The meaning is ir.NormEdit's.
#include "norms.h"
#include "pieces.h"
#include "rows.h"

namespace {

// One program's parameters at one norm, as native_norm.py lays them out; the bias's address is null where the norm has none.
template <typename T>
struct Parameters {
    const T *weight, *bias;
};

template <typename T>
void all_runs(const T* x, T* y, int64_t num_rows, int64_t vectors, int64_t width, bool is_centered, float offset, float eps, int64_t count,
              const int64_t* bounds, const Parameters<T>* parameters) {
    const std::vector<Piece> pieces = cut_runs(bounds, count, num_rows, false);
    const int64_t size = pieces.size(), row_size = vectors * width;
    int64_t work = 0;
    for (const Piece& piece : pieces) work += (piece.end - piece.start) * row_size;
#pragma omp parallel for schedule(dynamic, 1) if (size > 1 && work > WORTH_THREADS)
    for (int64_t i = 0; i < size; ++i) {
        const Piece& piece = pieces[i];
        const Parameters<T>& own = parameters[piece.run];
        float* row = scratch(width);
        for (int64_t at = piece.start * row_size; at < piece.end * row_size; at += width) {
            for (int64_t j = 0; j < width; ++j) row[j] = widen(x[at + j]);
            normalize(row, width, own.weight, own.bias, is_centered, offset, eps);
            for (int64_t j = 0; j < width; ++j) narrow(row[j], y + at + j);
        }
    }
}

}  // namespace

// Run i's rows of y (num_rows, vectors, width) become the norms of those of x by parameters[i]; other rows are left alone.
extern "C" void norms_f32(const float* x, float* y, int64_t num_rows, int64_t vectors, int64_t width, int64_t is_centered, double offset, double eps,
                          int64_t count, const int64_t* bounds, const void* parameters) {
    all_runs(x, y, num_rows, vectors, width, is_centered, offset, eps, count, bounds, static_cast<const Parameters<float>*>(parameters));
}
extern "C" void norms_bf16(const BFloat16* x, BFloat16* y, int64_t num_rows, int64_t vectors, int64_t width, int64_t is_centered, double offset, double eps,
                           int64_t count, const int64_t* bounds, const void* parameters) {
    all_runs(x, y, num_rows, vectors, width, is_centered, offset, eps, count, bounds, static_cast<const Parameters<BFloat16>*>(parameters));
}
