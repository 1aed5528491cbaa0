// One decoding step of a Llama-shaped transformer on a CPU: tokens in, last hidden states out, the KV cache inside.
//
//   x += [norm] o(attention(rope([norm] q([norm] x)), rope([norm] k([norm] x)), v([norm] x)))
//   x += [norm] down(silu(gate([norm] x)) * up([norm] x))                       each [norm] is there or not
//
// A small model's step is some 200 operations of a few microseconds, so what calls them costs more than they do. Here it is
// one call: the threads meet four times a layer, and each keeps its own copy of the residual stream in between.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "decoder_kernels.h"
#include "threads.h"

namespace bandit_rft::cpu {

// Weights are float32, row-major [outputs, inputs], borrowed; a null norm or bias is absent.
struct DecoderLayer {
    const float *before_attention, *after_attention, *before_mlp, *after_mlp;  // norms [hidden_size]
    const float *q, *k, *v, *o, *gate, *up, *down;
    const float *q_bias, *k_bias, *v_bias, *o_bias;
    const float *q_norm, *k_norm;
};

struct DecoderModel {
    std::vector<DecoderLayer> layers;
    const float *embedding, *final_norm;  // [vocabulary, hidden_size], [hidden_size]
    int64_t vocabulary, hidden_size, intermediate_size, heads, key_value_heads, head_size;
    float norm_eps, scaling;
    bool norms_over_all_heads;  // q_norm and k_norm: over all heads at once, or head by head
};

class Decoder {
   public:
    explicit Decoder(const DecoderModel& model);

    // A new batch, of up to `room` sequences later, in a cache of `capacity` columns: `first` [batch] is the first column
    // that each sequence sees; cos and sin [positions, head_size] are copied.
    void begin(int64_t batch, int64_t room, int64_t capacity, const int64_t* first, const float* cos, const float* sin,
               int64_t positions);
    // hidden [batch, hidden_size] after one more token each, at the given positions.
    void step(const int64_t* tokens, const int64_t* positions, float* hidden, int threads);
    // The batch is now the sequences `which` [count] of what it was: ascending, some left out or some repeated.
    void select(const int64_t* which, int64_t count);

    int64_t batch() const { return batch_; }
    const DecoderModel& model() const { return model_; }
    // Sequences in one SIMD vector: batches are worth shrinking by whole ones.
    int lanes() const { return kernels_->panel / 2; }

   private:
    struct Freed {
        void operator()(float* memory) const;
    };
    struct Buffer {  // grows, never initializes; on a cache line's boundary
        std::unique_ptr<float, Freed> memory;
        size_t size = 0;
        float* of(size_t floats);
    };
    struct Member {  // what each thread has for itself
        Buffer residual, normed, scratch;
    };

    void work(Member& member, int index, int size, const int64_t* tokens, float* hidden);
    void attend(const DecoderLayer& layer, int64_t which, Member& member, int index, int size);
    int64_t panels_in_use() const { return (batch_ + kernels_->panel - 1) / kernels_->panel; }
    size_t cache_block() const;  // floats of the keys, or values, of one layer and panel
    float* cache(int64_t layer, int64_t panel, int which) const;

    DecoderModel model_;
    const DecoderKernels* kernels_;
    int64_t batch_ = 0, capacity_ = 0, columns_ = 0, positions_ = 0;
    int64_t room_ = 0;  // panels that the buffers hold
    std::vector<int32_t> first_;
    std::vector<float> cos_, sin_;
    std::vector<Member> members_;
    Buffer cache_, qkv_, attended_, projected_, activated_, rotation_;
    Barrier barrier_;
};

}  // namespace bandit_rft::cpu
