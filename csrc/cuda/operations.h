// Rows of logits on a GPU, on raw memory: log-probabilities, gradients, draws. All return at once; the work is on
// `stream`. Nothing is allocated, nothing is remembered, so every call can be captured in a CUDA graph.
#pragma once

#include <cstdint>
#include <string>

#include "../row_math.h"
#include "../tensor_view.h"

namespace bandit_rft::cuda {

struct Where {
    int device;
    void* stream;  // a cudaStream_t
};

struct Logits {
    void* data;
    DType dtype;  // f32, bf16 or f16
    int64_t count, vocabulary, stride;
    Scaling scaling;
    float temperature;
    const float* temperatures;  // [count], or null for the one above
};

// Empty if this device and its driver can run the kernels; otherwise what is there and what is needed, in one sentence.
std::string refusal(int device);

// logprobs and entropy [count] of targets; logits are only read. A target outside [0, vocabulary) gets NaN.
void logprob_rows(const Logits&, const int64_t* targets, float* logprobs, float* entropy, const Where&);

struct PolicyInputs {
    Objective objective;
    const float *advantages, *weights, *behavior, *reference;  // [count]; the last two may be null
    const float *given_logprob, *given_entropy;                // ObjectiveKind::given: dL/dlogp, dL/dentropy [count]
};

// Where dL/dlogits goes: over the logits themselves (data null), to other memory, or over the second half of each
// float32 row in 16 bits: the gradient then is [count, vocabulary] with the stride of the logits' rows.
struct Gradient {
    void* data;
    DType dtype;
    int64_t stride;
};

void policy_rows(const Logits&, const int64_t* targets, const PolicyInputs&, const Gradient&, float* logprobs,
                 float* entropy, const Where&);

struct SampleInputs {
    const int64_t* seed;                      // one number
    const int64_t *sequence_ids, *positions;  // [count]
    int64_t top_k;                            // 0: all
    double top_p;
    float min_p;
};

struct SampleOutputs {
    int64_t* tokens;
    float *logprobs, *sampling_logprobs, *entropy, *kept_mass;
};

void sample_rows(const Logits&, const SampleInputs&, const SampleOutputs&, const Where&);

}  // namespace bandit_rft::cuda
