// What the CPU kernels of one instruction set offer. kernels.cpp is compiled once for each instruction set into such a
// table; operations.cpp chooses among them at run time. Everything here works on raw rows, owns nothing, starts no
// thread.
#pragma once

#include <cstdint>

#include "../philox.h"
#include "../row_math.h"
#include "../tensor_view.h"
#include "attention.h"
#include "decoder_kernels.h"
#include "layers.h"
#include "product_kernels.h"

namespace bandit_rft::cpu {

// A multiple of every vector width, of 4 (one Philox counter) and of every head tile; three such buffers fit in L1.
constexpr int kBlock = 768;

// One row of logits. Statistics are always float32, accumulated over blocks in double.
struct Row {
    const void* logits;  // f32 or bf16
    DType dtype;
    int64_t vocabulary;
    Scaling scaling;
    float temperature;
};

struct Draw {
    float best = -INFINITY;
    int64_t token = -1;
};

struct Stream {  // the Philox counter and key of one draw
    PhiloxKey key;
    uint32_t position, sequence_low, sequence_high;
};

struct Kernels {
    const char* name;
    int lanes;
    int head_panel;                      // batch rows packed side by side, where they are not few
    int (*rows_at_once)(int64_t batch);  // rows of the weight handled at a time where so many are multiplied

    // softmax state of a row
    SoftmaxState<double> (*row_state)(const Row&);
    // z of one logit of the row
    float (*row_logit)(const Row&, int64_t index);
    // z of the whole row, float32 [V]
    void (*row_scaled)(const Row&, float* z);
    // dz written over the row's own logits (same dtype); c and e as in row_math.h
    void (*row_gradient)(const Row&, void* out, int64_t target, const SoftmaxState<double>&, float c, float e);
    // The same gradient for e = 0, float32 and no softcap, with one exponential a logit instead of two: the first
    // leaves exp(z - block maximum) over the row and the maxima in `block_max`, the second only scales them.
    SoftmaxState<double> (*row_exponentials)(const Row&, float* exponentials, float* block_max);
    void (*scale_exponentials)(float* exponentials, int64_t vocabulary, const float* block_max, int64_t target,
                               float logp_target, const SoftmaxState<double>&, float c);
    // softmax state of a row and the Gumbel-max draw from it, in one pass
    SoftmaxState<double> (*row_draw)(const Row&, const Stream&, Draw&);
    // out[b, v] = sum_k weight[v, k] hidden[b, k] + bias[v] for v in [begin, end); `packed` comes from pack_hidden.
    // The order of the sum depends on k alone, so a row's logits are the same bits in any batch. scratch [rows_at_once
    // * H] where the weight is not float32.
    void (*head_logits)(const float* packed, int64_t batch, int64_t hidden_size, const void* weight, DType weight_dtype,
                        int64_t weight_stride, const float* bias, int64_t begin, int64_t end, float* out,
                        int64_t out_stride, float* scratch);
    // [panels, H, head_panel] float32, zero-padded; [batch, H] of up to decoder->few
    void (*pack_hidden)(const void* hidden, DType dtype, int64_t stride, int64_t batch, int64_t hidden_size,
                        float* packed);

    const DecoderKernels* decoder;
    const AttentionKernels* attention;
    const LayerKernels* layer;
    const ProductKernels* product;
};

#if defined(BRFT_X86_DISPATCH)
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_baseline;

// Those of the instruction set in use (operations.cpp).
const Kernels& kernels();

}  // namespace bandit_rft::cpu
