// Rows of logits on a GPU: one draw each, after top-k, top-p and min-p, and everything known of it.
//
//   draw     argmax over kept j of z_j + g_j; the logarithms of g_j are only taken if it can win
//   kept     rank(j) >= threshold, rank = (z as an ordered integer, ~j): all ranks differ, so ties fall to the lower id
//   select   the threshold, without sorting (selection.h)
//
// Never in memory: noise, probabilities, a sorted row. Without filters the row is read once, by one block. With filters
// a cluster keeps it in shared memory (see policy_rows.cu) and visits it there twice for each of top-k and top-p,
// oftener where the boundary runs through thousands of nearly equal logits. Masses are summed as integers (exact to
// 2^-44 of the likeliest token at V = 151,936), so the order of the atomics cannot change a result.
#include <type_traits>

#include "../philox.h"
#include "launch.h"
#include "operations.h"
#include "selection.h"

namespace bandit_rft::cuda {
namespace {

// A lane's best perturbed logit, and how far another must reach to be worth its exact noise.
//
// z + g >= best  <=>  E = -log1p(-u) <= e^(z - best) = x 2^(M - best log2(e)), and E >= u >= 2^-32 word. So a token can
// win only if word <= x `limit`, limit = 2^(32 + M - best log2(e)), with the best of the warp: two instructions a logit
// and no logarithm; of what passes, few, z + g decides as the reference computes it.
//
// The limit must not be too low by rounding. With B = |M| + |best log2(e)| + 34, which bounds |k v| of whatever passes:
// z and k are within 2^-22 |k v|, y, best log2(e) and the limit's exponent within 2^-22 B each; logf, log1pf and the
// sum z + g within 2^-22 B + 4e-6; 2^x is within 2^-21, word as a float and its bound at 1 - 2^-24 within 2^-22. In the
// exponent that is below 2^-19 (|M| + |best log2(e)|) + 1e-4. Where x is 0 (y < -126) the logit at M, whose
// noise is above -2.9, beats any noise (below 23.1) of this one.
struct Winner {
    float best = -INFINITY;
    uint32_t token = 0xFFFFFFFFu;
    float reach = -INFINITY;  // best log2(e) - 32 of the warp, less what rounding may hide

    static constexpr float kRelative = 0x1p-19f, kAbsolute = 1e-4f;

    BRFT_DEVICE void offer(float perturbed, uint32_t id) {
        if (perturbed > best || (perturbed == best && id < token)) {
            best = perturbed;
            token = id;
        }
    }
    BRFT_DEVICE void share_best() {
        const float exponent = max_over_warp(best) * float(kLog2E);
        reach = exponent - (32.0f + kAbsolute) - kRelative * fabsf(exponent);
    }
    BRFT_DEVICE float limit(float top) const { return exp2_approximate(fmaf(kRelative, fabsf(top), top - reach)); }
};

struct Drawn {  // what is left to say of a row after its one or two visits, a warp each
    float best[kMaxCluster * kMaxWarps];
    uint32_t token[kMaxCluster * kMaxWarps];
    double kept[kMaxCluster * kMaxWarps];
};

struct alignas(16) Shared {
    SharedStates states;
    Drawn drawn;
};
static_assert(sizeof(Shared) % 16 == 0);
struct alignas(16) FilterShared : Shared {
    Selection selection;
};
static_assert(sizeof(FilterShared) % 16 == 0);

struct SampleArguments {
    Rows rows;
    RowPlan plan;
    SampleInputs in;
    SampleOutputs out;
    Weights weights;
};

// The words of the four tokens from `column` on. kAligned: column is a multiple of 4, so one counter gives them.
template <bool kAligned>
BRFT_DEVICE PhiloxWords words_from(int64_t column, const uint32_t* counter, PhiloxKey key) {
    const uint32_t group = uint32_t(column >> 2);
    const PhiloxWords a = philox4x32_10(group, counter[0], counter[1], counter[2], key);
    const int by = int(column & 3);
    if (kAligned || by == 0) return a;
    const PhiloxWords b = philox4x32_10(group + 1, counter[0], counter[1], counter[2], key);
    if (by == 1) return {{a.word[1], a.word[2], a.word[3], b.word[0]}};
    if (by == 2) return {{a.word[2], a.word[3], b.word[0], b.word[1]}};
    return {{a.word[3], b.word[0], b.word[1], b.word[2]}};
}

template <class T>
BRFT_DEVICE T one_of(const T* four, int j) {  // in registers: no address is taken
    return j < 2 ? (j == 0 ? four[0] : four[1]) : (j == 2 ? four[2] : four[3]);
}

// Offers a lane's logits of span i to its draw; x = 2^y, M = k m = top, and 0 for what may not be drawn. What may win
// is read again: that is rare, and 16 registers are free in the meantime.
template <bool kAligned, bool kFiltered, class Share>
BRFT_DEVICE void draw(Winner& winner, const Share& share, int i, const float* x, float top, const uint32_t* counter,
                      PhiloxKey key) {
    const int64_t column = share.column(i);
    float limit = winner.limit(top);
    BRFT_UNROLL
    for (int q = 0; q < kLogits; q += 4) {
        const int64_t id = column + Share::offset(q);
        if constexpr (kFiltered) {  // most have nothing left
            if (!any_in_warp(fmaxf(fmaxf(x[q], x[q + 1]), fmaxf(x[q + 2], x[q + 3])) > 0.0f)) continue;
        }
        const PhiloxWords words = words_from<kAligned>(id, counter, key);
        bool may_win = false;
        BRFT_UNROLL
        for (int j = 0; j < 4; ++j) may_win |= float(words.word[j]) <= x[q + j] * limit;
        if (!any_in_warp(may_win)) continue;
        BRFT_NO_UNROLL
        for (int j = 0; j < 4; ++j) {
            const uint32_t word = one_of(words.word, j);
            const float relative = one_of(x + q, j);
            if (relative > 0.0f && float(word) <= relative * limit)
                winner.offer(share.z_of(id + j) + gumbel_from_word(word), uint32_t(id + j));
        }
        winner.share_best();
        limit = winner.limit(top);
    }
}

template <class In, bool kFiltered, bool kPlain>
__global__ void __launch_bounds__(kMaxThreads, kFiltered ? 1 : 2) sample(SampleArguments a) {
    using Share = RowShare<In, kPlain>;
    using Memory = std::conditional_t<kFiltered, FilterShared, Shared>;
    auto* shared = reinterpret_cast<Memory*>(shared_memory());
    cluster_arrive_first();
    const int blocks = kFiltered ? a.plan.blocks : 1;
    const int64_t index = int64_t(blockIdx.x) / blocks;
    const int block = int(blockIdx.x) % blocks;
    const Share share(a.rows, a.plan, index, block, after_header(shared));
    const int lane = share.lane, warp = share.warp, warps = share.warps;
    const float k = share.scale.k;
    const uint64_t seed = uint64_t(*a.in.seed), sequence = uint64_t(a.in.sequence_ids[index]);
    // One half of the key in a register that the compiler knows to be the warp's: it then keeps that half's ten round
    // keys instead of adding them up for every counter. Both halves, or with a softcap one, would spill.
    const uint32_t low = kPlain ? warp_uniform(uint32_t(seed)) : uint32_t(seed);
    const PhiloxKey key{low, uint32_t(seed >> 32)};
    const uint32_t counter[3] = {uint32_t(a.in.positions[index]), uint32_t(sequence), uint32_t(sequence >> 32)};

    Winner winner;
    ThreadState own(a.rows);
    share.template each<kFiltered ? Pass::first : Pass::only>([&](int i, const float* v) {
        float x[kLogits];
        add_to_state(own, v, k, x);
        if constexpr (!kFiltered) draw<kPlain, kFiltered>(winner, share, i, x, own.m * k, counter, key);
    });
    share_state(own, k, &shared->states, blocks, block);

    double kept = 0;  // sum of exp(z - m) over what is kept
    if constexpr (kFiltered) {
        const float m = whole_state(&shared->states, k, blocks * warps).m;
        uint64_t threshold = 0;
        if (a.in.top_k > 0 && a.in.top_k < a.rows.vocabulary)
            threshold = Selecting<false>(&shared->selection, a.weights, m, blocks)
                            .threshold(share, threshold, uint64_t(a.in.top_k), -1.0);
        if (a.in.top_p < 1.0)
            threshold =
                Selecting<true>(&shared->selection, a.weights, m, blocks).threshold(share, threshold, 0, a.in.top_p);
        // rank >= threshold, in terms of the logit and the id. A NaN is never kept: its mass is not >= min_p.
        const bool everything = threshold >> 32 == 0;
        const float last = everything ? -INFINITY : unordered(uint32_t(threshold >> 32));
        const uint32_t last_id = everything ? 0xFFFFFFFFu : ~uint32_t(threshold);
        share.template each<Pass::again>([&](int i, const float* z) {
            const int64_t column = share.column(i);
            const auto extent = share.extent(i);
            float left[kLogits], sum = 0.0f;
            BRFT_UNROLL
            for (int l = 0; l < kLogits; ++l) {
                const float relative = exp2_approximate((z[l] - m) * k);
                const uint32_t id = uint32_t(column + Share::offset(l));
                const bool keep =
                    ((z[l] > last) | ((z[l] == last) & (id <= last_id))) & (relative >= a.in.min_p);  // no branch
                left[l] = keep & extent.inside(l) ? relative : 0.0f;
                sum += left[l];
            }
            kept += double(sum);
            draw<kPlain, kFiltered>(winner, share, i, left, m * k, counter, key);
        });
    }
    for (int mask = 16; mask; mask /= 2) {
        const float best = shuffle_xor(winner.best, mask);
        winner.offer(best, shuffle_xor(winner.token, mask));
        kept += shuffle_xor(kept, mask);
    }
    if (lane == 0) {
        Drawn* first = in_block(&shared->drawn, 0);
        first->best[block * warps + warp] = winner.best;
        first->token[block * warps + warp] = winner.token;
        first->kept[block * warps + warp] = kept;
    }
    cluster_arrive();
    cluster_wait();
    if (block > 0 || warp > 0) return;
    const RowSoftmax softmax(whole_state(&shared->states, k, blocks * warps), share.scale);
    if (lane > 0) return;
    kept = 0;
    BRFT_NO_UNROLL
    for (int w = 0; w < blocks * warps; ++w) {
        winner.offer(shared->drawn.best[w], shared->drawn.token[w]);
        kept += shared->drawn.kept[w];
    }
    if (winner.token == 0xFFFFFFFFu) winner.token = 0;  // no finite logit: the log-probability below is NaN and says so
    const float v = share.v_of(winner.token), logp = softmax.logprob(v);
    a.out.tokens[index] = int64_t(winner.token);
    a.out.logprobs[index] = logp;
    // Without filters the two are one number; with them v is z, and `kept` sums e^(z - m).
    a.out.sampling_logprobs[index] = kFiltered ? float((double(v) - double(softmax.m)) - log(kept)) : logp;
    a.out.entropy[index] = softmax.entropy();
    a.out.kept_mass[index] = kFiltered ? float(kept / softmax.s) : 1.0f;
}

// Filters rank z itself, so they have the general template alone.
template <class In>
auto* kernel_for(bool filtered, bool plain) {
    return filtered ? sample<In, true, false> : plain ? sample<In, false, true> : sample<In, false, false>;
}

}  // namespace

void sample_rows(const Logits& logits, const SampleInputs& in, const SampleOutputs& out, const Where& where) {
    if (logits.count == 0) return;
    require_grid(logits.count);
    const OnDevice on(where.device);
    SampleArguments a{};
    a.rows = {logits.data,
              logits.count,
              logits.vocabulary,
              logits.stride,
              logits.scaling,
              logits.temperature,
              logits.temperatures,
              0.0f,
              0.0f,
              0.0f};
    a.in = in;
    a.out = out;
    const bool filtered = in.top_k > 0 || in.top_p < 1.0 || in.min_p > 0.0f;
    const int width = logits.dtype == DType::f32 ? 4 : 2;
    a.plan = plan_rows(logits.vocabulary, width, filtered ? kHeaderBytes<FilterShared> : kHeaderBytes<Shared>,
                       filtered ? 2 : 1, false, filtered ? kBlocksOfSmForFilters : kBlocksOfSm, on.limits());
    a.weights = Weights(logits.vocabulary, std::min(logits.vocabulary, int64_t(a.plan.share) * kSpan));
    // The plain template draws four tokens from one counter: every row must start at a multiple of four logits.
    const bool by_four = reinterpret_cast<uintptr_t>(logits.data) % uintptr_t(4 * width) == 0 &&
                         (logits.stride % 4 == 0 || logits.count == 1);
    const bool plain = set_scaling(a.rows, !filtered && by_four);
    auto* kernel = logits.dtype == DType::f32    ? kernel_for<F32>(filtered, plain)
                   : logits.dtype == DType::bf16 ? kernel_for<Bf16>(filtered, plain)
                                                 : kernel_for<F16>(filtered, plain);
    launch(kernel, a.plan, logits.count, where.stream, a);
}

}  // namespace bandit_rft::cuda
