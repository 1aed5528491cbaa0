#include "threads.h"

#include <thread>

#if defined(__linux__)
#include <dlfcn.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace bandit_rft::cpu {
namespace {

struct OpenMP {
    void (*run)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*index)() = nullptr;
    int (*size)() = nullptr;
};
OpenMP openmp;

void pause() {
#if defined(__SSE2__)
    _mm_pause();
#endif
}

}  // namespace

bool use_openmp(const std::string& library) {
#if defined(__linux__)
    void* handle = dlopen(library.c_str(), RTLD_NOLOAD | RTLD_LAZY);
    if (!handle) return false;
    OpenMP found;
    found.run = reinterpret_cast<decltype(found.run)>(dlsym(handle, "GOMP_parallel"));
    found.index = reinterpret_cast<decltype(found.index)>(dlsym(handle, "omp_get_thread_num"));
    found.size = reinterpret_cast<decltype(found.size)>(dlsym(handle, "omp_get_num_threads"));
    if (found.run && found.index && found.size) openmp = found;
#else
    (void)library;
#endif
    return openmp.run != nullptr;
}

int64_t worth_a_thread() { return openmp.run ? 1 << 14 : 1 << 17; }

void run_team(int count, void (*member)(void*, int, int), void* data) {
    if (count == 1) return member(data, 0, 1);
    if (openmp.run) {
        struct Shared {
            void (*member)(void*, int, int);
            void* data;
        } shared{member, data};
        const auto task = [](void* given) {
            const auto& s = *static_cast<const Shared*>(given);
            s.member(s.data, openmp.index(), openmp.size());
        };
        return openmp.run(task, &shared, unsigned(count), 0);
    }
    // Members wait for each other, so they begin when it is known how many could be started.
    std::atomic<int> size{0};
    std::vector<std::thread> helpers;
    const auto wait_and_work = [&](int index) {
        while (size.load(std::memory_order_acquire) == 0) std::this_thread::yield();
        member(data, index, size.load(std::memory_order_relaxed));
    };
    try {
        helpers.reserve(size_t(count - 1));
        for (int i = 1; i < count; ++i) helpers.emplace_back(wait_and_work, i);
    } catch (const std::exception&) {  // the system gives no more: those that there are do the work
    }
    const int started = int(helpers.size()) + 1;
    size.store(started, std::memory_order_release);
    member(data, 0, started);
    for (auto& helper : helpers) helper.join();
}

void Barrier::wait(int size) {
    if (size == 1) return;
    const int phase = phase_.load(std::memory_order_acquire);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
        waiting_.store(0, std::memory_order_relaxed);
        phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins)
        spins < 4096 ? pause() : std::this_thread::yield();
}

}  // namespace bandit_rft::cpu
