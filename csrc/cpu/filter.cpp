#include "filter.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace bandit_rft::cpu {

void filter_row(float* z, int64_t vocabulary, float m, int64_t top_k, float top_p, float min_p) {
    const auto before = [z](int64_t a, int64_t b) { return z[a] > z[b] || (z[a] == z[b] && a < b); };
    const auto relative = [z, m](int64_t id) { return std::exp(double(z[id] - m)); };

    std::vector<int64_t> ids(static_cast<size_t>(vocabulary));
    std::iota(ids.begin(), ids.end(), int64_t(0));
    int64_t kept = vocabulary;
    if (top_k > 0 && top_k < vocabulary) {
        std::nth_element(ids.begin(), ids.begin() + (top_k - 1), ids.end(), before);
        kept = top_k;
    }
    if (top_p < 1.0f) {
        double mass = 0;
        for (int64_t i = 0; i < kept; ++i) mass += relative(ids[size_t(i)]);
        // Rank only as many tokens as the prefix turns out to need: 64 first, then eight times as many.
        double reached = 0;
        int64_t ranked = 0, prefix = 0;
        for (int64_t want = 64; prefix == ranked && ranked < kept && !(prefix > 0 && reached >= top_p * mass); want *= 8) {
            const int64_t end = std::min(kept, want);
            if (end < kept)
                std::nth_element(ids.begin() + ranked, ids.begin() + (end - 1), ids.begin() + kept, before);
            std::sort(ids.begin() + ranked, ids.begin() + end, before);
            for (ranked = end; prefix < ranked && (prefix == 0 || reached < top_p * mass); ++prefix)
                reached += relative(ids[size_t(prefix)]);
        }
        kept = prefix;
    }
    if (min_p > 0.0f) {
        const auto first = std::min_element(ids.begin(), ids.begin() + kept, before);
        std::iter_swap(ids.begin(), first);
        const auto end = std::partition(ids.begin() + 1, ids.begin() + kept,
                                        [&](int64_t id) { return relative(id) >= double(min_p); });
        kept = end - ids.begin();
    }
    for (int64_t i = kept; i < vocabulary; ++i) z[ids[size_t(i)]] = -INFINITY;
}

}  // namespace bandit_rft::cpu
