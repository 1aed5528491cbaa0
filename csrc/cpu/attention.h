// Causal attention of packed sequences on a CPU, forward and backward: no padding, no [T, T] mask.
#pragma once

#include <cstdint>

namespace bandit_rft::cpu {

// float32; T tokens of sequences that begin at cu_seqlens[0] = 0, ..., cu_seqlens[sequences] = T; heads side by side.
struct PackedAttention {
    float *query, *key;         // [T, heads, head_size], [T, key_value_heads, head_size]
    const float* value;         // as key
    const int64_t* cu_seqlens;  // [sequences + 1]
    int64_t sequences, heads, key_value_heads, head_size;
    float scaling;
    const float *cos, *sin;  // [T, head_size] of rotary positions; null: none
    int64_t queries() const { return heads * head_size; }
    int64_t key_values() const { return key_value_heads * head_size; }
};

// out [T, heads, head_size], lse [T, heads]: the logarithm of each softmax's denominator. Query and key are rotated
// where they are, as the backward pass takes them.
void attention_forward(const PackedAttention&, float* out, float* lse, int threads);

struct AttentionGradients {
    const float *out, *lse, *grad_out;
    float *query, *key, *value;
};
// What query and key are to get is of them before their rotation.
void attention_backward(const PackedAttention&, const AttentionGradients&, int threads);

// One sequence and one head of keys and values, with all the heads of queries that read it.
struct AttentionUnit {
    int64_t begin, length, key_value_head;
};

struct AttentionKernels {
    int64_t (*scratch_floats)(const PackedAttention&, int64_t longest);  // of either pass
    void (*forward)(const PackedAttention&, const AttentionUnit&, float* out, float* lse, float* scratch);
    void (*backward)(const PackedAttention&, const AttentionUnit&, const AttentionGradients&, float* scratch);
};

#if defined(BRFT_X86_DISPATCH)
extern const AttentionKernels attention_kernels_avx512;
extern const AttentionKernels attention_kernels_avx2;
#endif
extern const AttentionKernels attention_kernels_baseline;

}  // namespace bandit_rft::cpu
