// What stands between the products of a layer, on exactly sized heap buffers, against plain loops in double.
#pragma once

#include "../../csrc/cpu/layers.h"
#include "core_cases.h"

namespace {

std::vector<float> normals(int64_t count, std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<size_t>(count));
    for (float& value : x) value = normal(random);
    return x;
}

void norm_case(int64_t rows, int64_t size, int threads, std::mt19937& random) {
    const auto x = normals(rows * size, random), w = normals(size, random), dy = normals(rows * size, random),
               more = normals(rows * size, random);
    const Norm norm{x.data(), w.data(), rows, size, 1e-3f};
    std::vector<float> y(x.size(), NAN), dx(x.size(), NAN), dw(size_t(size), NAN), alone(x.size(), NAN);
    norm_forward(norm, y.data(), threads);
    norm_backward(norm, dy.data(), more.data(), dx.data(), dw.data(), threads);
    norm_backward(norm, dy.data(), nullptr, alone.data(), nullptr, threads);
    std::vector<double> of_weight(size_t(size), 0.0);
    for (int64_t i = 0; i < rows; ++i) {
        double squares = 0, product = 0;
        const auto at = [&](int64_t k) { return size_t(i * size + k); };
        for (int64_t k = 0; k < size; ++k) {
            squares += double(x[at(k)]) * x[at(k)];
            product += double(w[size_t(k)]) * dy[at(k)] * x[at(k)];
        }
        const double r = 1 / std::sqrt(squares / double(size) + 1e-3);
        for (int64_t k = 0; k < size; ++k) {
            const double own = r * (w[size_t(k)] * dy[at(k)] - x[at(k)] * r * r * product / double(size));
            check(is_near(y[at(k)], x[at(k)] * r * w[size_t(k)]), "norm", rows, size);
            check(is_near(alone[at(k)], own) && is_near(dx[at(k)], own + more[at(k)]), "norm: dx", rows, size);
            of_weight[size_t(k)] += dy[at(k)] * x[at(k)] * r;
        }
    }
    for (int64_t k = 0; k < size; ++k) check(is_near(dw[size_t(k)], of_weight[size_t(k)]), "norm: dw", rows, size);
    const std::vector<float> once = dw;
    norm_backward(norm, dy.data(), nullptr, alone.data(), dw.data(), 1);
    check(std::memcmp(once.data(), dw.data(), once.size() * 4) == 0, "norm: any number of threads", rows, size);
}

void gated_silu_case(int64_t count, int threads, std::mt19937& random) {
    auto gate = normals(count, random);
    const auto up = normals(count, random), dy = normals(count, random);
    for (size_t i = 0; i < gate.size(); i += 7) gate[i] *= 40;
    std::vector<float> y(gate.size(), NAN), again(gate.size(), NAN), dgate(gate.size(), NAN), dup(gate.size(), NAN);
    gated_silu_forward(gate.data(), up.data(), count, y.data(), threads);
    gated_silu_backward(gate.data(), up.data(), dy.data(), count, dgate.data(), dup.data(), again.data(), threads);
    for (size_t i = 0; i < gate.size(); ++i) {
        const double g = gate[i], s = 1 / (1 + std::exp(-g));
        check(is_near(y[i], g * s * up[i]) && is_near(again[i], y[i]), "gated silu", count, 0);
        check(is_near(dup[i], dy[i] * g * s), "gated silu: up", count, 0);
        check(is_near(dgate[i], double(dy[i]) * up[i] * s * (1 + g * (1 - s))), "gated silu: gate", count, 0);
    }
}

}  // namespace
