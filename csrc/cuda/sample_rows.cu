// Rows of logits on a GPU: one draw each, after top-k, top-p and min-p, and everything known of it.
//
//   draw     argmax over kept j of z_j + g_j; the logarithms of g_j are only taken if it can win
//   kept     rank(j) >= threshold, rank = (z as an ordered integer, ~j): all ranks differ, so ties fall to the lower id
//   select   the threshold 11 bits at a time, from the histogram of the ranks that share the bits found so far
//
// Never in memory: noise, probabilities, a sorted row. Without filters the row is read once, by one block. With filters
// a cluster keeps it in shared memory (see policy_rows.cu) and visits it there 3 times for each of top-k and top-p, up
// to 6 where the boundary runs through equal logits. Masses are summed as integers (exact to 2^-44 of the likeliest
// token at V = 151,936), so neither the order of the atomics nor the cluster's size can change a result.
#include <type_traits>

#include "../philox.h"
#include "launch.h"
#include "operations.h"

namespace bandit_rft::cuda {
namespace {

constexpr float kExpFloor = -104.0f;  // exp is exactly 0 from here on down

BRFT_DEVICE float exp_domain(float d) { return d < kExpFloor ? kExpFloor : d; }  // a NaN stays

constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;

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

struct Selection {
    // A bin's weight is low + 2^32 high: shared memory has fast 32-bit atomics only.
    uint32_t low[kBins], high[kBins], count[kBins];
    uint64_t warp_weight[kMaxWarps];
    uint64_t above, weight;
    uint32_t digit, members;
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
    int mass_bits;  // 2^mass_bits is the integer mass of the likeliest token
};

// An order-preserving integer: -inf < ... < -0 = +0 < ... < +inf, and NaN lowest of all.
BRFT_DEVICE uint32_t ordered(float z) {
    const float positive_zero = z + 0.0f;
    uint32_t bits;
    memcpy(&bits, &positive_zero, 4);
    return z != z ? 0u : (bits & 0x80000000u ? ~bits : bits | 0x80000000u);
}
BRFT_DEVICE uint64_t rank_of(float z, int64_t id) { return uint64_t(ordered(z)) << 32 | uint32_t(~uint32_t(id)); }

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
template <bool kAligned, class Share>
BRFT_DEVICE void draw(Winner& winner, const Share& share, int i, const float* x, float top, const uint32_t* counter,
                      PhiloxKey key) {
    const int64_t column = share.column(i);
    float limit = winner.limit(top);
    BRFT_UNROLL
    for (int q = 0; q < kLogits; q += 4) {
        const int64_t id = column + Share::offset(q);
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

// The threshold: the highest rank such that ranks from it on weigh `goal` or more, of the ranks from `lowest` on. They
// weigh 1 each, or with kMass their probability relative to the likeliest token, and the goal is top_p of all of it.
template <bool kMass, class Share>
BRFT_DEVICE uint64_t select(const Share& share, Selection* s, int blocks, uint64_t lowest, uint64_t goal, double top_p,
                            float m, int mass_bits) {
    const int thread = int(threadIdx.x), threads = int(blockDim.x), lane = thread % 32, warp = thread / 32;
    uint64_t prefix = 0;
    for (int shift = 53, bits = kDigitBits, pass = 0;; ++pass) {
        for (int b = thread; b < kBins; b += threads) s->low[b] = s->high[b] = s->count[b] = 0;
        block_barrier();
        share.template each<Pass::again>([&](int i, const float* z) {
            const int64_t column = share.column(i);
            const auto extent = share.extent(i);
            BRFT_UNROLL
            for (int l = 0; l < kLogits; ++l) {
                const uint64_t rank = rank_of(z[l], column + Share::offset(l));
                if (!extent.inside(l) || rank < lowest || (pass && rank >> (shift + bits) != prefix)) continue;
                const int digit = int(rank >> shift) & ((1 << bits) - 1);
                uint64_t mass = 1;
                if constexpr (kMass) {
                    mass = uint64_t(ldexpf(expf(exp_domain(z[l] - m)), mass_bits));
                    atomicAdd(&s->count[digit], 1u);
                }
                const uint32_t low = uint32_t(mass), before = atomicAdd(&s->low[digit], low);
                const uint32_t high = uint32_t(mass >> 32) + (before + low < before ? 1u : 0u);
                if (high) atomicAdd(&s->high[digit], high);
            }
        });
        cluster_arrive();
        cluster_wait();
        // Every block finds the same bin, from the highest down: thread i has a run of bins.
        const int run = (kBins + threads - 1) / threads;
        const auto bin_weight = [&](int from_top, uint32_t* members) {
            uint64_t weight = 0;
            *members = 0;
            const int bin = kBins - 1 - from_top;
            for (int r = 0; bin >= 0 && r < blocks; ++r) {
                const Selection* there = in_block(s, r);
                weight += uint64_t(there->high[bin]) << 32 | there->low[bin];
                *members += kMass ? there->count[bin] : there->low[bin];
            }
            return weight;
        };
        uint64_t own = 0;
        uint32_t members;
        for (int b = 0; b < run; ++b) own += bin_weight(thread * run + b, &members);
        uint64_t until = own;  // inclusive sum over the threads
        for (int distance = 1; distance < 32; distance *= 2) {
            const uint64_t below = shuffle_up(until, distance);
            if (lane >= distance) until += below;
        }
        if (lane == 31) s->warp_weight[warp] = until;
        block_barrier();
        uint64_t total = 0;
        BRFT_NO_UNROLL
        for (int w = 0; w < threads / 32; ++w) {
            if (w < warp) until += s->warp_weight[w];
            total += s->warp_weight[w];
        }
        if (kMass && pass == 0) {
            const double wanted = ceil(top_p * double(total));
            goal = wanted < 1.0 ? 1 : (uint64_t(wanted) < total ? uint64_t(wanted) : total);
        }
        if (until - own < goal && until >= goal) {
            uint64_t above = until - own;
            for (int b = 0; b < run; ++b) {
                const uint64_t weight = bin_weight(thread * run + b, &members);
                if (above < goal && above + weight >= goal) {
                    s->digit = uint32_t(kBins - 1 - (thread * run + b));
                    s->members = members;
                    s->weight = weight;
                    s->above = above;
                }
                above += weight;
            }
        }
        if (total < goal && thread == 0) {  // NaN everywhere: keep all of it
            s->digit = 0;
            s->members = 1;
            s->weight = s->above = 0;
        }
        block_barrier();
        prefix = prefix << bits | s->digit;
        const bool done = shift == 0 || s->members == 1 || s->above + s->weight == goal;
        goal -= s->above < goal ? s->above : goal;
        cluster_arrive();  // no histogram is cleared while another block still reads it
        cluster_wait();
        if (done) return prefix << shift > lowest ? prefix << shift : lowest;
        // The digits end where the logit ends and the id begins: 11 + 11 + 10 bits each.
        bits = shift == 42 || shift == 10 ? 10 : kDigitBits;
        shift -= bits;
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
        if constexpr (!kFiltered) draw<kPlain>(winner, share, i, x, own.m * k, counter, key);
    });
    share_state(own, k, &shared->states, blocks, block);

    double kept = 0;  // sum of exp(z - m) over what is kept
    if constexpr (kFiltered) {
        const float m = whole_state(&shared->states, k, blocks * warps).m;
        uint64_t threshold = 0;
        if (a.in.top_k > 0 && a.in.top_k < a.rows.vocabulary)
            threshold = select<false>(share, &shared->selection, blocks, 0, uint64_t(a.in.top_k), 0.0f, m, 0);
        if (a.in.top_p < 1.0)
            threshold = select<true>(share, &shared->selection, blocks, threshold, 0, a.in.top_p, m, a.mass_bits);
        share.template each<Pass::again>([&](int i, const float* z) {
            const int64_t column = share.column(i);
            const auto extent = share.extent(i);
            float left[kLogits];
            BRFT_UNROLL
            for (int l = 0; l < kLogits; ++l) {
                const float relative = expf(exp_domain(z[l] - m));
                const bool keep =
                    rank_of(z[l], column + Share::offset(l)) >= threshold && relative >= a.in.min_p && extent.inside(l);
                left[l] = keep ? relative : 0.0f;
                kept += left[l];
            }
            draw<kPlain>(winner, share, i, left, m * k, counter, key);
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
    for (a.mass_bits = 62; a.mass_bits > 0 && (logits.vocabulary >> (62 - a.mass_bits)) > 1;) --a.mass_bits;
    const bool filtered = in.top_k > 0 || in.top_p < 1.0 || in.min_p > 0.0f;
    const int width = logits.dtype == DType::f32 ? 4 : 2;
    a.plan = plan_rows(logits.vocabulary, width, filtered ? kHeaderBytes<FilterShared> : kHeaderBytes<Shared>,
                       filtered ? 2 : 1, false, filtered ? kBlocksOfSmForFilters : kBlocksOfSm, on.limits());
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
