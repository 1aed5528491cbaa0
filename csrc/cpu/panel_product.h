// Rows of a weight times a panel of vectors (vectors.h): what decoding, and drawing from the head, are made of.
//
//   sums[r, l] = sum_k weight[r, k] panel[k, l]
//
// Weights are read as they lie, once for a panel. Every sum is one chain of fused multiply-adds over k, in stretches of
// 256 that are summed in order, whatever is computed beside it: a vector's product has the same bits in any batch.
#pragma once

#include "transpose.h"

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
#if defined(BRFT_TRANSPOSES)
constexpr int kFewVectors = 4;     // up to which that needs fewer instructions
constexpr int kRowsOfFew = 16;     // rows of the weight, whose lines of the cache are read whole
constexpr int kAhead = 8 * kLine;  // floats of each row that are asked for before they are read; then the next rows'

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

// sums[v, r] = sum_k weight[r, k] x[v, k] for up to kRowsOfFew rows and 1 to kFewVectors vectors.
BRFT_INLINE void few_product(int rows, const float* weight, int64_t weight_stride, const float* x, int64_t x_stride,
                             int64_t size, int64_t vectors, float (*sums)[kRowsOfFew]) {
    switch (vectors) {
        case 1:
            return few_rows<1>(rows, weight, weight_stride, x, x_stride, size, sums);
        case 2:
            return few_rows<2>(rows, weight, weight_stride, x, x_stride, size, sums);
        case 3:
            return few_rows<3>(rows, weight, weight_stride, x, x_stride, size, sums);
        case 4:
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
