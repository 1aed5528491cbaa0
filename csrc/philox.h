// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
//   key = seed; counter = (token id / 4, position, sequence id low, sequence id high); word j belongs to token 4k + j
//   u = float32(word) * 2^-32 + 2^-33, at most 1 - 2^-24;  g = -log(-log1p(-u))
//
// A draw therefore depends on the logits, the seed, the sequence and the position alone: no state exists anywhere.
#pragma once

#include <cmath>
#include <cstdint>

#include "portable.h"

namespace bandit_rft {

struct PhiloxKey {
    uint32_t low, high;
};

struct PhiloxWords {
    uint32_t word[4];
};

// a * b in 64 bits. nvcc makes a 64-bit product of a widened factor and adds its upper half, which is 0: a third more
// work.
BRFT_INLINE uint64_t multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    uint64_t product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    return product;
#else
    return uint64_t(a) * b;
#endif
}

BRFT_INLINE PhiloxWords philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, PhiloxKey key) {
    uint32_t k0 = key.low, k1 = key.high;
    BRFT_UNROLL
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = multiply_wide(c0, 0xD2511F53u), p1 = multiply_wide(c2, 0xCD9E8D57u);
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c1 = uint32_t(p1);
        c3 = uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// In (0, 1 - 2^-24]: float32(word) rounds up to 2^32 for the last 128 words, and u = 1 would make the noise -inf.
BRFT_INLINE float uniform_from_word(uint32_t word) {
    const float u = float(word) * 0x1p-32f + 0x1p-33f;
    return u < 1.0f - 0x1p-24f ? u : 1.0f - 0x1p-24f;
}

BRFT_INLINE float gumbel_from_word(uint32_t word) { return -logf(-log1pf(-uniform_from_word(word))); }

}  // namespace bandit_rft
