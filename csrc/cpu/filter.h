// top-k, top-p and min-p over one row of scaled logits, without sorting it.
#pragma once

#include <cstdint>
#include <vector>

namespace bandit_rft::cpu {

struct RankedToken {
    float z;
    int64_t id;
};

// Sets z[j] = -inf for every token that top-k, then top-p (of what is left), then min-p drop. Tokens are ranked by z,
// ties by the lower id; the first always stays, and so does a NaN. `m` is the row's maximum; a row where it is not
// finite is left alone. `scratch` is overwritten: one for many rows saves allocating it.
void filter_row(float* z, int64_t vocabulary, float m, int64_t top_k, double top_p, double min_p,
                std::vector<RankedToken>& scratch);

}  // namespace bandit_rft::cpu
