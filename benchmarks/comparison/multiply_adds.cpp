// float32 multiply-adds a second of some threads, from registers alone: what no product on this processor can exceed.
//
//     multiply_adds THREADS     prints seconds a round, and the multiply-adds of one, for some rounds
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kChains = 12;  // more than a multiply-add's latency times the units that do them
#if defined(__aarch64__)
#define IN_A_REGISTER "+w"
#else
#define IN_A_REGISTER "+x"
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));

void multiply_and_add(long count) {
    Vector sums[kChains] = {}, factor = Vector{} + 0.999f;
    for (auto& sum : sums) asm volatile("" : IN_A_REGISTER(sum));  // or they would be one chain, since all do the same
    for (long i = 0; i < count; ++i) {
        for (auto& sum : sums) sum = sum * factor + factor;
    }
    for (auto& sum : sums) asm volatile("" : IN_A_REGISTER(sum));  // not left out
}

int main(int count, char** arguments) {
    const int threads = count > 1 ? std::atoi(arguments[1]) : 1;
    const long steps = 10'000'000;
    for (int round = 0; round < 11; ++round) {
        const auto start = std::chrono::steady_clock::now();
        std::vector<std::thread> team;
        for (int i = 0; i < threads; ++i) team.emplace_back(multiply_and_add, steps);
        for (auto& each : team) each.join();
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        std::printf("%.9f %.0f\n", taken.count(), double(steps) * kChains * kLanes * threads);
    }
}
