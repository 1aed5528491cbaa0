// What stands between the products of a decoder layer, forward and backward; float32, rows contiguous.
//
//   rms norm     y = x r w,  r = 1 / sqrt(mean(x^2) + eps);   dx = r (w dy - x r^2 mean(w dy x)),  dw = sum dy x r
//   rotation     (a, b) -> (a cos - b sin, b cos + a sin) of the two halves of a head; backward its transpose
//   gated SiLU   y = g s u,  s = 1 / (1 + exp(-g));   du = dy g s,  dg = dy u s (1 + g (1 - s))
//
// Never in memory: x^2, x r, the halves of a head apart, s. Results have the same bits on any number of threads.
#pragma once

#include <cstdint>

namespace bandit_rft::cpu {

struct Norm {
    const float *x, *weight;  // [rows, size], [size]
    int64_t rows, size;
    float eps;
};
void norm_forward(const Norm&, float* out, int threads);
// dx = add + the norm's own; `add` may be null, and dweight [size], if nobody wants it.
void norm_backward(const Norm&, const float* dy, const float* add, float* dx, float* dweight, int threads);

void gated_silu_forward(const float* gate, const float* up, int64_t count, float* out, int threads);
// out is computed once more: its memory did not have to be kept. dup may be dy.
void gated_silu_backward(const float* gate, const float* up, const float* dy, int64_t count, float* dgate, float* dup,
                         float* out, int threads);

struct LayerKernels {
    void (*norm_forward)(const Norm&, int64_t begin, int64_t end, float* out);
    void (*norm_backward)(const Norm&, int64_t begin, int64_t end, const float* dy, const float* add, float* dx,
                          float* dweight);  // to which is added
    // In place, x [heads, head_size] of one token by cos and sin [head_size]; `back`: the gradient's way.
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t heads, int64_t head_size, bool back);
    void (*silu_forward)(const float* gate, const float* up, int64_t count, float* out);
    void (*silu_backward)(const float* gate, const float* up, const float* dy, int64_t count, float* dgate, float* dup,
                          float* out);
};

#if defined(BRFT_X86_DISPATCH)
extern const LayerKernels layer_kernels_avx512;
extern const LayerKernels layer_kernels_avx2;
#endif
extern const LayerKernels layer_kernels_baseline;

}  // namespace bandit_rft::cpu
