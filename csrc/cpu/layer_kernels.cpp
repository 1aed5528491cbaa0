// The loops of layers.h over rows. Compiled once for each instruction set.
#include "layers.h"

#include "vectors.h"

namespace bandit_rft::cpu {
namespace BRFT_ISA {

BRFT_INLINE float inverse_rms(const float* x, int64_t size, float eps) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t k = 0; k < size; ++k) squares += x[k] * x[k];
    return 1.0f / sqrtf(squares / float(size) + eps);
}

void norm_forward(const Norm& n, int64_t begin, int64_t end, float* out) {
    const float* w = n.weight;
    const int64_t size = n.size;
    for (int64_t i = begin; i < end; ++i) {
        const float *x = n.x + i * size, r = inverse_rms(x, size, n.eps);
        float* y = out + i * size;
#pragma omp simd
        for (int64_t k = 0; k < size; ++k) y[k] = x[k] * r * w[k];
    }
}

void norm_backward(const Norm& n, int64_t begin, int64_t end, const float* dy, const float* add, float* dx,
                   float* dweight) {
    const float* w = n.weight;
    const int64_t size = n.size;
    for (int64_t i = begin; i < end; ++i) {
        const float *x = n.x + i * size, *d = dy + i * size, r = inverse_rms(x, size, n.eps);
        float* to = dx + i * size;
        float product = 0.0f;
#pragma omp simd reduction(+ : product)
        for (int64_t k = 0; k < size; ++k) product += w[k] * d[k] * x[k];
        const float share = product * r * r / float(size);
        if (add) {
            const float* more = add + i * size;
#pragma omp simd
            for (int64_t k = 0; k < size; ++k) to[k] = more[k] + r * (w[k] * d[k] - x[k] * share);
        } else {
#pragma omp simd
            for (int64_t k = 0; k < size; ++k) to[k] = r * (w[k] * d[k] - x[k] * share);
        }
        if (dweight) {
#pragma omp simd
            for (int64_t k = 0; k < size; ++k) dweight[k] += d[k] * x[k] * r;
        }
    }
}

void rotate(float* x, const float* cos, const float* sin, int64_t heads, int64_t head_size, bool back) {
    const int64_t half = head_size / 2;
    for (int64_t h = 0; h < heads; ++h) {
        float *low = x + h * head_size, *high = low + half;
        if (back) {
#pragma omp simd
            for (int64_t d = 0; d < half; ++d) {
                const float a = low[d], b = high[d];
                low[d] = a * cos[d] + b * sin[d + half];
                high[d] = b * cos[d + half] - a * sin[d];
            }
        } else {
#pragma omp simd
            for (int64_t d = 0; d < half; ++d) {
                const float a = low[d], b = high[d];
                low[d] = a * cos[d] - b * sin[d];
                high[d] = b * cos[d + half] + a * sin[d + half];
            }
        }
    }
}

void silu_forward(const float* gate, const float* up, int64_t count, float* out) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

void silu_backward(const float* gate, const float* up, const float* dy, int64_t count, float* dgate, float* dup,
                   float* out) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        const float g = gate[i], u = up[i], d = dy[i], s = sigmoid(g);
        out[i] = g * s * u;
        dup[i] = d * g * s;
        dgate[i] = d * u * s * (1.0f + g * (1.0f - s));
    }
}

}  // namespace BRFT_ISA

const LayerKernels BRFT_PASTE(layer_kernels_, BRFT_ISA) = {
    BRFT_ISA::norm_forward, BRFT_ISA::norm_backward, BRFT_ISA::rotate, BRFT_ISA::silu_forward, BRFT_ISA::silu_backward,
};

}  // namespace bandit_rft::cpu
