// csrc/cuda/device.h's names on a CPU. The threads of a cluster are fibers of one thread: each runs until it waits,
// then the next one does, in an order that the test chooses, so that a barrier that is missing shows as a wrong result
// in some order.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define BRFT_DEVICE inline
#define BRFT_NO_UNROLL
#define __global__ static
#define __launch_bounds__(...)

struct alignas(16) uint4 {  // as on the device: a misaligned access is an error there
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx, blockDim;

namespace bandit_rft::cuda {
namespace emulation {

struct Barrier {
    int expected = 0, arrived = 0;
    long generation = 0;

    long arrive() {
        const long mine = generation;
        if (++arrived == expected) arrived = 0, ++generation;
        return mine;
    }
};

struct Copy {
    uint4* to;
    const uint4* from;
    long group;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(256 << 10);
    unsigned block = 0, thread = 0;
    long cluster_ticket = 0;
    long shuffles = 0;
    std::vector<Copy> copies;  // asked for, and not waited for yet
    long copy_groups = 0;
    bool finished = true;
};

struct Cluster {
    std::vector<Fiber> fibers;
    std::vector<std::vector<char>> memory;  // of each block; refilled with nonsense before it is used
    std::vector<Barrier> block_barriers, warp_barriers;
    Barrier cluster_barrier;
    std::vector<uint64_t> exchanged;  // [fiber][2]: the values of two consecutive shuffles
    ucontext_t scheduler;
    Fiber* current = nullptr;
    unsigned first_block = 0, threads = 0;
    std::function<void()> kernel;
    std::string fault;
};
inline Cluster cluster;
inline long votes = 0, votes_for = 0;  // calls of any_in_warp by a warp, and those that were true
inline bool backwards = false;         // which way round the fibers are scheduled

inline void yield() { swapcontext(&cluster.current->context, &cluster.scheduler); }
inline void wait(const Barrier& barrier, long ticket) {
    while (barrier.generation == ticket) yield();
}
// Ends the kernel with an error, from within one of its threads: as on a device, nothing after the access happens.
inline void fault(const std::string& what) {
    cluster.fault = what;
    yield();
}
inline void enter() {
    cluster.kernel();
    cluster.current->finished = true;
    yield();
}
inline unsigned warp_of(const Fiber& f) {
    return (f.block - cluster.first_block) * (cluster.threads / 32) + f.thread / 32;
}

inline void run(unsigned blocks, unsigned threads, unsigned first_block, size_t bytes, std::function<void()> kernel) {
    Cluster& c = cluster;
    c.first_block = first_block;
    c.threads = threads;
    c.kernel = std::move(kernel);
    c.fault.clear();
    c.fibers.resize(blocks * threads);
    c.memory.assign(blocks, std::vector<char>(bytes + 16, char(0x7f)));
    c.block_barriers.assign(blocks, Barrier{int(threads)});
    c.warp_barriers.assign(blocks * threads / 32, Barrier{32});
    c.cluster_barrier = Barrier{int(blocks * threads)};
    c.exchanged.assign(size_t(blocks) * threads * 2, 0);
    for (unsigned i = 0; i < c.fibers.size(); ++i) {
        Fiber& f = c.fibers[i];
        f.block = first_block + i / threads;
        f.thread = i % threads;
        f.shuffles = 0;
        f.copies.clear();
        f.copy_groups = 0;
        f.finished = false;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = nullptr;
        makecontext(&f.context, enter, 0);
    }
    blockDim.x = threads;
    for (bool more = true; more;) {
        more = false;
        for (unsigned i = 0; i < c.fibers.size(); ++i) {
            Fiber& f = c.fibers[backwards ? c.fibers.size() - 1 - i : i];
            if (f.finished) continue;
            more = true;
            c.current = &f;
            blockIdx.x = f.block;
            threadIdx.x = f.thread;
            swapcontext(&c.scheduler, &f.context);
            if (!c.fault.empty()) throw std::runtime_error(c.fault);
        }
    }
}

// Shows `value` to the warp; where lane 0's is then, and each other's two slots after the one before.
template <class T>
const uint64_t* exchange(T value) {
    static_assert(sizeof(T) <= 8);
    Fiber& f = *cluster.current;
    const size_t parity = size_t(f.shuffles++ % 2), self = size_t(&f - cluster.fibers.data());
    memcpy(&cluster.exchanged[self * 2 + parity], &value, sizeof(T));
    Barrier& barrier = cluster.warp_barriers[warp_of(f)];
    wait(barrier, barrier.arrive());
    return &cluster.exchanged[(self - self % 32) * 2 + parity];
}
template <class T>
T shuffle(T value, int from_lane) {
    const uint64_t* shown = exchange(value);
    if (from_lane >= 0) memcpy(&value, shown + from_lane * 2, sizeof(T));
    return value;
}

}  // namespace emulation

inline char* shared_memory() {
    auto* memory = emulation::cluster.memory[emulation::cluster.current->block - emulation::cluster.first_block].data();
    return memory + (16 - reinterpret_cast<uintptr_t>(memory) % 16) % 16;
}
inline void block_barrier() {
    auto& barrier =
        emulation::cluster.block_barriers[emulation::cluster.current->block - emulation::cluster.first_block];
    emulation::wait(barrier, barrier.arrive());
}
inline void cluster_arrive() {
    emulation::cluster.current->cluster_ticket = emulation::cluster.cluster_barrier.arrive();
}
inline void cluster_arrive_first() { cluster_arrive(); }
inline void cluster_wait() {
    emulation::wait(emulation::cluster.cluster_barrier, emulation::cluster.current->cluster_ticket);
}
template <class T>
T* in_block(T* shared, int rank) {
    auto* there = emulation::cluster.memory[size_t(rank)].data();
    there += (16 - reinterpret_cast<uintptr_t>(there) % 16) % 16;
    return reinterpret_cast<T*>(there + (reinterpret_cast<char*>(shared) - shared_memory()));
}
template <class T>
T shuffle_xor(T value, int mask) {
    return emulation::shuffle(value, int(emulation::cluster.current->thread % 32) ^ mask);
}
inline uint32_t warp_uniform(uint32_t value) { return value; }
inline bool any_in_warp(bool condition) {
    const uint64_t* shown = emulation::exchange(uint64_t(condition));
    bool any = false;
    for (int lane = 0; lane < 32; ++lane) any |= shown[lane * 2] != 0;
    if (emulation::cluster.current->thread % 32 == 0) {
        ++emulation::votes;
        emulation::votes_for += any;
    }
    return any;
}
inline int highest_bit(uint64_t set) { return 63 - __builtin_clzll(set); }
template <class T>
T shuffle_up(T value, int distance) {
    return emulation::shuffle(value, int(emulation::cluster.current->thread % 32) - distance);
}

inline uint32_t atomicAdd(uint32_t* to, uint32_t value) {
    const uint32_t before = *to;
    *to += value;
    return before;
}
// A copy happens as late as it may, when its thread waits for it: what is read before is nonsense, and what is written
// over its source before arrives. One that nobody waits for never happens.
inline void copy_async(uint4* shared, const uint4* global) {
    for (const uintptr_t address : {reinterpret_cast<uintptr_t>(shared), reinterpret_cast<uintptr_t>(global)})
        if (address % 16)
            emulation::fault("misaligned address: " + std::to_string(address % 16) + " modulo 16, copy_async");
    emulation::Fiber& f = *emulation::cluster.current;
    const auto& memory = emulation::cluster.memory[f.block - emulation::cluster.first_block];
    const auto* to = reinterpret_cast<const char*>(shared);
    if (to < memory.data() || to + 16 > memory.data() + memory.size())
        emulation::fault("copy_async to what is not the block's shared memory");
    f.copies.push_back({shared, global, f.copy_groups});
}
inline void end_copy_group() { ++emulation::cluster.current->copy_groups; }
template <int kLeft>
void wait_for_copies() {
    emulation::Fiber& f = *emulation::cluster.current;
    size_t done = 0;
    for (; done < f.copies.size() && f.copies[done].group < f.copy_groups - kLeft; ++done)
        *f.copies[done].to = *f.copies[done].from;
    f.copies.erase(f.copies.begin(), f.copies.begin() + std::ptrdiff_t(done));
}
inline void store_streaming(uint4* to, const uint4& value) { *to = value; }
// A model of ex2.approx.ftz: every result is off by up to the documented 2 units in the last place, in a direction that
// depends on the argument's bits; subnormal results are 0.
inline float exp2_approximate(float x) {
    const float exact = exp2f(x);
    if (!(exact < INFINITY) || exact == 1.0f) return exact;
    if (exact < 0x1p-126f) return 0.0f;
    uint32_t bits, seed;
    memcpy(&bits, &exact, 4);
    memcpy(&seed, &x, 4);
    bits += (seed * 2654435761u >> 16) % 5 - 2;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
inline uint32_t bf16_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7FFF : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}
inline uint32_t f16_bits(float x) {
    const _Float16 half = _Float16(x);
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}
inline uint32_t bf16_pair(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline uint32_t f16_pair(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }
inline float from_f16_bits(uint16_t bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return float(half);
}

}  // namespace bandit_rft::cuda
