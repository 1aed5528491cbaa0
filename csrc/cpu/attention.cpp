#include "attention.h"

#include <algorithm>

#include "kernels.h"
#include "lines.h"
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
        const Lines scratch = lines(size_t(floats));
        for (int64_t u = begin; u < end; ++u) {
            const int64_t s = u / a.key_value_heads;
            const AttentionUnit unit{a.cu_seqlens[s], a.cu_seqlens[s + 1] - a.cu_seqlens[s], u % a.key_value_heads};
            work(unit, scratch.get());
        }
    });
}

// Of a unit's keys, and of the queries that read them; while they are in the cache.
void rotate(const PackedAttention& a, const AttentionUnit& unit, float* query, float* key, bool back) {
    if (!a.cos) return;
    const int64_t size = a.head_size, group = a.heads / a.key_value_heads, head = unit.key_value_head;
    for (int64_t t = unit.begin; t < unit.begin + unit.length; ++t) {
        const float *cos = a.cos + t * size, *sin = a.sin + t * size;
        kernels().layer->rotate(query + t * a.queries() + head * group * size, cos, sin, group, size, back);
        kernels().layer->rotate(key + t * a.key_values() + head * size, cos, sin, 1, size, back);
    }
}

}  // namespace

void attention_forward(const PackedAttention& a, float* out, float* lse, int threads) {
    const AttentionKernels& k = *kernels().attention;
    for_units(a, threads, 2, [&](const AttentionUnit& unit, float* scratch) {
        rotate(a, unit, a.query, a.key, false);
        k.forward(a, unit, out, lse, scratch);
    });
}

void attention_backward(const PackedAttention& a, const AttentionGradients& g, int threads) {
    const AttentionKernels& k = *kernels().attention;
    for_units(a, threads, 5, [&](const AttentionUnit& unit, float* scratch) {
        k.backward(a, unit, g, scratch);
        rotate(a, unit, g.query, g.key, true);
    });
}

}  // namespace bandit_rft::cpu
