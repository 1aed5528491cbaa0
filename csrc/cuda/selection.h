// The lowest rank that top-k or top-p keeps of a row, by a cluster of blocks that holds the row in shared memory.
//
//   rank(j)   = (z_j as an ordered integer, ~j): all ranks differ, so ties fall to the lower id
//   bin(j)    = min(64 (m - z_j), 2047): the bins are added up from the likeliest on until they weigh the goal
//   members   of the bin where that happens, some hundred, are listed, and the same is done with 11 bits of their ranks
//
// The row is visited twice: for its histogram, and for the members of one bin. Where they are too many to be listed
// (equal logits, or a row without contrast), 11 bits of their ranks at a time, from the highest on, divide them first:
// a visit or two for each. The ranks' own bits would do for the first division as well, but the upper 11 of a float are
// its sign, exponent and two more: a few dozen bins would share all logits, and what adds to one bin waits.
//
// Weights are integers, 1 each or a power of 2 times e^(z - m), so neither the order of the atomic additions nor (below
// 2^21 logits) the cluster's size can change a result. Shared memory has fast additions of 32 bits only: a weight is
// cut into pieces of so few bits that no sum of a block's carries.
#pragma once

#include "rows.h"

namespace bandit_rft::cuda {

constexpr float kExpFloor = -104.0f;  // exp is exactly 0 from here on down
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits, kBinsOfGroup = 64, kGroups = kBins / kBinsOfGroup;
constexpr int kPieces = 4, kListed = 2048;
constexpr float kBinsOfNat = 64.0f;
static_assert(kGroups == 32 && kBinsOfGroup == 2 * 32, "lanes of a warp");

BRFT_DEVICE float exp_domain(float d) { return d < kExpFloor ? kExpFloor : d; }  // a NaN stays

// An order-preserving integer: -inf < ... < -0 = +0 < ... < +inf, and NaN lowest of all.
BRFT_DEVICE uint32_t ordered(float z) {
    const float positive_zero = z + 0.0f;
    uint32_t bits;
    memcpy(&bits, &positive_zero, 4);
    return z != z ? 0u : (bits & 0x80000000u ? ~bits : bits | 0x80000000u);
}
BRFT_DEVICE float unordered(uint32_t order) {
    const uint32_t bits = order & 0x80000000u ? order & 0x7FFFFFFFu : ~order;
    float z;
    memcpy(&z, &bits, 4);
    return z;
}
BRFT_DEVICE uint64_t rank_of(float z, int64_t id) { return uint64_t(ordered(z)) << 32 | uint32_t(~uint32_t(id)); }

// What ranks weigh: bits of a piece, how many a mass has, and the mass of the likeliest token. `most`: logits of a row
// in one block. A block also adds up what the cluster has listed, on devices where it has fewer of the row.
struct Weights {
    int piece_bits, pieces;
    float mass_of_likeliest;

    Weights() = default;
    Weights(int64_t vocabulary, int64_t most) : piece_bits(32) {
        if (most < kListed) most = kListed;
        while (piece_bits > 1 && (most >> (32 - piece_bits)) > 0) --piece_bits;
        int bits = 62;  // all of a row's masses add up to less than 2^63 ...
        while (bits > 0 && (vocabulary >> (62 - bits)) > 1) --bits;
        while (bits >= kPieces * piece_bits) --bits;  // ... and each fits the pieces: a bound from 2^21 logits on
        pieces = bits / piece_bits + 1;
        mass_of_likeliest = ldexpf(1.0f, bits);
    }
    BRFT_DEVICE uint64_t mass(float relative) const {
        return relative == relative ? uint64_t(relative * mass_of_likeliest) : 0;
    }
};

struct Selection {
    uint32_t piece[kPieces][kBins];
    uint64_t group[kGroups];
    uint64_t list[kListed], all[kListed];  // ranks of a bin's members: this block's, and the cluster's
    uint64_t of_warp[kMaxWarps];
    uint32_t listed, alike;               // members listed, and those that share the bits found so far
    uint32_t found_group, digit;          // the group and the bin where the goal is reached
    uint64_t goal_of_group, above_group;  // the goal, and what is above the group
    uint64_t goal, weight;                // what is left of the goal within the bin, and the bin's weight
};

template <bool kMass>
struct Selecting {
    Selection* s;
    Weights weights;
    float m;
    int blocks, thread, threads, lane, warp;

    BRFT_DEVICE Selecting(Selection* selection, const Weights& weights, float m, int blocks)
        : s(selection),
          weights(weights),
          m(m),
          blocks(blocks),
          thread(int(threadIdx.x)),
          threads(int(blockDim.x)),
          lane(thread % 32),
          warp(thread / 32) {}

    BRFT_DEVICE void clear() const {
        constexpr int words = (kMass ? kPieces : 1) * kBins;
        for (int i = thread; i < words; i += threads) s->piece[0][i] = 0;
        block_barrier();
    }

    BRFT_DEVICE float below(float z) const {  // fminf passes over NaN: one of z, and that of inf - inf
        return fminf((m - z) * kBinsOfNat, float(kBins - 1));
    }
    BRFT_DEVICE int bin_of(float z) const { return kBins - 1 - int(below(z)); }
    BRFT_DEVICE bool in_bin(float z, int bin) const {  // a conversion would be a fourth as fast as a comparison
        const float d = below(z), first = float(kBins - 1 - bin);
        return d >= first && d < first + 1.0f;
    }

    BRFT_DEVICE void add(int bin, float z) const {
        if constexpr (!kMass) {
            atomicAdd(&s->piece[0][bin], 1u);
        } else {
            uint64_t mass = weights.mass(expf(exp_domain(z - m)));
            if (mass == 0)
                bin = thread % kBins;  // nothing to add: where others do not wait, as in the last bin of masked rows
            BRFT_UNROLL
            for (int p = 0; p < kPieces; ++p) {  // a piece that is 0, too: a branch would cost more
                if (p < 3 || weights.pieces > 3)
                    atomicAdd(&s->piece[p][bin], uint32_t(mass) & ((1u << weights.piece_bits) - 1));
                mass >>= weights.piece_bits;
            }
        }
    }

    // Each bin's weight, in two words where its pieces were, and each group's.
    BRFT_DEVICE void add_pieces() const {
        block_barrier();
        for (int g = warp; g < kGroups; g += threads / 32) {
            uint64_t sum = 0;
            for (int bin = g * kBinsOfGroup + lane; bin < (g + 1) * kBinsOfGroup; bin += 32) {
                uint64_t weight = s->piece[0][bin];
                if constexpr (kMass) {
                    for (int p = 1; p < weights.pieces; ++p)
                        weight += uint64_t(s->piece[p][bin]) << (p * weights.piece_bits);
                    s->piece[0][bin] = uint32_t(weight);
                    s->piece[1][bin] = uint32_t(weight >> 32);
                }
                sum += weight;
            }
            for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
            if (lane == 0) s->group[g] = sum;
        }
    }

    BRFT_DEVICE uint64_t weight_of(const Selection* there, int bin) const {
        return kMass ? uint64_t(there->piece[1][bin]) << 32 | there->piece[0][bin] : there->piece[0][bin];
    }
    BRFT_DEVICE uint64_t until(uint64_t own) const {  // the sum over this lane and those below
        for (int distance = 1; distance < 32; distance *= 2) {
            const uint64_t below = shuffle_up(own, distance);
            if (lane >= distance) own += below;
        }
        return own;
    }

    // The bin, from the highest down, with which the weights of `count` blocks, one after another, reach the goal: into
    // s->digit, with its weight, and s->goal becomes what is left of the goal for it. `top_p` >= 0 makes a goal of all
    // the weight. Whether there is such a bin. Between two barriers no word is read by one lane and written by another.
    BRFT_DEVICE bool find(int count, double top_p) const {
        const auto block = [&](int r) -> const Selection* { return count == 1 ? s : in_block(s, r); };
        if (warp == 0) {
            uint64_t own = 0;
            for (int r = 0; r < count; ++r) own += block(r)->group[kGroups - 1 - lane];
            const uint64_t sum = until(own);
            uint64_t total = own;
            for (int mask = 16; mask; mask /= 2) total += shuffle_xor(total, mask);
            uint64_t goal = s->goal;
            if (top_p >= 0.0) {
                const double wanted = ceil(top_p * double(total));
                goal = wanted < 1.0 ? 1 : (uint64_t(wanted) < total ? uint64_t(wanted) : total);
            }
            if (sum - own < goal && sum >= goal) {
                s->found_group = uint32_t(kGroups - 1 - lane);
                s->above_group = sum - own;
                s->goal_of_group = goal;
            }
            if (total < goal && lane == 0) s->found_group = kGroups;
        }
        block_barrier();
        if (s->found_group == kGroups) return false;
        if (warp == 0) {
            const int bin = int(s->found_group + 1) * kBinsOfGroup - 1 - 2 * lane;  // and the one below
            uint64_t two[2] = {0, 0};
            for (int r = 0; r < count; ++r) {
                two[0] += weight_of(block(r), bin);
                two[1] += weight_of(block(r), bin - 1);
            }
            const uint64_t goal = s->goal_of_group, sum = s->above_group + until(two[0] + two[1]);
            const uint64_t before[2] = {sum - two[1] - two[0], sum - two[1]};
            BRFT_UNROLL
            for (int i = 0; i < 2; ++i) {
                if (before[i] >= goal || before[i] + two[i] < goal) continue;
                s->digit = uint32_t(bin - i);
                s->weight = two[i];
                s->goal = goal - before[i];
            }
            if (lane == 0) s->alike = 0;
        }
        block_barrier();
        return true;
    }

    // The lowest of `count` different ranks, in s->all, that the goal keeps.
    BRFT_DEVICE uint64_t among_listed(int count) const {
        uint64_t differ = 0;
        const uint64_t any = s->all[0];
        for (int j = thread; j < count; j += threads) differ |= s->all[j] ^ any;
        for (int mask = 16; mask; mask /= 2) differ |= shuffle_xor(differ, mask);
        if (lane == 0) s->of_warp[warp] = differ;
        block_barrier();
        BRFT_NO_UNROLL
        for (int w = 0; w < threads / 32; ++w) differ |= s->of_warp[w];
        if (differ == 0) return any;
        int shift = highest_bit(differ) + 1;
        uint64_t prefix = shift < 64 ? any >> shift : 0;
        while (shift > 0) {
            const int bits = shift < kDigitBits ? shift : kDigitBits;
            shift -= bits;
            clear();
            const auto digit_of = [&](uint64_t rank) { return int(rank >> shift) & ((1 << bits) - 1); };
            const auto shares = [&](uint64_t rank) { return shift + bits == 64 || rank >> (shift + bits) == prefix; };
            for (int j = thread; j < count; j += threads) {
                const uint64_t rank = s->all[j];
                if (shares(rank)) add(digit_of(rank), unordered(uint32_t(rank >> 32)));
            }
            add_pieces();
            block_barrier();
            if (!find(1, -1.0)) return 0;
            for (int j = thread; j < count; j += threads)
                if (shares(s->all[j]) && digit_of(s->all[j]) == int(s->digit)) atomicAdd(&s->alike, 1u);
            prefix = prefix << bits | s->digit;
            block_barrier();
            if (s->alike == 1 || s->weight == s->goal) break;
        }
        // Not prefix << shift: ranks of other bins may lie between it and the lowest member.
        uint64_t lowest = ~uint64_t(0);
        const auto offer = [&](uint64_t rank) { lowest = rank < lowest ? rank : lowest; };
        for (int j = thread; j < count; j += threads)
            if (s->all[j] >> shift == prefix) offer(s->all[j]);
        for (int mask = 16; mask; mask /= 2) offer(shuffle_xor(lowest, mask));
        if (lane == 0) s->of_warp[warp] = lowest;
        block_barrier();
        BRFT_NO_UNROLL
        for (int w = 0; w < threads / 32; ++w) offer(s->of_warp[w]);
        return lowest;
    }

    // The threshold, for what weighs `goal` or, with kMass, top_p of everything; only ranks from `lowest` on count.
    template <class Share>
    BRFT_DEVICE uint64_t threshold(const Share& share, uint64_t lowest, uint64_t goal, double top_p) const {
        const auto visit = [&](const auto& wanted, const auto& take) {
            share.template each<Pass::again>([&](int i, const float* z) {
                const int64_t column = share.column(i);
                if (share.edgeless(i)) {
                    BRFT_UNROLL
                    for (int l = 0; l < kLogits; ++l) {
                        const int64_t id = column + Share::offset(l);
                        if (wanted(z[l], id)) take(z[l], id);
                    }
                } else {
                    const auto extent = share.extent(i);
                    BRFT_NO_UNROLL
                    for (int l = 0; l < kLogits; ++l) {
                        const int64_t id = column + Share::offset(l);
                        const float here = share.z_of(extent.inside(l) ? id : 0);
                        if (extent.inside(l) && wanted(here, id)) take(here, id);
                    }
                }
            });
        };
        if (thread == 0) {
            s->goal = goal;
            s->listed = 0;
        }
        clear();
        if (lowest == 0) {
            visit([](float, int64_t) { return true; }, [&](float z, int64_t) { add(bin_of(z), z); });
        } else {
            visit([&](float z, int64_t id) { return rank_of(z, id) >= lowest; },
                  [&](float z, int64_t) { add(bin_of(z), z); });
        }
        uint64_t prefix = 0;
        int bin = 0, shift = 64;  // the members: ranks in this bin whose bits from `shift` on are the prefix
        for (int bits = 0;; bits = shift < kDigitBits ? shift : kDigitBits) {
            const auto is_member = [&](float z, int64_t id) {
                if (shift == 64 && lowest == 0) return in_bin(z, bin);
                const uint64_t rank = rank_of(z, id);
                return in_bin(z, bin) && rank >= lowest && (shift == 64 || rank >> shift == prefix);
            };
            if (bits) {
                cluster_arrive();  // nothing is cleared while another block still reads it
                cluster_wait();
                if (thread == 0) s->listed = 0;
                clear();
                visit(is_member,
                      [&](float z, int64_t id) { add(int(rank_of(z, id) >> (shift - bits)) & ((1 << bits) - 1), z); });
            }
            add_pieces();
            cluster_arrive();
            cluster_wait();
            if (!find(blocks, kMass && bits == 0 ? top_p : -1.0)) break;  // nothing but NaN: all of it is kept
            if (bits == 0) {
                bin = int(s->digit);
            } else {
                shift -= bits;
                prefix = prefix << bits | s->digit;
            }
            visit(is_member, [&](float z, int64_t id) {
                const uint32_t at = atomicAdd(&s->listed, 1u);
                if (at < kListed) s->list[at] = rank_of(z, id);
            });
            cluster_arrive();
            cluster_wait();
            int count = 0;
            for (int r = 0; r < blocks; ++r) {
                const Selection* there = in_block(s, r);
                const int listed = int(there->listed);
                if (listed <= kListed && count + listed <= kListed)
                    for (int j = thread; j < listed; j += threads) s->all[count + j] = there->list[j];
                count += listed;
            }
            if (count > kListed) continue;
            block_barrier();
            prefix = among_listed(count);
            shift = 0;
            break;
        }
        cluster_arrive();  // nor is a list written over
        cluster_wait();
        const uint64_t found = shift == 0 ? prefix : 0;
        return found > lowest ? found : lowest;
    }
};

}  // namespace bandit_rft::cuda
