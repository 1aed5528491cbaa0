// What the kernels of one instruction set are written with: exponentials, and panels of vectors. Included by the files
// that are compiled once for each instruction set (BRFT_ISA, BRFT_LANES).
//
// Loops are written for the compiler's vectorizer; nothing here may instantiate a template of the standard library,
// since the linker keeps one copy of those for all instruction sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../portable.h"

#ifndef BRFT_ISA
#error "compile with -DBRFT_ISA=<name> -DBRFT_LANES=<float lanes>"
#endif

#define BRFT_PASTE2(a, b) a##b
#define BRFT_PASTE(a, b) BRFT_PASTE2(a, b)
#define BRFT_STRING2(a) #a
#define BRFT_STRING(a) BRFT_STRING2(a)

namespace bandit_rft::cpu {
namespace BRFT_ISA {

BRFT_INLINE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
BRFT_INLINE uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
BRFT_INLINE float from_bf16(uint16_t x) { return from_bits(uint32_t(x) << 16); }
BRFT_INLINE uint16_t to_bf16(float x) {  // round to nearest even; a NaN stays one
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t(x != x ? 0x7FC0u : rounded);
}

// Where float32 has no normal number left for exp(x); the maximum instruction leaves a NaN in place in this order.
constexpr float kExpFloor = -88.0f;
BRFT_INLINE float exp_domain(float x) { return kExpFloor > x ? kExpFloor : x; }

// exp(x) to about 1 ulp for kExpFloor <= x <= 88, and exactly 0 at kExpFloor (its power of two has no bits); NaN stays.
BRFT_INLINE float exp_inside(float x) {
    const float shifted = x * 1.44269504f + 12582912.0f;  // round to nearest by the magic number 1.5 * 2^23
    const float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * from_bits((to_bits(shifted) + (127u - 0x4B400000u)) << 23);
}

BRFT_INLINE float exp_fast(float x) { return exp_inside(exp_domain(x)); }

// 1 / (1 + exp(-x)), 0 below -88; a NaN stays.
BRFT_INLINE float sigmoid(float x) { return x < -88.0f ? 0.0f : 1.0f / (1.0f + exp_fast(-x)); }

// tanh(x) to a few ulp: odd polynomial near 0 (where 1 - 2/(e^2x + 1) cancels), the exponential form elsewhere.
BRFT_INLINE float tanh_fast(float x) {
    const float magnitude = x < 0 ? -x : x;
    const float limited = magnitude > 44.0f ? 44.0f : magnitude;
    const float far = 1.0f - 2.0f / (exp_fast(2.0f * limited) + 1.0f);
    const float x2 = x * x;
    float p = -5.70498872745e-3f;
    p = p * x2 + 2.06390887954e-2f;
    p = p * x2 - 5.37397155531e-2f;
    p = p * x2 + 1.33314422036e-1f;
    p = p * x2 - 3.33332819422e-1f;
    const float near = p * x2 * x + x;
    return magnitude < 0.625f ? near : (x < 0 ? -far : far);
}

// A panel is kPanel vectors side by side, [size, kPanel]: lanes run over the batch (panel_product.h).
constexpr int kPanel = 2 * BRFT_LANES;  // two SIMD vectors
// The fewest lanes that are computed: half a vector of 512 bits, which some processors multiply in two halves anyway.
constexpr int kFew = BRFT_LANES == 16 ? 8 : BRFT_LANES;

// Lanes of a panel that are computed where the first `width` count.
BRFT_INLINE int computed_lanes(int width) { return width > BRFT_LANES ? kPanel : width > kFew ? BRFT_LANES : kFew; }

// So many lanes in SIMD vectors.
template <int Lanes>
struct Group {
    static constexpr int kLanes = Lanes, kWidth = Lanes < BRFT_LANES ? Lanes : BRFT_LANES, kVectors = Lanes / kWidth;
    typedef float Vector __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

    // Not by memcpy: GCC moves 32 bytes in halves, through memory, unless it is told of a newer processor than AVX2's.
    BRFT_INLINE Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
    BRFT_INLINE void store(float* to, Vector x) { *reinterpret_cast<Vector*>(to) = x; }
};

}  // namespace BRFT_ISA
}  // namespace bandit_rft::cpu
