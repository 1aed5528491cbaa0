// Tokens of a batch drawn one after another on a CPU: the head, a draw and a decoding step, without a word between
// them.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "decoder.h"
#include "operations.h"

namespace bandit_rft::cpu {

struct Drawing {
    Head head;  // of `hidden` [batch, hidden_size], which goes from step to step
    Scaling scaling;
    float temperature;
    SampleInputs stream;         // positions are those of the first draw
    const int64_t* places;       // [batch] where in its text the first drawn token stands
    std::vector<int64_t> stops;  // tokens that end a sequence
    int64_t* going;              // [batch] 1, or 0 where a sequence has ended; updated
    float* logits;               // [rows, vocabulary], rewritten for so many sequences at a time
    int64_t rows;
};

struct Drawn {  // [steps, batch]
    int64_t* tokens;
    float *logprobs, *entropy;
};

// Draws up to `steps` tokens of every sequence, with a decoding step after each but the last: fewer, where so many
// sequences have ended that the decoder would compute three quarters of the batch, or less, without them. How many.
// `between` is called before each step, and may throw.
int64_t draw(Decoder&, const Drawing&, float* hidden, int64_t steps, const Drawn&, int threads,
             const std::function<void()>& between);

}  // namespace bandit_rft::cpu
