// What this machine can do at most: prints bytes a second that all threads read together, and float32 FMA operations a second.
#include <omp.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double read_rate(const std::vector<uint64_t>& data) {
    double best = 0;
    uint64_t total = 0;
    for (int round = 0; round < 8; ++round) {
        const double started = now();
#pragma omp parallel for reduction(+ : total) schedule(static)
        for (size_t i = 0; i < data.size(); ++i) total += data[i];
        const double rate = data.size() * sizeof(uint64_t) / (now() - started);
        best = rate > best ? rate : best;
    }
    return total == 1 ? 0 : best;  // the sum is used, so that it is computed
}

#ifdef __AVX512F__
constexpr int kWidth = 16;
#else
constexpr int kWidth = 8;
#endif
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));

// Ten chains of FMAs that do not wait for each other.
float chains(int64_t steps, float factor, float term) {
    const Vector f = Vector{} + factor, t = Vector{} + term;
    Vector a{}, b{}, c{}, d{}, e{}, g{}, h{}, k{}, l{}, m{};
    for (int64_t step = 0; step < steps; ++step) {
        a = a * f + t, b = b * f + t, c = c * f + t, d = d * f + t, e = e * f + t;
        g = g * f + t, h = h * f + t, k = k * f + t, l = l * f + t, m = m * f + t;
        asm volatile("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d), "+x"(e), "+x"(g), "+x"(h), "+x"(k), "+x"(l), "+x"(m));
    }
    return (a + b + c + d + e + g + h + k + l + m)[0];
}

double fma_rate() {
    constexpr int64_t kSteps = 5'000'000;
    double best = 0;
    for (int round = 0; round < 20; ++round) {
        float used = 0;
        const double started = now();
#pragma omp parallel reduction(+ : used)
        used += chains(kSteps, 0.999f, 1e-3f);
        const double rate = 2.0 * kSteps * 10 * kWidth * omp_get_max_threads() / (now() - started);
        best = used > 0 && rate > best ? rate : best;
    }
    return best;
}

}  // namespace

int main() {
    const std::vector<uint64_t> data(size_t{1} << 26, 1);  // 512 MiB: larger than any cache
    std::printf("%.6g %.6g\n", read_rate(data), fma_rate());
}
