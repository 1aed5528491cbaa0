// out [m, n] (+)= a [m, k] . b [k, n] in float32, a tile of out at a time. Compiled once for each instruction set.
//
//   sum[i, j] = sum_k a[i, k] b[k, j],   i < kTileRows, j < kPanel, one chain of fused multiply-adds a sum
//
// Operands are packed first as a tile reads them, kTileRows floats of a and kPanel of b at each k; rows of a may be
// read where they are. Never in memory: a product that is not added to its sum yet, nor the larger operand, packed
// (products.cpp says how much of each is).
#include "product_kernels.h"

#include "transpose.h"

namespace bandit_rft::cpu {
namespace BRFT_ISA {

// Sums and one step's operands fill the registers: 24 + 2 + 1 of 32, elsewhere 8 + 2 + 1 of 16.
constexpr int kTileRows = BRFT_LANES == 16 ? 12 : 4;
constexpr int kAheadEvery = 16;  // steps, at one of which memory is asked for

// to[k, i] = from[i * stride + k * step] for i < some <= Width and k < depth, 0 for the other i.
template <int Width>
BRFT_INLINE void pack(const float* from, int64_t stride, int64_t step, int64_t some, int64_t depth, float* to) {
    if (step == 1) return to_lanes(from, stride, some, depth, to, Width, Width);
    for (int64_t k = 0; k < depth; ++k) {
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

// A row's terms lie one after the other (Along), or those of a column do.
template <int Rows, bool Along>
BRFT_INLINE void rows_of_tile(const Matrix& a, const float* columns, float* out, int64_t stride, int some_columns,
                              bool accumulate, Ahead ahead) {
    using G = Group<kPanel>;
    const int64_t some_rows = a.rows, depth = a.columns, step_of_rows = Along ? a.row_step : a.column_step;
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
            const float term = a.data[Along ? i * step_of_rows + k : k * step_of_rows + i];
            BRFT_UNROLL
            for (int c = 0; c < G::kVectors; ++c) sum[i][c] += term * x[c];
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

// A tile of few rows side by side in memory computes a multiple of 4, of which packing has made the rest zeros. Others
// are whole.
void tile(const Matrix& a, const float* columns, float* out, int64_t stride, int some_columns, bool accumulate,
          Ahead ahead) {
    if (a.row_step != 1)
        rows_of_tile<kTileRows, true>(a, columns, out, stride, some_columns, accumulate, ahead);
    else if (a.rows <= 4)
        rows_of_tile<4, false>(a, columns, out, stride, some_columns, accumulate, ahead);
    else if (a.rows <= 8)
        rows_of_tile<(kTileRows > 8 ? 8 : kTileRows), false>(a, columns, out, stride, some_columns, accumulate, ahead);
    else
        rows_of_tile<kTileRows, false>(a, columns, out, stride, some_columns, accumulate, ahead);
}

}  // namespace BRFT_ISA

extern const ProductKernels BRFT_PASTE(product_kernels_, BRFT_ISA) = {
    BRFT_ISA::kTileRows, BRFT_ISA::kPanel, BRFT_ISA::pack_rows, BRFT_ISA::pack_columns, BRFT_ISA::tile,
};

}  // namespace bandit_rft::cpu
