// Rows of floats turned into columns, a square of SIMD vectors at a time. Included by the files that are compiled once
// for each instruction set.
#pragma once

#include "vectors.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector) && BRFT_LANES >= 8
#define BRFT_TRANSPOSES
#endif
#endif

namespace bandit_rft::cpu {
namespace BRFT_ISA {

#if defined(BRFT_TRANSPOSES)
using Whole = Group<BRFT_LANES>::Vector;

#if BRFT_LANES == 16
// Rows to columns, of 16 x 16: by pairs of floats, by pairs of pairs, by quarters.
BRFT_INLINE void transpose(Whole (&x)[16]) {
    Whole t[16];
    BRFT_UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        t[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    BRFT_UNROLL
    for (int i = 0; i < 16; i += 4) {
        BRFT_UNROLL
        for (int j = 0; j < 2; ++j) {
            const Whole a = t[i + j], b = t[i + j + 2];
            x[i + 2 * j] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            x[i + 2 * j + 1] =
                __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    }
    BRFT_UNROLL
    for (int c = 0; c < 4; ++c) {
        const Whole low =
            __builtin_shufflevector(x[c], x[c + 4], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        const Whole high =
            __builtin_shufflevector(x[c], x[c + 4], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        const Whole low2 =
            __builtin_shufflevector(x[c + 8], x[c + 12], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        const Whole high2 =
            __builtin_shufflevector(x[c + 8], x[c + 12], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        t[c] = __builtin_shufflevector(low, low2, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        t[c + 4] = __builtin_shufflevector(low, low2, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        t[c + 8] = __builtin_shufflevector(high, high2, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        t[c + 12] = __builtin_shufflevector(high, high2, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    BRFT_UNROLL
    for (int i = 0; i < 16; ++i) x[i] = t[i];
}
#else
BRFT_INLINE void transpose(Whole (&x)[8]) {
    Whole t[8];
    BRFT_UNROLL
    for (int i = 0; i < 8; i += 2) {
        t[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    BRFT_UNROLL
    for (int i = 0; i < 8; i += 4) {
        BRFT_UNROLL
        for (int j = 0; j < 2; ++j) {
            const Whole a = t[i + j], b = t[i + j + 2];
            x[i + 2 * j] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
            x[i + 2 * j + 1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    BRFT_UNROLL
    for (int c = 0; c < 4; ++c) {
        t[c] = __builtin_shufflevector(x[c], x[c + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        t[c + 4] = __builtin_shufflevector(x[c], x[c + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    BRFT_UNROLL
    for (int i = 0; i < 8; ++i) x[i] = t[i];
}
#endif

// to[k * to_stride + i] = from[i * stride + k] for a square of which `rows` are read, the others 0, and `columns`
// written, each a whole vector.
BRFT_INLINE void transpose_square(const float* from, int64_t stride, int64_t rows, float* to, int64_t to_stride,
                                  int64_t columns) {
    using G = Group<BRFT_LANES>;
    Whole x[BRFT_LANES];
    BRFT_UNROLL
    for (int i = 0; i < BRFT_LANES; ++i) x[i] = i < rows ? G::load(from + i * stride) : Whole{};
    transpose(x);
    BRFT_UNROLL
    for (int i = 0; i < BRFT_LANES; ++i)
        if (i < columns) G::store(to + i * to_stride, x[i]);
}
#endif

// to[k * to_stride + i] = rows[i * stride + k] for `count` rows of `size`, and 0 for the other i < lanes: whole vectors
// of them, the last of which may reach into the next k's, which is written later, and beyond the last k's.
BRFT_INLINE void to_lanes(const float* rows, int64_t stride, int64_t count, int64_t size, float* to, int64_t to_stride,
                          int64_t lanes) {
    int64_t k = 0;
#if defined(BRFT_TRANSPOSES)
    for (; k + BRFT_LANES <= size; k += BRFT_LANES)
        for (int64_t i = 0; i < lanes; i += BRFT_LANES)
            transpose_square(rows + i * stride + k, stride, count - i, to + k * to_stride + i, to_stride, BRFT_LANES);
#endif
    for (; k < size; ++k) {
        int64_t i = 0;
        for (; i < count; ++i) to[k * to_stride + i] = rows[i * stride + k];
        for (; i < lanes; ++i) to[k * to_stride + i] = 0.0f;
    }
}

// Back: rows[i * stride + k] = from[k * kPanel + i] for `count` rows of `size`, and nothing beside them.
BRFT_INLINE void from_panel(const float* from, int64_t count, int64_t size, float* rows, int64_t stride) {
    int64_t k = 0;
#if defined(BRFT_TRANSPOSES)
    for (; k + BRFT_LANES <= size; k += BRFT_LANES)
        for (int64_t i = 0; i < count; i += BRFT_LANES)
            transpose_square(from + k * kPanel + i, kPanel, BRFT_LANES, rows + i * stride + k, stride, count - i);
#endif
    for (; k < size; ++k)
        for (int64_t i = 0; i < count; ++i) rows[i * stride + k] = from[k * kPanel + i];
}

}  // namespace BRFT_ISA
}  // namespace bandit_rft::cpu
