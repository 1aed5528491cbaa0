// What the kernels use of a GPU beyond C++. tests/native/device_emulation.h offers the same names on a CPU, so that the
// kernels' own source runs, and is compared with the CPU core, where there is no GPU.
#pragma once

#include <cstdint>

#if defined(BRFT_EMULATED_DEVICE)
#include "device_emulation.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define BRFT_DEVICE __device__ __forceinline__
#define BRFT_NO_UNROLL _Pragma("unroll 1")

namespace bandit_rft::cuda {

// Every kernel keeps all its shared memory here, so that blocks of a cluster can address each other's.
BRFT_DEVICE char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

BRFT_DEVICE void block_barrier() { __syncthreads(); }

// Blocks of a cluster exist from sm_90 on; elsewhere a block is alone. What was written to another block's shared
// memory before cluster_arrive is seen there after cluster_wait.
// cluster_arrive_first: where nothing was written yet that another block reads. It needs no fence; cluster_arrive has
// one (MEMBAR.ALL.GPU), in front of everything that its thread does next.
BRFT_DEVICE void cluster_arrive_first() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
#endif
}
BRFT_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().barrier_arrive();
#endif
}
BRFT_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().barrier_wait();
#else
    __syncthreads();
#endif
}
template <class T>
BRFT_DEVICE T* in_block(T* shared, int rank) {  // the same variable in another block of the cluster
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(shared, unsigned(rank));
#else
    return shared;
#endif
}

template <class T>
BRFT_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
BRFT_DEVICE bool any_in_warp(bool condition) { return __any_sync(0xFFFFFFFFu, condition); }
// The value that every lane of the warp has, in a register that the warp shares: what is made of it once stays there.
BRFT_DEVICE uint32_t warp_uniform(uint32_t value) { return __reduce_or_sync(0xFFFFFFFFu, value); }
BRFT_DEVICE int highest_bit(uint64_t set) { return 63 - __clzll(static_cast<long long>(set)); }
template <class T>
BRFT_DEVICE T shuffle_up(T value, int distance) {
    return __shfl_up_sync(0xFFFFFFFFu, value, unsigned(distance));
}

// 16 bytes from global to shared memory, past the registers. A copy is there, for the thread that asked for it and no
// other, once the thread has waited until at most `kLeft` of its groups, the latest, are under way.
BRFT_DEVICE void copy_async(uint4* shared, const uint4* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
                 "l"(global)
                 : "memory");
}
BRFT_DEVICE void end_copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
BRFT_DEVICE void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// 16 bytes in one instruction, to be evicted first: nobody reads them again soon.
BRFT_DEVICE void store_streaming(uint4* to, const uint4& value) { __stcs(to, value); }

// 2^x to within 2 units in the last place, in one instruction; results below 2^-126 are 0.
BRFT_DEVICE float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
BRFT_DEVICE uint32_t bf16_pair(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}
BRFT_DEVICE uint32_t f16_pair(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}
BRFT_DEVICE float from_f16_bits(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

}  // namespace bandit_rft::cuda
#endif
