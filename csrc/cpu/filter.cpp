#include "filter.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace bandit_rft::cpu {

namespace {

using Tokens = std::vector<RankedToken>;

bool ranks_before(const RankedToken& a, const RankedToken& b) { return a.z > b.z || (a.z == b.z && a.id < b.id); }

// The tokens that do not rank after `last`.
void collect(const float* z, int64_t vocabulary, const RankedToken& last, Tokens& tokens) {
    tokens.resize(size_t(vocabulary));
    size_t count = 0;
    for (int64_t id = 0; id < vocabulary; ++id) {
        tokens[count] = {z[id], id};
        count += size_t(z[id] > last.z || (z[id] == last.z && id <= last.id));
    }
    tokens.resize(count);
}

// The first token, in rank order, where the summed weight reaches `goal`, or else the last token. A histogram over z
// finds the few that lie around it; only those are sorted.
template <typename Weight>
RankedToken reaching(double goal, Tokens& tokens, Weight weight) {
    constexpr int kBuckets = 2048;
    constexpr size_t kFew = 256;
    double before = 0;  // the weight of the tokens that rank before all of `tokens`; below the goal
    while (tokens.size() > kFew) {
        float low = tokens[0].z, high = tokens[0].z;
        for (const RankedToken& token : tokens) {
            low = std::min(low, token.z);
            high = std::max(high, token.z);
        }
        if (low == high) break;
        const double scale = (kBuckets - 1) / (double(high) - low);
        const auto bucket = [high, scale](float z) { return int((double(high) - z) * scale); };
        std::array<double, kBuckets> mass{};
        for (const RankedToken& token : tokens) mass[size_t(bucket(token.z))] += weight(token.z);
        int chosen = 0;
        for (const int end = bucket(low); chosen < end && before + mass[size_t(chosen)] < goal; ++chosen)
            before += mass[size_t(chosen)];
        const auto elsewhere = [&](const RankedToken& token) { return bucket(token.z) != chosen; };
        tokens.erase(std::remove_if(tokens.begin(), tokens.end(), elsewhere), tokens.end());
    }
    if (!std::is_sorted(tokens.begin(), tokens.end(),
                        ranks_before))  // many ties are: they come in the order of their ids
        std::sort(tokens.begin(), tokens.end(), ranks_before);
    for (const RankedToken& token : tokens) {
        before += weight(token.z);
        if (before >= goal) return token;
    }
    return tokens.back();
}

}  // namespace

void filter_row(float* z, int64_t vocabulary, float m, int64_t top_k, double top_p, double min_p, Tokens& scratch) {
    if (!std::isfinite(m)) return;
    // The maximum of a row without a finite logit is finite as well (row_math.h: kLowest), and NaNs are never ranked.
    const auto ranked = [](float logit) { return logit > -INFINITY; };
    if (std::none_of(z, z + vocabulary, ranked)) return;
    // std::exp is slow where its result underflows, as it does for every logit that a mask has set to -1e9.
    const auto relative = [m](float logit) { return logit - m < -700.0f ? 0.0 : std::exp(double(logit - m)); };
    RankedToken last{-INFINITY, -1};  // the last token that stays: here, every finite one
    if (top_k > 0 && top_k < vocabulary) {
        collect(z, vocabulary, last, scratch);
        last = reaching(double(top_k), scratch, [](float) { return 1.0; });
    }
    if (top_p < 1.0) {
        collect(z, vocabulary, last, scratch);
        double mass = 0;
        for (const RankedToken& token : scratch) mass += relative(token.z);
        last = reaching(top_p * mass, scratch, relative);
    }
    for (int64_t id = 0; id < vocabulary; ++id) {
        const RankedToken token{z[id], id};
        if (ranks_before(last, token) || (min_p > 0.0 && relative(token.z) < min_p)) z[id] = -INFINITY;
    }
}

}  // namespace bandit_rft::cpu
