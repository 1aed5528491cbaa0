// The core's own matrix products on exactly sized heap buffers, against plain loops in double.
#pragma once

#include "../../csrc/cpu/products.h"
#include "core_cases.h"

namespace {

// A [rows, columns] matrix, `gap` floats between its rows (or, transposed, between its columns).
struct Operand {
    std::vector<float> data;
    Matrix matrix;

    Operand(int64_t rows, int64_t columns, bool transposed, int64_t gap, std::mt19937& random) {
        const int64_t lines = transposed ? columns : rows, length = transposed ? rows : columns;
        data.resize(size_t(lines * (length + gap) - (lines ? gap : 0)));
        std::normal_distribution<float> normal;
        for (float& x : data) x = normal(random);
        const int64_t step = length + gap;
        matrix = {data.data(), rows, columns, transposed ? 1 : step, transposed ? step : 1};
    }
};

// A sum of k terms has the same bits whatever rows and threads it is computed beside.
void product_case(int64_t m, int64_t n, int64_t k, bool a_transposed, bool b_transposed, int64_t gap, int threads,
                  std::mt19937& random) {
    const Operand a(m, k, a_transposed, gap, random), b(k, n, b_transposed, gap, random);
    const int64_t stride = n + gap;
    const size_t size = size_t(m ? (m - 1) * stride + n : 0);
    for (const bool few : {true, false}) {
        const auto multiply = few ? product_of_few_rows : product_of_many_rows;
        std::vector<float> out(size, NAN), alone(size_t(n), NAN);
        multiply(a.matrix, b.matrix, out.data(), stride, false, threads);
        const auto exact = [&](int64_t i, int64_t j) {
            double sum = 0;
            for (int64_t l = 0; l < k; ++l) sum += double(*a.matrix.at(i, l)) * *b.matrix.at(l, j);
            return sum;
        };
        const double near = 1e-5 * (1 + double(k) / 16);
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < stride; ++j) {
                if (j >= n && i == m - 1) break;
                const float got = out[size_t(i * stride + j)];
                check(j < n ? std::fabs(got - exact(i, j)) < near : std::isnan(got), "product", m, n);
            }
        if (m == 0) continue;
        const std::vector<float> once = out;
        multiply(a.matrix.part(m - 1, 0, 1, k), b.matrix, alone.data(), n, false, 1);
        check(n == 0 || std::memcmp(alone.data(), &out[size_t((m - 1) * stride)], size_t(n) * 4) == 0,
              "product: a row alone", m, n);
        multiply(a.matrix, b.matrix, out.data(), stride, true, threads);
        for (int64_t i = 0; i < m; ++i)
            for (size_t j = size_t(i * stride); j < size_t(i * stride + n); ++j)
                check(std::fabs(out[j] - 2.0 * once[j]) < near, "product: accumulated", m, n);
    }
}

}  // namespace
