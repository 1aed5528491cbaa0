// One decoding step of a Llama-shaped transformer on a CPU: tokens in, last hidden states out, the KV cache inside.
//
//   x += [norm] o(attention(rope([norm] q([norm] x)), rope([norm] k([norm] x)), v([norm] x)))
//   x += [norm] down(silu(gate([norm] x)) * up([norm] x))                       each [norm] is there or not
//
// A small model's step is some 200 operations of a few microseconds, so what calls them costs more than they do. Here
// it is one call: the threads meet four to six times a layer, and each keeps its own copy of the residual stream in
// between. Prompts are read the same way, with tokens side by side in the lanes instead of sequences; in the last layer
// only their last tokens go on after attention.
#pragma once

#include <cstdint>
#include <vector>

#include "decoder_kernels.h"
#include "lines.h"
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

    // A new batch: reads prompts of `lengths` [batch], whose tokens follow each other; hidden [batch, hidden_size]
    // after their last ones. The cache has `capacity` columns, and room for `room` sequences that `select` may make of
    // them later; cos and sin [positions, head_size] are copied.
    void prefill(const int64_t* tokens, const int64_t* lengths, int64_t batch, int64_t room, int64_t capacity,
                 const float* cos, const float* sin, int64_t positions, float* hidden, int threads);
    // hidden [batch, hidden_size] after one more token each, at the given positions.
    void step(const int64_t* tokens, const int64_t* positions, float* hidden, int threads);
    // The batch is now the sequences `which` [count] of what it was: ascending, some left out or some repeated.
    void select(const int64_t* which, int64_t count);

    int64_t batch() const { return batch_; }
    const DecoderModel& model() const { return model_; }
    // Sequences that are computed where so many count: a few, or whole SIMD vectors of them, or halves (vectors.h).
    int64_t computed(int64_t sequences) const;

  private:
    struct Buffer {  // grows, and is not cleared again
        Lines memory;
        size_t size = 0;
        float* of(size_t floats);
    };
    struct Member {  // what each thread has for itself
        Buffer residual, normed, scratch;
    };

    struct Run {  // consecutive tokens of one sequence in consecutive rows, after `begin` others
        int64_t sequence, begin, row, count;
    };
    struct Last {  // the last token of a prompt, of which alone the hidden state is wanted
        int64_t sequence, row;
    };
    struct Pass {  // rows of tokens through all layers: one token of each sequence, or runs of a prompt's
        int64_t rows;
        const int64_t *tokens, *positions;
        std::vector<Run> runs;
        std::vector<Last> last;
        float* hidden;
        const StepKernels* kernels;
        int64_t panels() const { return (rows + kernels->panel - 1) / kernels->panel; }
    };

    void require_tokens(const int64_t* tokens, int64_t count) const;
    void run(const Pass& pass, int threads);
    void work(const Pass& pass, Member& member, int index, int size);
    void inverses_of_heads(const Pass& pass, const DecoderLayer& layer, int index, int size);
    void attend(const Pass& pass, const DecoderLayer& layer, int64_t which, Member& member, int index, int size);
    void keep_last(const Pass& pass, const Panels& x, int64_t begin, int64_t end) const;
    void read_runs(const Pass& pass, int64_t which, Member& member, int index, int size);
    int64_t panels_of(int64_t rows) const { return (rows + kernels_->wide.panel - 1) / kernels_->wide.panel; }
    // The cache is in blocks of the keys, or values, of one layer and panel, or of one sequence where each has its own.
    bool alone() const { return room_ <= kernels_->few; }
    Stride stride(int which) const;
    size_t block_size() const;  // floats
    float* block(int64_t layer, int64_t index, int which) const;
    // A head's keys, or values, of the sequence, and those of its panel that follow.
    float* cache(int64_t layer, int64_t sequence, int64_t head, int which) const;
    // The columns in use, from one sequence's block to another's, where each has its own.
    void copy_columns(int which, const float* from, float* to) const;

    DecoderModel model_;
    const DecoderKernels* kernels_;
    int64_t batch_ = 0, capacity_ = 0, columns_ = 0, positions_ = 0;
    int64_t room_ = 0;                // sequences that the cache holds
    int64_t blocks_ = 0, lanes_ = 0;  // of it for each layer, and lanes of each: a whole panel's of several panels
    std::vector<int32_t> first_;
    std::vector<float> cos_, sin_;
    std::vector<Member> members_;
    Buffer cache_, qkv_, attended_, projected_, activated_, rotation_, inverses_;
    Barrier barrier_;
};

}  // namespace bandit_rft::cpu
