// What a decoding step of a transformer needs from one instruction set; decoder_kernels.cpp, compiled once for each.
//
// Everything lies in panels of `panel` sequences, [size, panel] floats: SIMD lanes run over the batch, so every
// sequence is computed alone in its lane, in an order that does not depend on the others. Only the first `members`
// lanes of a panel count (more are computed, up to a whole SIMD vector). A few sequences would leave most of each cache
// line empty, which threads hand to each other: they are panels of one, and lanes run over what each is made of. A sum
// has the same order either way.
#pragma once

#include <cstdint>

namespace bandit_rft::cpu {

// Panels of a batch: panel p begins at p * stride.
struct Panels {
    float* data;
    int64_t stride;
};

// Where the cache has element d of column t of a sequence: at t * column + d * element.
struct Stride {
    int64_t column, element;
};

// One head of keys and values of one panel of new tokens, and the `group` query heads that read it.
struct HeadAttention {
    int members;
    int64_t head_size, group, columns;  // columns of the cache in use, that of the new token included
    float scaling, norm_eps;
    float *query, *key, *value;  // of the new tokens: [group * head_size, panel], [head_size, panel] twice
    // RMS norm of queries and keys before the rotation: null, or the weights; over one head where the inverses are
    // null, otherwise over all heads, whose 1 / rms [panel] are given and whose weights differ from head to head.
    const float *query_norm, *key_norm, *query_inverse, *key_inverse;
    const float *cos, *sin;  // of each lane's position, [head_size, panel]
    float *keys, *values;    // the cache, of the panel's first sequence
    Stride key_stride, value_stride;
    const int32_t* first;  // [panel] the first column that a lane sees
    int32_t lowest_first, highest_first;
    float* scratch;  // [head_size + columns, panel], or [2 head_size + columns] up to whole lines
    float* out;      // [group * head_size, panel]
};

// The same head for `count` new tokens of one sequence, in the lanes from `row` on: the token in row r is lane r %
// panel of panel r / panel.
struct HeadPrefill {
    int64_t head_size, group, row, count;
    int64_t begin;                  // columns of the sequence before these
    Panels query, key, value, out;  // of this head, rotated
    float *keys, *values;           // the cache, from the sequence's first column on
    Stride key_stride, value_stride;
    float* scratch;  // [head_size + columns, panel], and twice [columns, head_size]
};

// For panels of one width.
struct StepKernels {
    int panel;  // sequences side by side
    // out[r] = sum_k weight[r, k] in[k] + bias[r] for rows [begin, end) of weight [rows, size]; bias may be null;
    // scratch [few, size + end - begin]
    void (*product)(const float* weight, const float* bias, int64_t size, int64_t begin, int64_t end, Panels in,
                    int64_t batch, Panels out, float* scratch);
    // out[r] = silu(gate[r] . in) * (up[r] . in)
    void (*gated_product)(const float* gate, const float* up, int64_t size, int64_t begin, int64_t end, Panels in,
                          int64_t batch, Panels out, float* scratch);
    // out = x / rms(x) * weight, over [size, panel]
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t size, int members, float* out);
    // [panel] 1 / rms(x)
    void (*inverse_rms)(const float* x, float eps, int64_t size, int members, float* out);
    // x += y
    void (*add)(float* x, const float* y, int64_t size, int members);
    // Writes the new column of the cache and attends to all of them. For wide panels the cache has a panel's sequences
    // in the lanes, [columns, head_size, lanes]. For panels of one it is each sequence's own, so that lanes run over
    // columns, then over the head: keys [head_size, columns], values [columns, head_size]; both up to a whole multiple
    // of `line`, of which more is read than there is.
    void (*attend)(const HeadAttention&);
};

struct DecoderKernels {
    StepKernels wide, single;
    int (*rows_at_once)(int64_t batch);  // rows of a weight handled at a time where so many are multiplied
    int (*computed_lanes)(int members);  // lanes of a wide panel that are computed where so many count
    int few;                             // vectors of which products compute no more than there are
    int line;
    // Reading, in wide panels: normalizes and rotates keys and queries where they are, and scales the queries ...
    void (*rotate)(const HeadAttention&);
    // ... so that a sequence's new columns can be written, and each attend to those before it.
    void (*prefill)(const HeadPrefill&);
};

#if defined(BRFT_X86_DISPATCH)
extern const DecoderKernels decoder_kernels_avx512;
extern const DecoderKernels decoder_kernels_avx2;
#endif
extern const DecoderKernels decoder_kernels_baseline;

}  // namespace bandit_rft::cpu
