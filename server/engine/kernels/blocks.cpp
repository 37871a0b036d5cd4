// A layer's attention, its gated MLP, and decoder layers of the two in one call each, out of the kernels beside this file and, for what programs
// do at their linears, those of the edits. Calling modules one by one gives the same numbers bit for bit; it takes longer, which is
// all that this is for.
#include <chrono>
#include <new>
#include <vector>

#include "kernels.h"

namespace {

// The rows that the programs of a step change on one side of a linear, as the edits' kernels take them.
struct Runs {
    int64_t count;
    const int64_t* bounds;
    const void* records;
};

// One linear of the base, as blocks.py lays it out.
struct Linear {
    const void* packed;
    int64_t is_bf16;
    const float* bias;
    int64_t in, out;
    Runs before, after;
};

// The edits' own kernels; null where no program edits a linear of the block.
template <typename T>
struct EditKernels {
    void (*before)(const T* x, T* out, int64_t num_rows, int64_t in, int64_t count, const int64_t* bounds, const void* records);
    void (*after)(const T* x, T* y, int64_t num_rows, int64_t in, int64_t out, int64_t count, const int64_t* bounds, const void* records);
};

// A block's linears in the order in which it runs them, and the edits' kernels for them.
template <typename T>
struct Block {
    const Linear* linears;
    const EditKernels<T>* edits;
};

// As BLOCK_PARTS in native.py.
enum Part { LINEARS, EDITS, SMALL, ATTENTION };

// Adds up the seconds of the parts where somebody wants to know.
class Clock {
   public:
    explicit Clock(double* seconds) : seconds(seconds), since(seconds ? now() : 0.0) {}
    void lap(Part part) {
        if (!seconds) return;
        const double at = now();
        seconds[part] += at - since;
        since = at;
    }

   private:
    static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
    double* seconds;
    double since;
};

// Room for the rows between two kernels: the calling thread's own, of one use, valid until the next call for the same use.
enum Use { WIDE, CHANGED, FIRST, SECOND, THIRD, FOURTH, NORMED, ADDED, USES };
template <typename T>
T* room(Use use, int64_t size) {
    static thread_local std::vector<T> held[USES];
    if (static_cast<int64_t>(held[use].size()) < size) {
        std::vector<T>().swap(held[use]);
        held[use].resize(size);
    }
    return held[use].data();
}

inline const float* widened(const float* x, int64_t) { return x; }
inline const float* widened(const BFloat16* x, int64_t size) {
    float* wide = room<float>(WIDE, size);
#pragma omp parallel for if (size > 65536)
    for (int64_t i = 0; i < size; ++i) wide[i] = widen(x[i]);
    return wide;
}

inline void base(const Linear& linear, const float* x, float* y, int64_t rows) {
    if (linear.is_bf16)
        linear_bf16_f32(x, static_cast<const uint32_t*>(linear.packed), linear.bias, y, rows, linear.in, linear.out);
    else
        linear_f32_f32(x, static_cast<const float*>(linear.packed), linear.bias, y, rows, linear.in, linear.out);
}
inline void base(const Linear& linear, const float* x, BFloat16* y, int64_t rows) {
    linear_bf16_bf16(x, static_cast<const uint32_t*>(linear.packed), linear.bias, y, rows, linear.in, linear.out);
}

// y (rows, out) = the linear with its programs' terms on x (rows, in)
template <typename T>
void run(const Linear& linear, const EditKernels<T>& edits, const T* x, T* y, int64_t rows, Clock& clock) {
    const T* from = x;
    if (linear.before.count) {
        T* changed = room<T>(CHANGED, rows * linear.in);
        edits.before(x, changed, rows, linear.in, linear.before.count, linear.before.bounds, linear.before.records);
        from = changed;
        clock.lap(EDITS);
    }
    base(linear, widened(from, rows * linear.in), y, rows);
    clock.lap(LINEARS);
    if (linear.after.count) {
        edits.after(x, y, rows, linear.in, linear.out, linear.after.count, linear.after.bounds, linear.after.records);
        clock.lap(EDITS);
    }
}

// gate, up and down: y = down(silu(gate(x)) * up(x))
template <typename T>
void gated_mlp(const Block<T>& block, const T* x, T* y, int64_t rows, Clock& clock) {
    const Linear* linears = block.linears;
    const int64_t size = rows * linears[0].out;
    T *gate = room<T>(FIRST, size), *up = room<T>(SECOND, size);
    run(linears[0], *block.edits, x, gate, rows, clock);
    run(linears[1], *block.edits, x, up, rows, clock);
    Kernels<T>::silu_mul(gate, up, gate, size);
    clock.lap(SMALL);
    run(linears[2], *block.edits, gate, y, rows, clock);
}

// What an attention is, and its layer of the cache, as native.py lays them out.
template <typename T>
struct Attention {
    int64_t kv_heads, width, window;
    double scaling;
    const float *query_norm, *key_norm;  // of the heads; null: none
    double eps;
    T *keys, *values;
    int64_t num_blocks, block_size;
};

// The rows of a step, the same for all of its layers: their angles, where their keys go, and the keys that they see.
template <typename T>
struct Rows {
    const T *cosines, *sines;
    const int64_t* kv_slots;
    const int32_t *tables, *sequence_of, *lengths;
    int64_t table_blocks;
};

// query, key, value and output
template <typename T>
void attention_block(const Block<T>& block, const Attention<T>& of, const Rows<T>& at, const T* x, T* y, int64_t rows, Clock& clock) {
    const Linear* linears = block.linears;
    const int64_t heads = linears[0].out / of.width;
    T* query = room<T>(FIRST, rows * linears[0].out);
    T *key = room<T>(SECOND, rows * linears[1].out), *value = room<T>(THIRD, rows * linears[2].out), *found = room<T>(FOURTH, rows * linears[0].out);
    run(linears[0], *block.edits, x, query, rows, clock);
    run(linears[1], *block.edits, x, key, rows, clock);
    run(linears[2], *block.edits, x, value, rows, clock);
    if (of.query_norm) {
        Kernels<T>::rms_norm(query, of.query_norm, query, rows * heads, of.width, of.eps);
        Kernels<T>::rms_norm(key, of.key_norm, key, rows * of.kv_heads, of.width, of.eps);
    }
    Kernels<T>::rotate_and_keep(query, key, value, at.cosines, at.sines, of.keys, of.values, at.kv_slots, rows, heads, of.kv_heads, of.width,
                                of.num_blocks * of.block_size);
    clock.lap(SMALL);
    Kernels<T>::attention(found, query, of.keys, of.values, at.tables, at.sequence_of, at.lengths, rows, heads, of.kv_heads, of.width, of.num_blocks,
                          of.block_size, at.table_blocks, of.scaling, of.window, 0.0f);
    clock.lap(ATTENTION);
    run(linears[3], *block.edits, found, y, rows, clock);
}

struct Norm {
    const float* weight;
    double eps;
};

// A decoder layer, as blocks.py lays it out: the norms through which its blocks read the residual stream, and the blocks.
template <typename T>
struct Layer {
    Norm attention_norm, mlp_norm;
    Block<T> attention, mlp;
    Attention<T> of;
};

// y = h + mlp(norm(h)) with h = x + attention(norm(x)); y may be x.
template <typename T>
void decoder_layer(const Layer<T>& layer, const Rows<T>& at, const T* x, T* y, int64_t rows, Clock& clock) {
    const int64_t width = layer.attention.linears[0].in, size = rows * width;
    T *normed = room<T>(NORMED, size), *added = room<T>(ADDED, size);
    Kernels<T>::rms_norm(x, layer.attention_norm.weight, normed, rows, width, layer.attention_norm.eps);
    clock.lap(SMALL);
    attention_block(layer.attention, layer.of, at, normed, added, rows, clock);
    Kernels<T>::add(x, added, y, size);
    Kernels<T>::rms_norm(y, layer.mlp_norm.weight, normed, rows, width, layer.mlp_norm.eps);
    clock.lap(SMALL);
    gated_mlp(layer.mlp, normed, added, rows, clock);
    Kernels<T>::add(y, added, y, size);
    clock.lap(SMALL);
}

// What runs on a clock that counts for `seconds`; whether there was memory for it.
template <typename What>
int64_t clocked(double* seconds, const What& what) {
    try {
        Clock clock(seconds);
        what(clock);
        return 1;
    } catch (const std::bad_alloc&) {
        return 0;
    }
}

template <typename T>
Block<T> block_of(const void* linears, const void* edits) {
    return {static_cast<const Linear*>(linears), static_cast<const EditKernels<T>*>(edits)};
}

}  // namespace

// x and y (rows, hidden), contiguous; `seconds` (4,) or null. linears: gate, up, down. Returns 0 where memory ran out.
#define GATED_MLP(NAME, T)                                                                                                             \
    extern "C" int64_t NAME(const void* linears, const void* edits, const T* x, T* y, double* seconds, int64_t rows) {                 \
        return clocked(seconds, [&](Clock& clock) { gated_mlp(block_of<T>(linears, edits), x, y, rows, clock); });                     \
    }
GATED_MLP(gated_mlp_f32, float)
GATED_MLP(gated_mlp_bf16, BFloat16)

// The same of: query, key, value, output.
#define ATTENTION_BLOCK(NAME, T)                                                                                                       \
    extern "C" int64_t NAME(const void* linears, const void* edits, const Attention<T>* of, const Rows<T>* at, const T* x, T* y,       \
                            double* seconds, int64_t rows) {                                                                           \
        return clocked(seconds, [&](Clock& clock) { attention_block(block_of<T>(linears, edits), *of, *at, x, y, rows, clock); });     \
    }
ATTENTION_BLOCK(attention_block_f32, float)
ATTENTION_BLOCK(attention_block_bf16, BFloat16)

// The same of `count` layers, one after the other.
#define DECODER_LAYERS(NAME, T)                                                                                                        \
    extern "C" int64_t NAME(const Layer<T>* layers, const Rows<T>* at, const T* x, T* y, double* seconds, int64_t rows, int64_t count) { \
        return clocked(seconds, [&](Clock& clock) {                                                                                    \
            for (int64_t layer = 0; layer < count; ++layer) decoder_layer(layers[layer], *at, layer ? y : x, y, rows, clock);          \
        });                                                                                                                            \
    }
DECODER_LAYERS(decoder_layers_f32, float)
DECODER_LAYERS(decoder_layers_bf16, BFloat16)
