// out [m, n] (+)= a [m, k] . b [k, n] in float32, a tile of out at a time. Compiled once for each instruction set.
//
//   sum[i, j] = sum_k a[i, k] b[k, j],   i < kTileRows, j < kPanel, one chain of fused multiply-adds a sum
//
// Both operands are packed first, as a tile reads them: kTileRows floats of a and kPanel of b at each k. Never in
// memory: a product that is not added to its sum yet, nor more of the large operand, packed, than a tile's rows or
// columns (products.cpp says of the other how much).
#include "product_kernels.h"

#include "vectors.h"
#if BRFT_LANES == 16
#include <immintrin.h>
#endif

namespace bandit_rft::cpu {
namespace BRFT_ISA {

// Sums and one step's operands fill the registers: 24 + 2 + 1 of 32, elsewhere 8 + 2 + 1 of 16.
constexpr int kTileRows = BRFT_LANES == 16 ? 12 : 4;
constexpr int kAheadEvery = 16;  // steps, at one of which memory is asked for

#if BRFT_LANES == 16
// to[k, i] = from[i, k] for 16 of each; rows from `rows` on are 0. Rows of `to` are written in order, 16 floats each.
BRFT_INLINE void transpose(const float* from, int64_t stride, int64_t rows, float* to, int64_t to_stride) {
    __m512 x[16], y[16];
    BRFT_UNROLL
    for (int i = 0; i < 16; ++i) x[i] = i < rows ? _mm512_loadu_ps(from + i * stride) : _mm512_setzero_ps();
    BRFT_UNROLL
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    BRFT_UNROLL
    for (int i = 0; i < 16; i += 4) {
        for (int h = 0; h < 2; ++h) {
            const __m512d a = _mm512_castps_pd(y[i + h]), b = _mm512_castps_pd(y[i + h + 2]);
            x[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    BRFT_UNROLL
    for (int i = 0; i < 4; ++i) {  // x[i]: columns i, 4 + i, 8 + i, 12 + i of rows 0 to 3, and so on
        const __m512 even = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88),
                     odd = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd),
                     even8 = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88),
                     odd8 = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
        y[i] = _mm512_shuffle_f32x4(even, even8, 0x88);
        y[i + 4] = _mm512_shuffle_f32x4(odd, odd8, 0x88);
        y[i + 8] = _mm512_shuffle_f32x4(even, even8, 0xdd);
        y[i + 12] = _mm512_shuffle_f32x4(odd, odd8, 0xdd);
    }
    BRFT_UNROLL
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + i * to_stride, y[i]);
}
#endif

// to[k, i] = from[i * stride + k * step] for i < some <= Width and k < depth, 0 for the other i.
template <int Width>
BRFT_INLINE void pack(const float* from, int64_t stride, int64_t step, int64_t some, int64_t depth, float* to) {
    int64_t k = 0;
#if BRFT_LANES == 16
    if (step == 1) {
        for (; k + 16 <= depth; k += 16)  // where Width is 12, the next row overwrites the 4 floats too many
            for (int i = 0; i < Width; i += 16)
                transpose(from + i * stride + k, stride, some - i, to + k * Width + i, Width);
    }
#endif
    for (; k < depth; ++k) {
        float* row = to + k * Width;
        if (stride == 1 && some == Width) {
            memcpy(row, from + k * step, sizeof(float) * Width);
            continue;
        }
        for (int i = 0; i < Width; ++i) row[i] = i < some ? from[i * stride + k * step] : 0.0f;
    }
}

void pack_rows(const Matrix& a, float* packed) {
    pack<kTileRows>(a.data, a.row_step, a.column_step, a.rows, a.columns, packed);
}
void pack_columns(const Matrix& b, float* packed) {
    pack<kPanel>(b.data, b.column_step, b.row_step, b.columns, b.rows, packed);
}

template <int Rows>
BRFT_INLINE void some_rows_of_tile(int64_t depth, const float* rows, const float* columns, float* out, int64_t stride,
                                   int some_rows, int some_columns, bool accumulate, Ahead ahead) {
    using G = Group<kPanel>;
    for (int i = 0; i < some_rows; ++i) {  // its own lines: they are there when the sums are
        __builtin_prefetch(out + i * stride, 1, 3);
        __builtin_prefetch(out + i * stride + some_columns - 1, 1, 3);
    }
    typename G::Vector sum[Rows][G::kVectors] = {};
    const auto step = [&](int64_t k) {
        typename G::Vector x[G::kVectors];
        BRFT_UNROLL
        for (int c = 0; c < G::kVectors; ++c) x[c] = G::load(columns + k * kPanel + c * G::kWidth);
        BRFT_UNROLL
        for (int i = 0; i < Rows; ++i) {
            BRFT_UNROLL
            for (int c = 0; c < G::kVectors; ++c) sum[i][c] += rows[k * kTileRows + i] * x[c];
        }
    };
    int64_t k = 0;
    for (; k + kAheadEvery <= depth; k += kAheadEvery) {
        if (ahead.count-- > 0) {
            __builtin_prefetch(ahead.data, 0, 2);
            __builtin_prefetch(ahead.data + 64, 0, 2);
            ahead.data += ahead.step;
        }
        for (int i = 0; i < kAheadEvery; ++i) step(k + i);
    }
    for (; k < depth; ++k) step(k);

    if (some_rows == Rows && some_columns == kPanel) {
        BRFT_UNROLL
        for (int i = 0; i < Rows; ++i) {
            BRFT_UNROLL
            for (int c = 0; c < G::kVectors; ++c) {
                float* to = out + i * stride + c * G::kWidth;
                G::store(to, accumulate ? G::load(to) + sum[i][c] : sum[i][c]);
            }
        }
        return;
    }
    alignas(64) float whole[Rows * kPanel];
    BRFT_UNROLL
    for (int i = 0; i < Rows; ++i) {
        BRFT_UNROLL
        for (int c = 0; c < G::kVectors; ++c) G::store(whole + i * kPanel + c * G::kWidth, sum[i][c]);
    }
    for (int i = 0; i < some_rows; ++i)
        for (int j = 0; j < some_columns; ++j) {
            float& to = out[i * stride + j];
            to = accumulate ? to + whole[i * kPanel + j] : whole[i * kPanel + j];
        }
}

// A tile of few rows computes a multiple of 4: no more than 3 of zeros.
void tile(int64_t depth, const float* rows, const float* columns, float* out, int64_t stride, int some_rows,
          int some_columns, bool accumulate, Ahead ahead) {
    if (some_rows <= 4)
        some_rows_of_tile<4>(depth, rows, columns, out, stride, some_rows, some_columns, accumulate, ahead);
    else if (some_rows <= 8)
        some_rows_of_tile<(kTileRows > 8 ? 8 : kTileRows)>(depth, rows, columns, out, stride, some_rows, some_columns,
                                                           accumulate, ahead);
    else
        some_rows_of_tile<kTileRows>(depth, rows, columns, out, stride, some_rows, some_columns, accumulate, ahead);
}

}  // namespace BRFT_ISA

extern const ProductKernels BRFT_PASTE(product_kernels_, BRFT_ISA) = {
    BRFT_ISA::kTileRows, BRFT_ISA::kPanel, BRFT_ISA::pack_rows, BRFT_ISA::pack_columns, BRFT_ISA::tile,
};

}  // namespace bandit_rft::cpu
