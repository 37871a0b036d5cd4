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

// 16 registers allow 6 rows of 2 vectors beside the operands, 32 allow 12.
constexpr int64_t MAX_TILE_ROWS = LANES == 16 ? 12 : 6;

struct Pair {
    Vector first, second;
};

inline Pair weights_at(const float* panel, int64_t k) { return {load(panel + k * PANEL), load(panel + k * PANEL + LANES)}; }

// Two bfloat16 in one word, of outputs i and i + LANES: both widen in one operation each.
inline Pair weights_at(const uint32_t* panel, int64_t k) {
    const Words words = *reinterpret_cast<const WordsAt*>(panel + k * LANES);
    return {reinterpret_cast<Vector>(words << 16), reinterpret_cast<Vector>(words & 0xffff0000u)};
}

inline int64_t panel_elements(const float*, int64_t in) { return in * PANEL; }
inline int64_t panel_elements(const uint32_t*, int64_t in) { return in * LANES; }

// Bytes of weights that are asked for ahead of those in use: what is read once must not be waited for.
constexpr int64_t AHEAD = 4096;

// sums (ROWS, PANELS * PANEL) += x (ROWS, count) · PANELS panels (count, PANEL), `between` elements apart.
template <int ROWS, int PANELS, bool IS_FIRST, typename W>
void tile(const float* x, int64_t stride, const W* panel, int64_t between, int64_t count, float* sums) {
    Vector first[ROWS][PANELS], second[ROWS][PANELS];
    UNROLLED for (int row = 0; row < ROWS; ++row)
        UNROLLED for (int p = 0; p < PANELS; ++p) {
            const float* from = sums + (row * PANELS + p) * PANEL;
            first[row][p] = load(from), second[row][p] = load(from + LANES);
        }
    for (int64_t k = 0; k < count; ++k) {
        UNROLLED for (int p = 0; p < PANELS; ++p) {
            const W* here = panel + p * between;
            const Pair w = weights_at(here, k);
            if constexpr (IS_FIRST) __builtin_prefetch(reinterpret_cast<const char*>(here + panel_elements(here, k)) + AHEAD);
            UNROLLED for (int row = 0; row < ROWS; ++row) {
                const Vector input = splat(x[row * stride + k]);
                first[row][p] = multiply_add(input, w.first, first[row][p]);
                second[row][p] = multiply_add(input, w.second, second[row][p]);
            }
        }
    }
    UNROLLED for (int row = 0; row < ROWS; ++row)
        UNROLLED for (int p = 0; p < PANELS; ++p) {
            float* to = sums + (row * PANELS + p) * PANEL;
            store(to, first[row][p]), store(to + LANES, second[row][p]);
        }
}

template <int ROWS, bool IS_FIRST, typename W>
void tile_of(int64_t rows, const float* x, int64_t stride, const W* panel, int64_t count, float* sums) {
    if (rows == ROWS)
        tile<ROWS, 1, IS_FIRST>(x, stride, panel, 0, count, sums);
    else if constexpr (ROWS > 1)
        tile_of<ROWS - 1, IS_FIRST>(rows, x, stride, panel, count, sums);
}

// What `rows` rows (from x on) of a panel come to, in `sums (rows, PANEL)`.
template <typename W>
void panel_sums(const float* x, int64_t rows, int64_t in, const W* panel, float* sums) {
    const int64_t tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    std::memset(sums, 0, sizeof(float) * rows * PANEL);
    for (int64_t k = 0; k < in; k += BLOCK_INPUTS) {
        const W* weights = panel + panel_elements(panel, k);
        const int64_t count = std::min(BLOCK_INPUTS, in - k);
        for (int64_t t = 0; t < tiles; ++t) {
            // Tiles of nearly equal height: the last one would else be too low to keep the processor busy.
            const int64_t first = rows * t / tiles, height = rows * (t + 1) / tiles - first;
            if (t == 0)
                tile_of<MAX_TILE_ROWS, true>(height, x + k, in, weights, count, sums);
            else
                tile_of<MAX_TILE_ROWS, false>(height, x + first * in + k, in, weights, count, sums + first * PANEL);
        }
    }
}

template <typename T>
void finish(const float* sums, int64_t stride, const float* bias, T* y, int64_t rows, int64_t out, int64_t panel) {
    const int64_t first = panel * PANEL, width = std::min(PANEL, out - first);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t o = 0; o < width; ++o) narrow(sums[row * stride + o] + (bias ? bias[first + o] : 0.0f), y + row * out + first + o);
}

// Few rows: what takes the time is reading, and several panels at once are read faster than one after the other.
template <int ROWS, int PANELS, typename W, typename T>
void linear_of_few(const float* x, const W* packed, const float* bias, T* y, int64_t in, int64_t out) {
    const int64_t panels = (out + PANEL - 1) / PANEL, tasks = (panels + PANELS - 1) / PANELS, size = panel_elements(packed, in);
    const int64_t piece = std::max<int64_t>(1, tasks / 32);
#pragma omp parallel for schedule(dynamic, piece) if (in * out > 65536)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t panel = task * PANELS;
        if (panel + PANELS <= panels) {
            alignas(64) float sums[ROWS * PANELS * PANEL] = {};
            tile<ROWS, PANELS, true>(x, in, packed + panel * size, size, in, sums);
            for (int64_t p = 0; p < PANELS; ++p) finish(sums + p * PANEL, PANELS * PANEL, bias, y, ROWS, out, panel + p);
            continue;
        }
        for (int64_t p = panel; p < panels; ++p) {
            alignas(64) float sums[ROWS * PANEL] = {};
            tile<ROWS, 1, true>(x, in, packed + p * size, 0, in, sums);
            finish(sums, PANEL, bias, y, ROWS, out, p);
        }
    }
}

template <typename W, typename T>
void linear(const float* x, const W* packed, const float* bias, T* y, int64_t rows, int64_t in, int64_t out) {
    if (rows == 1) return linear_of_few<1, 6>(x, packed, bias, y, in, out);
    if (rows == 2) return linear_of_few<2, 3>(x, packed, bias, y, in, out);
    const int64_t panels = (out + PANEL - 1) / PANEL, blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    // Pieces small enough that a thread which the machine holds up leaves its share to the others.
    const int64_t piece = std::max<int64_t>(1, panels * blocks / 32);
#pragma omp parallel for schedule(dynamic, piece) if (rows * in * out > 65536)
    for (int64_t task = 0; task < panels * blocks; ++task) {
        alignas(64) float sums[BLOCK_ROWS * PANEL];
        const int64_t start = task / panels * BLOCK_ROWS, panel = task % panels, count = std::min(BLOCK_ROWS, rows - start);
        panel_sums(x + start * in, count, in, packed + panel * panel_elements(packed, in), sums);
        finish(sums, PANEL, bias, y + start * out, count, out, panel);
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
