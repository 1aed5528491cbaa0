// Tiles of a float32 matrix product, of one instruction set; product_kernels.cpp, compiled once for each.
#pragma once

#include <cstdint>

namespace bandit_rft::cpu {

// float32 [rows, columns] at data[i * row_step + j * column_step]; one of the two steps is 1.
struct Matrix {
    const float* data;
    int64_t rows, columns, row_step, column_step;

    const float* at(int64_t i, int64_t j) const { return data + i * row_step + j * column_step; }
    Matrix part(int64_t i, int64_t j, int64_t some_rows, int64_t some_columns) const {
        return {at(i, j), some_rows, some_columns, row_step, column_step};
    }
};

// Memory that will be read next, asked for while a tile is computed: `count` times two cache lines, `step` bytes apart.
struct Ahead {
    const char* data = nullptr;
    int64_t step = 0, count = 0;
};

struct ProductKernels {
    int rows, columns;  // of a tile of the result; its sums stay in registers
    // rows of a [some, depth] side by side, [depth, rows], and columns of b [depth, some], [depth, columns]; those
    // missing to a whole tile are 0. Up to kSlack floats after them are overwritten.
    void (*pack_rows)(const Matrix& a, float* packed);
    void (*pack_columns)(const Matrix& b, float* packed);
    // out [a.rows, some_columns] (+)= a . packed columns; a is what pack_rows wrote, up to `rows` rows with a row_step
    // of 1 and a column_step of `rows`; or it is where it was: all `rows` rows with a column_step of 1, or a multiple
    // of 4 of them with a row_step of 1.
    void (*tile)(const Matrix& a, const float* columns, float* out, int64_t out_stride, int some_columns,
                 bool accumulate, Ahead ahead);
};
constexpr int kSlack = 16;

#if defined(BRFT_X86_DISPATCH)
extern const ProductKernels product_kernels_avx512;
extern const ProductKernels product_kernels_avx2;
#endif
extern const ProductKernels product_kernels_baseline;

}  // namespace bandit_rft::cpu
