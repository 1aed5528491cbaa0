// The few words that differ between a host compiler and nvcc.
#pragma once

#if defined(__CUDACC__)
#define BRFT_INLINE __host__ __device__ __forceinline__
#define BRFT_UNROLL _Pragma("unroll")
#elif defined(__clang__)
// static: this code is compiled once for each instruction set, and the linker must never pick one of them for all.
#define BRFT_INLINE static inline __attribute__((always_inline))
#define BRFT_ALONE static __attribute__((noinline))
#define BRFT_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define BRFT_INLINE static inline __attribute__((always_inline))
#define BRFT_ALONE static __attribute__((noinline))  // has the registers to itself, whatever calls it
#define BRFT_UNROLL _Pragma("GCC unroll 16")
#else
#define BRFT_INLINE static __forceinline
#define BRFT_ALONE static __declspec(noinline)
#define BRFT_UNROLL
#endif
