// A layer's attention and its gated MLP in one call each, out of the kernels beside this file and, for what programs do at their linears, those
// of the edits. Calling modules one by one gives the same numbers bit for bit; it takes longer, which is all that this is for.
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
enum Use { WIDE, CHANGED, FIRST, SECOND, THIRD, FOURTH, USES };
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
void gated_mlp(const Linear* linears, const EditKernels<T>& edits, const T* x, T* y, int64_t rows, double* seconds) {
    Clock clock(seconds);
    const int64_t size = rows * linears[0].out;
    T *gate = room<T>(FIRST, size), *up = room<T>(SECOND, size);
    run(linears[0], edits, x, gate, rows, clock);
    run(linears[1], edits, x, up, rows, clock);
    Kernels<T>::silu_mul(gate, up, gate, size);
    clock.lap(SMALL);
    run(linears[2], edits, gate, y, rows, clock);
}

// What an attention is, and the cache and the step that it runs on, as native.py lays them out.
template <typename T>
struct Attention {
    int64_t heads, kv_heads, width, window;
    double scaling;
    const float *query_norm, *key_norm;  // of the heads; null: none
    double eps;
    T *keys, *values;
    int64_t num_blocks, block_size;
    const T *cosines, *sines;
    const int64_t* kv_slots;
    const int32_t *tables, *sequence_of, *lengths;
    int64_t table_blocks;
};

// query, key, value and output
template <typename T>
void attention_block(const Linear* linears, const EditKernels<T>& edits, const Attention<T>& of, const T* x, T* y, int64_t rows, double* seconds) {
    Clock clock(seconds);
    T* query = room<T>(FIRST, rows * linears[0].out);
    T *key = room<T>(SECOND, rows * linears[1].out), *value = room<T>(THIRD, rows * linears[2].out), *found = room<T>(FOURTH, rows * linears[0].out);
    run(linears[0], edits, x, query, rows, clock);
    run(linears[1], edits, x, key, rows, clock);
    run(linears[2], edits, x, value, rows, clock);
    if (of.query_norm) {
        Kernels<T>::rms_norm(query, of.query_norm, query, rows * of.heads, of.width, of.eps);
        Kernels<T>::rms_norm(key, of.key_norm, key, rows * of.kv_heads, of.width, of.eps);
    }
    Kernels<T>::rotate_and_keep(query, key, value, of.cosines, of.sines, of.keys, of.values, of.kv_slots, rows, of.heads, of.kv_heads, of.width,
                                of.num_blocks * of.block_size);
    clock.lap(SMALL);
    Kernels<T>::attention(found, query, of.keys, of.values, of.tables, of.sequence_of, of.lengths, rows, of.heads, of.kv_heads, of.width, of.num_blocks,
                          of.block_size, of.table_blocks, of.scaling, of.window, 0.0f);
    clock.lap(ATTENTION);
    run(linears[3], edits, found, y, rows, clock);
}

// Whether there was memory for it.
template <typename Block>
int64_t fits(const Block& block) {
    try {
        block();
        return 1;
    } catch (const std::bad_alloc&) {
        return 0;
    }
}

}  // namespace

// x and y (rows, hidden), contiguous; `seconds` (4,) or null. linears: gate, up, down. Returns 0 where memory ran out.
#define GATED_MLP(NAME, T)                                                                                                             \
    extern "C" int64_t NAME(const void* linears, const void* edits, const T* x, T* y, double* seconds, int64_t rows) {                 \
        return fits([&] { gated_mlp(static_cast<const Linear*>(linears), *static_cast<const EditKernels<T>*>(edits), x, y, rows, seconds); }); \
    }
GATED_MLP(gated_mlp_f32, float)
GATED_MLP(gated_mlp_bf16, BFloat16)

// The same of: query, key, value, output.
#define ATTENTION_BLOCK(NAME, T)                                                                                                       \
    extern "C" int64_t NAME(const void* linears, const void* edits, const void* of, const T* x, T* y, double* seconds, int64_t rows) { \
        return fits([&] {                                                                                                              \
            attention_block(static_cast<const Linear*>(linears), *static_cast<const EditKernels<T>*>(edits),                           \
                            *static_cast<const Attention<T>*>(of), x, y, rows, seconds);                                               \
        });                                                                                                                            \
    }
ATTENTION_BLOCK(attention_block_f32, float)
ATTENTION_BLOCK(attention_block_bf16, BFloat16)
