// top-k, top-p and min-p over one row of scaled logits, without sorting it.
#pragma once

#include <cstdint>

namespace bandit_rft::cpu {

// Sets z[j] = -inf for every token that top-k, then top-p (of what is left), then min-p drop. Tokens are ranked by z,
// ties by the lower id; the first always stays. `m` is the row's maximum.
void filter_row(float* z, int64_t vocabulary, float m, int64_t top_k, float top_p, float min_p);

}  // namespace bandit_rft::cpu
