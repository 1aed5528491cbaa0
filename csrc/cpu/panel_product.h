// Rows of a weight times a panel of vectors (vectors.h): what decoding, and drawing from the head, are made of.
//
//   sums[r, l] = sum_k weight[r, k] panel[k, l]
//
// Weights are read as they lie, once for a panel. Every sum is one chain of fused multiply-adds over k, in stretches of
// 256 that are summed in order, whatever is computed beside it: a vector's product has the same bits in any batch.
#pragma once

#include "vectors.h"

namespace bandit_rft::cpu {
namespace BRFT_ISA {

// Weight rows whose sums stay in registers; no more than 8, which is how many lines a set of the first cache holds:
// rows of 1024 floats lie in the same sets, and each line is read several times.
constexpr int kTile = BRFT_LANES == 16 ? 8 : 6;
constexpr int kPart = 2;  // and those of the remainder
constexpr int kStretch = 256;
constexpr int kLine = 16;  // floats of a cache line

// sums[r, l] += sum_k weight[r, k] panel[k, l] for `Steps` of k: a row's weights from one pointer.
template <int Rows, int Steps, class G>
BRFT_INLINE void add_steps(const float* weight, int64_t weight_stride, const float* panel,
                           typename G::Vector (&sum)[Rows][G::kVectors]) {
    typename G::Vector x[Steps][G::kVectors];
    BRFT_UNROLL
    for (int i = 0; i < Steps; ++i) {
        BRFT_UNROLL
        for (int c = 0; c < G::kVectors; ++c) x[i][c] = G::load(panel + i * kPanel + c * G::kWidth);
    }
    BRFT_UNROLL
    for (int r = 0; r < Rows; ++r) {
        const float* row = weight + r * weight_stride;
        BRFT_UNROLL
        for (int i = 0; i < Steps; ++i) {
            BRFT_UNROLL
            for (int c = 0; c < G::kVectors; ++c) sum[r][c] += row[i] * x[i][c];
        }
    }
}

// sums[r, l] = sum_k weight[r, k] panel[k, l] for the first `Lanes` lanes of the panel.
//
// Rows are read side by side, which no processor foresees; those of the next tile, which follow where rows are
// contiguous, are asked for in the order they lie in: a cache line of each row while one is multiplied.
template <int Rows, int Lanes>
BRFT_ALONE void tile_product(const float* weight, int64_t weight_stride, const float* panel, int64_t size,
                             float* sums) {
    using G = Group<Lanes>;
    constexpr int kSteps = BRFT_LANES < 16 ? 1 : G::kVectors == 1 ? 8 : 4;  // as there are registers
    for (int64_t start = 0; start == 0 || start < size; start += kStretch) {
        const int64_t stop = start + kStretch < size ? start + kStretch : size;
        typename G::Vector sum[Rows][G::kVectors] = {};
        int64_t k = start;
        for (; k + kLine <= stop; k += kLine) {
            const float* next = weight + Rows * weight_stride + k * Rows;
            BRFT_UNROLL
            for (int r = 0; r < Rows; ++r) __builtin_prefetch(next + r * kLine, 0, 2);
            for (int i = 0; i < kLine; i += kSteps)
                add_steps<Rows, kSteps, G>(weight + k + i, weight_stride, panel + (k + i) * kPanel, sum);
        }
        for (; k < stop; ++k) add_steps<Rows, 1, G>(weight + k, weight_stride, panel + k * kPanel, sum);
        BRFT_UNROLL
        for (int r = 0; r < Rows; ++r) {
            BRFT_UNROLL
            for (int c = 0; c < G::kVectors; ++c) {
                float* to = sums + r * kPanel + c * G::kWidth;
                G::store(to, start == 0 ? sum[r][c] : G::load(to) + sum[r][c]);
            }
        }
    }
}

// The same for so many rows and the first `width` lanes of the panel (all that are computed at least).
template <int Lanes>
BRFT_INLINE void some_rows(int rows, const float* weight, int64_t weight_stride, const float* panel, int64_t size,
                           float* sums) {
    int r = 0;
    for (; r + kTile <= rows; r += kTile)
        tile_product<kTile, Lanes>(weight + r * weight_stride, weight_stride, panel, size, sums + r * kPanel);
    for (; r + kPart <= rows; r += kPart)
        tile_product<kPart, Lanes>(weight + r * weight_stride, weight_stride, panel, size, sums + r * kPanel);
    for (; r < rows; ++r)
        tile_product<1, Lanes>(weight + r * weight_stride, weight_stride, panel, size, sums + r * kPanel);
}

// A few vectors would leave most lanes of a panel empty. They lie each for itself, [vectors, size], and lanes run over
// the rows of the weight instead: squares of it are transposed in registers, and each sum is the same chain, with the
// same bits.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector) && BRFT_LANES >= 8
#define BRFT_TRANSPOSES
#endif
#endif

#if defined(BRFT_TRANSPOSES)
constexpr int kFewVectors = 4;     // up to which that needs fewer instructions
constexpr int kRowsOfFew = 16;     // rows of the weight, whose lines of the cache are read whole
constexpr int kAhead = 8 * kLine;  // floats of each row that are asked for before they are read; then the next rows'

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

// sums[v, r] = sum_k weight[r, k] x[v, k] for kRowsOfFew rows, or (if not Full) for `rows` of them.
template <int Vectors, bool Full>
BRFT_ALONE void few_vectors(int rows, const float* weight, int64_t weight_stride, const float* x, int64_t x_stride,
                            int64_t size, float (*sums)[kRowsOfFew]) {
    using G = Group<BRFT_LANES>;
    constexpr int kSquares = kRowsOfFew / BRFT_LANES;
    const auto row = [&](int r) { return weight + (Full || r < rows ? r : rows - 1) * weight_stride; };
    for (int64_t start = 0; start == 0 || start < size; start += kStretch) {
        const int64_t stop = start + kStretch < size ? start + kStretch : size;
        Whole sum[kSquares][Vectors] = {};
        int64_t k = start;
        for (; k + kLine <= stop; k += kLine) {
            const float* next =
                k + kAhead < size ? weight + k + kAhead : weight + kRowsOfFew * weight_stride + k + kAhead - size;
            BRFT_UNROLL
            for (int r = 0; r < kRowsOfFew; ++r) __builtin_prefetch(next + r * weight_stride, 0, 2);
            BRFT_UNROLL
            for (int s = 0; s < kSquares; ++s) {
                for (int i = 0; i < kLine; i += BRFT_LANES) {  // all of a line, before the next rows take its place
                    Whole columns[BRFT_LANES];
                    BRFT_UNROLL
                    for (int r = 0; r < BRFT_LANES; ++r) columns[r] = G::load(row(s * BRFT_LANES + r) + k + i);
                    transpose(columns);
                    BRFT_UNROLL
                    for (int j = 0; j < BRFT_LANES; ++j) {
                        BRFT_UNROLL
                        for (int v = 0; v < Vectors; ++v) sum[s][v] += columns[j] * x[v * x_stride + k + i + j];
                    }
                }
            }
        }
        for (; k < stop; ++k) {
            BRFT_UNROLL
            for (int s = 0; s < kSquares; ++s) {
                Whole column;
                for (int r = 0; r < BRFT_LANES; ++r) column[r] = row(s * BRFT_LANES + r)[k];
                BRFT_UNROLL
                for (int v = 0; v < Vectors; ++v) sum[s][v] += column * x[v * x_stride + k];
            }
        }
        BRFT_UNROLL
        for (int v = 0; v < Vectors; ++v) {
            BRFT_UNROLL
            for (int s = 0; s < kSquares; ++s) {
                float* to = sums[v] + s * BRFT_LANES;
                G::store(to, start == 0 ? sum[s][v] : G::load(to) + sum[s][v]);
            }
        }
    }
}
#else
constexpr int kFewVectors = 1, kRowsOfFew = 16;

// The same in plain loops: rows are independent of each other.
template <int Vectors, bool Full>
BRFT_ALONE void few_vectors(int rows, const float* weight, int64_t weight_stride, const float* x, int64_t x_stride,
                            int64_t size, float (*sums)[kRowsOfFew]) {
    const int count = Full ? kRowsOfFew : rows;
    for (int v = 0; v < Vectors; ++v)
        for (int64_t start = 0; start == 0 || start < size; start += kStretch) {
            const int64_t stop = start + kStretch < size ? start + kStretch : size;
            float sum[kRowsOfFew] = {};
            for (int64_t k = start; k < stop; ++k)
                for (int r = 0; r < count; ++r) sum[r] += weight[r * weight_stride + k] * x[v * x_stride + k];
            for (int r = 0; r < count; ++r) sums[v][r] = start == 0 ? sum[r] : sums[v][r] + sum[r];
        }
}
#endif

template <int Vectors>
BRFT_INLINE void few_rows(int rows, const float* weight, int64_t weight_stride, const float* x, int64_t x_stride,
                          int64_t size, float (*sums)[kRowsOfFew]) {
    rows == kRowsOfFew ? few_vectors<Vectors, true>(rows, weight, weight_stride, x, x_stride, size, sums)
                       : few_vectors<Vectors, false>(rows, weight, weight_stride, x, x_stride, size, sums);
}

// sums[v, r] = sum_k weight[r, k] x[v, k] for up to kRowsOfFew rows and kFewVectors vectors.
BRFT_INLINE void few_product(int rows, const float* weight, int64_t weight_stride, const float* x, int64_t x_stride,
                             int64_t size, int64_t vectors, float (*sums)[kRowsOfFew]) {
    switch (vectors) {
        case 1:
            return few_rows<1>(rows, weight, weight_stride, x, x_stride, size, sums);
        case 2:
            return few_rows<2>(rows, weight, weight_stride, x, x_stride, size, sums);
        case 3:
            return few_rows<3>(rows, weight, weight_stride, x, x_stride, size, sums);
        default:
            static_assert(kFewVectors <= 4, "each has its case");
            return few_rows<4>(rows, weight, weight_stride, x, x_stride, size, sums);
    }
}

// Rows of a weight that are taken at a time where so many vectors are multiplied.
BRFT_INLINE int rows_at_once(int64_t vectors) { return vectors <= kFewVectors ? kRowsOfFew : kTile; }

// sums[r, l] = sum_k weight[r, k] panel[k, l] for up to kTile rows and the first `width` lanes of the panel.
BRFT_INLINE void rows_product(int rows, const float* weight, int64_t weight_stride, const float* panel, int64_t size,
                              int width, float* sums) {
    switch (computed_lanes(width)) {
        case kPanel:
            return some_rows<kPanel>(rows, weight, weight_stride, panel, size, sums);
        case kFew:
            return some_rows<kFew>(rows, weight, weight_stride, panel, size, sums);
        default:
            return some_rows<BRFT_LANES>(rows, weight, weight_stride, panel, size, sums);
    }
}

}  // namespace BRFT_ISA
}  // namespace bandit_rft::cpu
