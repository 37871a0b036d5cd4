// y (rows, out) = x (rows, in) · weight (out, in)^T + bias, of the frozen base: its weights are packed once, in the order they are read.
//
// Every output is one chain of multiply-adds over `in`, in order, whatever other rows there are and however many: a row's result is the
// same bit for bit alone and packed. Weights that bfloat16 holds exactly are read as such, which halves what a step reads; arithmetic is
// fp32. OpenMP symbols come from the runtime that PyTorch has already loaded.
#include <algorithm>

#include "simd.h"

namespace {

// A panel is this many outputs, interleaved: for each input, two vectors of weights.
constexpr int64_t PANEL = 2 * LANES;
// Rows that stay in the second-level cache while panels go by, and inputs of a panel that stay in the first.
constexpr int64_t BLOCK_ROWS = 96, BLOCK_INPUTS = 256;

struct Pair {
    Vec first, second;
};

inline Pair weights_at(const float* panel, int64_t k) { return {load(panel + k * PANEL), load(panel + k * PANEL + LANES)}; }

// Two bfloat16 in one word, of outputs i and i + LANES: both widen in one operation each.
inline Pair weights_at(const uint32_t* panel, int64_t k) {
    const VecBits words = *reinterpret_cast<const VecBitsAt*>(panel + k * LANES);
    return {reinterpret_cast<Vec>(words << 16), reinterpret_cast<Vec>(words & 0xffff0000u)};
}

inline int64_t panel_elements(const float*, int64_t in) { return in * PANEL; }
inline int64_t panel_elements(const uint32_t*, int64_t in) { return in * LANES; }

// sums (ROWS, PANEL) += x (ROWS, count) · panel (count, PANEL)
template <int ROWS, typename W>
void tile(const float* x, int64_t stride, const W* panel, int64_t count, float* sums) {
    Vec first[ROWS], second[ROWS];
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) first[row] = load(sums + row * PANEL), second[row] = load(sums + row * PANEL + LANES);
    for (int64_t k = 0; k < count; ++k) {
        const Pair w = weights_at(panel, k);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; ++row) {
            const Vec input = splat(x[row * stride + k]);
            first[row] += input * w.first;
            second[row] += input * w.second;
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) store(first[row], sums + row * PANEL), store(second[row], sums + row * PANEL + LANES);
}

template <int ROWS, typename W>
void tile_of(int64_t rows, const float* x, int64_t stride, const W* panel, int64_t count, float* sums) {
    if (rows == ROWS)
        tile<ROWS>(x, stride, panel, count, sums);
    else if constexpr (ROWS > 1)
        tile_of<ROWS - 1>(rows, x, stride, panel, count, sums);
}

template <typename W, typename T>
void linear(const float* x, const W* packed, const float* bias, T* y, int64_t rows, int64_t in, int64_t out) {
    const int64_t panels = (out + PANEL - 1) / PANEL, blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    // Pieces small enough that a thread which the machine holds up leaves its share to the others.
    const int64_t piece = std::max<int64_t>(1, panels * blocks / 32);
#pragma omp parallel for schedule(dynamic, piece) if (rows * in * out > 65536)
    for (int64_t task = 0; task < panels * blocks; ++task) {
        alignas(64) float sums[BLOCK_ROWS * PANEL];
        const int64_t start = task / panels * BLOCK_ROWS, panel = task % panels, count = std::min(BLOCK_ROWS, rows - start);
        const int64_t tiles = (count + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
        std::memset(sums, 0, sizeof(float) * count * PANEL);
        for (int64_t k = 0; k < in; k += BLOCK_INPUTS) {
            const W* weights = packed + panel * panel_elements(packed, in) + panel_elements(packed, k);
            for (int64_t t = 0; t < tiles; ++t) {
                // Tiles of nearly equal height: the last one would else be too low to keep the processor busy.
                const int64_t first = count * t / tiles, height = count * (t + 1) / tiles - first;
                tile_of<MAX_TILE_ROWS>(height, x + (start + first) * in + k, in, weights, std::min(BLOCK_INPUTS, in - k), sums + first * PANEL);
            }
        }
        const int64_t width = std::min(PANEL, out - panel * PANEL);
        for (int64_t row = 0; row < count; ++row)
            for (int64_t o = 0; o < width; ++o)
                narrow(sums[row * PANEL + o] + (bias ? bias[panel * PANEL + o] : 0.0f), y + (start + row) * out + panel * PANEL + o);
    }
}

}  // namespace

// fp32 numbers that `out` outputs of `in` inputs take when packed: panels are padded. Half of it for bfloat16.
extern "C" int64_t packed_elements(int64_t in, int64_t out) { return (out + PANEL - 1) / PANEL * PANEL * in; }

// weight (out, in) fp32 → packed, zeros included.
extern "C" void pack_f32(const float* weight, float* packed, int64_t in, int64_t out) {
#pragma omp parallel for
    for (int64_t panel = 0; panel < (out + PANEL - 1) / PANEL; ++panel)
        for (int64_t k = 0; k < in; ++k)
            for (int64_t o = 0; o < PANEL; ++o) {
                const int64_t from = panel * PANEL + o;
                packed[(panel * in + k) * PANEL + o] = from < out ? weight[from * in + k] : 0.0f;
            }
}

// weight (out, in) bfloat16 → packed words, zeros included.
extern "C" void pack_bf16(const uint16_t* weight, uint32_t* packed, int64_t in, int64_t out) {
#pragma omp parallel for
    for (int64_t panel = 0; panel < (out + PANEL - 1) / PANEL; ++panel)
        for (int64_t k = 0; k < in; ++k)
            for (int64_t o = 0; o < LANES; ++o) {
                const int64_t low = panel * PANEL + o, high = low + LANES;
                const uint32_t first = low < out ? weight[low * in + k] : 0u, second = high < out ? weight[high * in + k] : 0u;
                packed[(panel * in + k) * LANES + o] = first | second << 16;
            }
}

// x and y contiguous; bias (out,) fp32 or null.
extern "C" void linear_f32_f32(const float* x, const float* packed, const float* bias, float* y, int64_t rows, int64_t in, int64_t out) {
    linear(x, packed, bias, y, rows, in, out);
}
extern "C" void linear_bf16_f32(const float* x, const uint32_t* packed, const float* bias, float* y, int64_t rows, int64_t in, int64_t out) {
    linear(x, packed, bias, y, rows, in, out);
}
extern "C" void linear_bf16_bf16(const float* x, const uint32_t* packed, const float* bias, BFloat16* y, int64_t rows, int64_t in, int64_t out) {
    linear(x, packed, bias, y, rows, in, out);
}
