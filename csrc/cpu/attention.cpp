#include "attention.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace bandit_rft::cpu {
namespace {

constexpr int64_t kPairsPerLogit = 8;  // what a pair of query and key takes, in units of `parallel`

template <class Work>
void for_units(const PackedAttention& a, int threads, int passes, const Work& work) {
    int64_t longest = 0, pairs = 0;
    for (int64_t s = 0; s < a.sequences; ++s) {
        const int64_t length = a.cu_seqlens[s + 1] - a.cu_seqlens[s];
        longest = std::max(longest, length);
        pairs += length * length / 2;
    }
    const int64_t units = a.sequences * a.key_value_heads,
                  effort = passes * pairs * a.heads / kPairsPerLogit * a.head_size / 16;
    const int64_t floats = kernels().attention->scratch_floats(a, longest);
    parallel(units, 1, effort, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(static_cast<size_t>(floats));
        for (int64_t u = begin; u < end; ++u) {
            const int64_t s = u / a.key_value_heads;
            const AttentionUnit unit{a.cu_seqlens[s], a.cu_seqlens[s + 1] - a.cu_seqlens[s], u % a.key_value_heads};
            work(unit, scratch.data());
        }
    });
}

}  // namespace

void attention_forward(const PackedAttention& a, float* out, float* lse, int threads) {
    const AttentionKernels& k = *kernels().attention;
    for_units(a, threads, 2, [&](const AttentionUnit& unit, float* scratch) { k.forward(a, unit, out, lse, scratch); });
}

void attention_backward(const PackedAttention& a, const AttentionGradients& g, int threads) {
    const AttentionKernels& k = *kernels().attention;
    for_units(a, threads, 5, [&](const AttentionUnit& unit, float* scratch) { k.backward(a, unit, g, scratch); });
}

}  // namespace bandit_rft::cpu
