// What the kernels of one instruction set are written with: exponentials, and products of a few rows of weights with a
// panel of vectors. Included by the files that are compiled once for each instruction set (BRFT_ISA, BRFT_LANES).
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

// A panel is kPanel vectors side by side, [size, kPanel]: lanes run over the batch. So weights are read once, as they
// lie, and every output is one chain of fused multiply-adds over k (in stretches of 256, summed in order) whatever else
// is computed beside it: a vector's product has the same bits in any batch.
typedef float Vector __attribute__((vector_size(BRFT_LANES * 4), aligned(4)));
constexpr int kColumns = 2;  // SIMD vectors in a row of a panel
constexpr int kPanel = kColumns * BRFT_LANES;
constexpr int kTile = BRFT_LANES == 16 ? 12 : 6;  // weight rows whose sums stay in registers
constexpr int kPart = kTile / 3;                  // and those of the remainder
constexpr int kStretch = 256;

BRFT_INLINE Vector load(const float* from) {
    Vector x;
    memcpy(&x, from, sizeof(Vector));
    return x;
}
BRFT_INLINE void store(float* to, Vector x) { memcpy(to, &x, sizeof(Vector)); }

// sums[r, l] = sum_k weight[r, k] panel[k, l] for the first `Columns` SIMD vectors of the panel.
template <int Rows, int Columns>
BRFT_INLINE void tile_product(const float* weight, int64_t weight_stride, const float* panel, int64_t size,
                              float* sums) {
    for (int64_t start = 0; start == 0 || start < size; start += kStretch) {
        const int64_t stop = start + kStretch < size ? start + kStretch : size;
        Vector sum[Rows][Columns] = {};
        for (int64_t k = start; k < stop; ++k) {
            Vector x[Columns];
            BRFT_UNROLL
            for (int c = 0; c < Columns; ++c) x[c] = load(panel + k * kPanel + c * BRFT_LANES);
            BRFT_UNROLL
            for (int r = 0; r < Rows; ++r) {
                const float w = weight[r * weight_stride + k];
                BRFT_UNROLL
                for (int c = 0; c < Columns; ++c) sum[r][c] += w * x[c];
            }
        }
        BRFT_UNROLL
        for (int r = 0; r < Rows; ++r) {
            BRFT_UNROLL
            for (int c = 0; c < Columns; ++c) {
                float* to = sums + r * kPanel + c * BRFT_LANES;
                store(to, start == 0 ? sum[r][c] : load(to) + sum[r][c]);
            }
        }
    }
}

// The same for up to kTile rows and the first `width` lanes of the panel (all that are computed at least).
template <int Columns>
BRFT_INLINE void some_rows(int rows, const float* weight, int64_t weight_stride, const float* panel, int64_t size,
                           float* sums) {
    if (rows == kTile) return tile_product<kTile, Columns>(weight, weight_stride, panel, size, sums);
    int r = 0;
    for (; r + kPart <= rows; r += kPart)
        tile_product<kPart, Columns>(weight + r * weight_stride, weight_stride, panel, size, sums + r * kPanel);
    for (; r < rows; ++r)
        tile_product<1, Columns>(weight + r * weight_stride, weight_stride, panel, size, sums + r * kPanel);
}
BRFT_INLINE void rows_product(int rows, const float* weight, int64_t weight_stride, const float* panel, int64_t size,
                              int width, float* sums) {
    if (width > BRFT_LANES)
        some_rows<kColumns>(rows, weight, weight_stride, panel, size, sums);
    else
        some_rows<1>(rows, weight, weight_stride, panel, size, sums);
}

}  // namespace BRFT_ISA
}  // namespace bandit_rft::cpu
