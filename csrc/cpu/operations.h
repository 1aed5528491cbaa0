// Rows of logits on a CPU, on raw memory: log-probabilities, gradients, draws; and the head's product to draw from.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../row_math.h"
#include "../tensor_view.h"

namespace bandit_rft::cpu {

std::string instruction_set();                 // the one in use
void use_instruction_set(const std::string&);  // for tests and measurements; throws std::invalid_argument

struct Rows {
    void* logits;
    DType dtype;
    int64_t count, vocabulary, stride;
    Scaling scaling;
    float temperature;
    const float* temperatures;  // [count], or null for the one above

    float temperature_of(int64_t i) const { return temperatures ? temperatures[i] : temperature; }
    char* row(int64_t i) const { return static_cast<char*>(logits) + i * stride * (dtype == DType::f32 ? 4 : 2); }
};

// logprobs and entropy [count] of targets; logits are only read.
void logprob_rows(const Rows&, const int64_t* targets, float* logprobs, float* entropy, int threads);

// The same of rows whose logits come a tile of columns at a time, and are nowhere all at once. One caller at a time.
class TiledLogprobs {
  public:
    explicit TiledLogprobs(int64_t rows);
    // Some columns, each once; the first of them is token `first` >= 0. A target may lie in another tile, or in none.
    void add(const Rows& tile, const int64_t* targets, int64_t first, int threads);
    void finish(float* logprobs, float* entropy) const;  // NaN where no tile held the target
    int64_t rows() const { return int64_t(states_.size()); }

  private:
    std::vector<SoftmaxState<double>> states_;
    std::vector<float> of_targets_;
};

struct PolicyInputs {
    Objective objective;
    const float *advantages, *weights, *behavior, *reference;  // [count]; the last two may be null
    const float *given_logprob, *given_entropy;                // ObjectiveKind::given: dL/dlogp, dL/dentropy [count]
};

// As logprob_rows, and dL/dlogits is written over the logits.
void policy_rows(const Rows&, const int64_t* targets, const PolicyInputs&, float* logprobs, float* entropy,
                 int threads);

struct SampleInputs {
    uint64_t seed;
    const int64_t *sequence_ids, *positions;  // [count]
    int64_t top_k;                            // 0: all
    double top_p, min_p;
};

struct SampleOutputs {
    int64_t* tokens;
    float *logprobs, *sampling_logprobs, *entropy, *kept_mass;
};

void sample_rows(const Rows&, const SampleInputs&, const SampleOutputs&, int threads);

struct Head {
    const void *hidden, *weight;
    DType hidden_dtype, weight_dtype;
    int64_t batch, hidden_size, vocabulary, hidden_stride, weight_stride;
    const float* bias;  // [vocabulary] or null
};

// out [batch, vocabulary] float32; a row's logits are the same bits whatever batch it is computed in.
void head_logits(const Head&, float* out, int threads);

}  // namespace bandit_rft::cpu
