// How the rows of a step are divided among threads: into pieces that belong to one program each, so that its weights are read once a piece.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

extern "C" int omp_get_max_threads();

constexpr int64_t NOBODY = -1;
constexpr int64_t WORTH_THREADS = 1 << 14;  // elements; below, waking a thread takes longer than the work

struct Piece {
    int64_t run, start, end;
};

inline void cut(std::vector<Piece>& pieces, int64_t run, int64_t start, int64_t end, int64_t most) {
    for (; start < end; start += most) pieces.push_back({run, start, std::min(start + most, end)});
}

// Run i is rows [bounds[2i], bounds[2i + 1]), in ascending order. With ``all``, the rows between runs are pieces of NOBODY.
inline std::vector<Piece> cut_runs(const int64_t* bounds, int64_t count, int64_t num_rows, bool all) {
    // Multiples of four, the rows of a tile; several pieces a thread, so that uneven ones even out.
    const int64_t even = num_rows / (4 * omp_get_max_threads()) / 4 * 4;
    const int64_t most = std::min<int64_t>(std::max<int64_t>(even, 4), 32);
    std::vector<Piece> pieces;
    int64_t row = 0;
    for (int64_t run = 0; run < count; ++run) {
        const int64_t start = bounds[2 * run], end = bounds[2 * run + 1];
        if (all) cut(pieces, NOBODY, row, start, most);
        cut(pieces, run, start, end, most);
        row = end;
    }
    if (all) cut(pieces, NOBODY, row, num_rows, most);
    return pieces;
}
