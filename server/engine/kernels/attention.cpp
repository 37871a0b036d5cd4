// Attention of rows over the paged cache, read in place: what paged.attention_reference says, in fp32.
//
// A row's scores, softmax and sum are computed in the order of its keys, whatever rows surround it: the result is the same bit for bit
// as a decode, within a chunk of any size, and behind a cached prefix. OpenMP symbols come from the runtime that PyTorch has loaded.
#include <algorithm>
#include <cmath>
#include <vector>

#include "exponential.h"
#include "simd.h"

namespace {

// Consecutive rows of one sequence that share a pass over its keys: fewer where their lines of scores would take more than 16 MiB a thread.
constexpr int64_t RUN_ROWS = 8, MAX_SCORES = 4 << 20;
// Keys whose scores are computed together: each vector of a query is loaded once for them.
constexpr int64_t KEYS = 4;
// Vectors of an output that stay in registers while the values go by.
constexpr int64_t OUT_VECTORS = 8;

struct Run {
    int64_t first, count;
};

struct Shape {
    int64_t heads, kv_heads, width, num_blocks, block_size, table_blocks;
    float scaling, softcap;  // softcap 0: none
    int64_t window;          // 0: none
};

std::vector<Run> runs_of(const int32_t* sequence_of, const int32_t* lengths, int64_t rows, int64_t group) {
    std::vector<Run> runs;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t most = std::min(RUN_ROWS, MAX_SCORES / (group * lengths[row]));
        if (!runs.empty() && runs.back().count < most && sequence_of[row] == sequence_of[row - 1])
            ++runs.back().count;
        else
            runs.push_back({row, 1});
    }
    return runs;
}

// scores[i] = query · keys[i], both (…, width)
template <int COUNT, typename T>
void dots(const float* query, const T* keys, int64_t width, float* scores) {
    Vector acc[KEYS] = {};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        const Vector q = load(query + i);
        UNROLLED for (int key = 0; key < COUNT; ++key) acc[key] = multiply_add(q, load(keys + key * width + i), acc[key]);
    }
    const Quad found = sums(acc[0], acc[1], acc[2], acc[3]);
    UNROLLED for (int key = 0; key < COUNT; ++key) {
        float score = found[key];
        for (int64_t rest = i; rest < width; ++rest) score = std::fma(query[rest], widen(keys[key * width + rest]), score);
        scores[key] = score;
    }
}

// Scaled, capped scores to weights that sum to one.
void softmax(float* scores, int64_t count, const Shape& shape) {
    float highest = -__builtin_inff();
    bool has_nan = false;
    for (int64_t i = 0; i < count; ++i) {
        float score = scores[i] * shape.scaling;
        if (shape.softcap != 0.0f) score = std::tanh(score / shape.softcap) * shape.softcap;
        scores[i] = score;
        highest = score > highest ? score : highest;
        has_nan |= score != score;
    }
    if (has_nan) highest = __builtin_nanf("");
    // One order of summation for every length: lane by lane, then the lanes.
    Vector total{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Vector e = exponential(load(scores + i) - highest);
        store(scores + i, e);
        total += e;
    }
    if (i < count) {
        float rest[LANES];
        for (int64_t lane = 0; lane < LANES; ++lane) rest[lane] = i + lane < count ? scores[i + lane] - highest : -__builtin_inff();
        const Vector e = exponential(load(rest));
        store(rest, e);
        std::copy(rest, rest + (count - i), scores + i);
        total += e;
    }
    const float scale = 1.0f / sum(total);
    for (i = 0; i < count; ++i) scores[i] *= scale;
}

// out (vectors * LANES) += weights (count) · values (count, width)
template <typename T>
void weigh(const float* weights, const T* values, int64_t count, int64_t width, int64_t vectors, float* out) {
    for (int64_t first = 0; first < vectors; first += OUT_VECTORS) {
        const int64_t here = std::min(OUT_VECTORS, vectors - first);
        float* to = out + first * LANES;
        const T* from = values + first * LANES;
        if (here == OUT_VECTORS) {
            Vector acc[OUT_VECTORS];
            UNROLLED for (int v = 0; v < OUT_VECTORS; ++v) acc[v] = load(to + v * LANES);
            for (int64_t key = 0; key < count; ++key) {
                const Vector weight = splat(weights[key]);
                UNROLLED for (int v = 0; v < OUT_VECTORS; ++v) acc[v] = multiply_add(weight, load(from + key * width + v * LANES), acc[v]);
            }
            UNROLLED for (int v = 0; v < OUT_VECTORS; ++v) store(to + v * LANES, acc[v]);
        } else {
            for (int64_t key = 0; key < count; ++key)
                for (int64_t v = 0; v < here; ++v)
                    store(to + v * LANES, multiply_add(splat(weights[key]), load(from + key * width + v * LANES), load(to + v * LANES)));
        }
    }
}

// One run and one K/V head. scratch: the queries in fp32, the sums, and a line of scores for each.
template <typename T>
void attend_run(T* out, const T* query, const T* keys, const T* values, const int32_t* table, const int32_t* lengths, Run run, int64_t kv_head,
                const Shape& shape, std::vector<float>& scratch) {
    const int64_t group = shape.heads / shape.kv_heads, width = shape.width, queries = run.count * group, size = shape.block_size;
    const int64_t vectors = width / LANES;
    const int64_t longest = *std::max_element(lengths + run.first, lengths + run.first + run.count);
    scratch.resize(2 * queries * width + queries * longest);
    float *wide = scratch.data(), *sums = wide + queries * width, *scores = sums + queries * width;
    std::fill(sums, scores, 0.0f);
    const auto at = [&](int64_t q) { return ((run.first + q / group) * shape.heads + kv_head * group + q % group) * width; };
    const auto length = [&](int64_t q) { return static_cast<int64_t>(lengths[run.first + q / group]); };
    const auto first_key = [&](int64_t q) { return shape.window ? std::max<int64_t>(0, length(q) - shape.window) : 0; };
    for (int64_t q = 0; q < queries; ++q)
        for (int64_t i = 0; i < width; ++i) wide[q * width + i] = widen(query[at(q) + i]);
    const int64_t begin = first_key(0) / size;
    for (int64_t block = begin; block * size < longest; ++block) {
        const T* here = keys + (kv_head * shape.num_blocks + table[block]) * size * width;
        for (int64_t q = 0; q < queries; ++q) {
            int64_t key = std::max(first_key(q) - block * size, int64_t{0});
            const int64_t end = std::min(size, length(q) - block * size);
            float* line = scores + q * longest + block * size;
            for (; key + KEYS <= end; key += KEYS) dots<KEYS>(wide + q * width, here + key * width, width, line + key);
            for (; key < end; ++key) dots<1>(wide + q * width, here + key * width, width, line + key);
        }
    }
    for (int64_t q = 0; q < queries; ++q) softmax(scores + q * longest + first_key(q), length(q) - first_key(q), shape);
    for (int64_t block = begin; block * size < longest; ++block) {
        const T* here = values + (kv_head * shape.num_blocks + table[block]) * size * width;
        for (int64_t q = 0; q < queries; ++q) {
            const int64_t key = std::max(first_key(q) - block * size, int64_t{0}), end = std::min(size, length(q) - block * size);
            const float* line = scores + q * longest + block * size;
            if (key >= end) continue;
            weigh(line + key, here + key * width, end - key, width, vectors, sums + q * width);
            for (int64_t i = vectors * LANES; i < width; ++i)
                for (int64_t k = key; k < end; ++k) sums[q * width + i] = std::fma(line[k], widen(here[k * width + i]), sums[q * width + i]);
        }
    }
    for (int64_t q = 0; q < queries; ++q)
        for (int64_t i = 0; i < width; ++i) narrow(sums[q * width + i], out + at(q) + i);
}

template <typename T>
void attend(T* out, const T* query, const T* keys, const T* values, const int32_t* tables, const int32_t* sequence_of, const int32_t* lengths, int64_t rows,
            const Shape& shape) {
    const std::vector<Run> runs = runs_of(sequence_of, lengths, rows, shape.heads / shape.kv_heads);
    const int64_t tasks = static_cast<int64_t>(runs.size()) * shape.kv_heads;
#pragma omp parallel if (tasks > 1)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task) {
            const Run run = runs[task / shape.kv_heads];
            attend_run(out, query, keys, values, tables + sequence_of[run.first] * shape.table_blocks, lengths, run, task % shape.kv_heads, shape, scratch);
        }
    }
}

}  // namespace

// out and query (rows, heads, width); keys and values (kv_heads, num_blocks, block_size, width); tables (sequences, table_blocks);
// sequence_of and lengths (rows,). All contiguous. window 0 and softcap 0: none.
#define ATTENTION(NAME, T)                                                                                                                       \
    extern "C" void NAME(T* out, const T* query, const T* keys, const T* values, const int32_t* tables, const int32_t* sequence_of,              \
                         const int32_t* lengths, int64_t rows, int64_t heads, int64_t kv_heads, int64_t width, int64_t num_blocks,               \
                         int64_t block_size, int64_t table_blocks, float scaling, int64_t window, float softcap) {                               \
        attend(out, query, keys, values, tables, sequence_of, lengths, rows,                                                                     \
               {heads, kv_heads, width, num_blocks, block_size, table_blocks, scaling, softcap, window});                                        \
    }
ATTENTION(attention_f32, float)
ATTENTION(attention_bf16, BFloat16)
