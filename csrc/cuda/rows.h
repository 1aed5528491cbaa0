// One row of logits spread over the warps of a block, or of a cluster of blocks.
//
//   y_j = k (v_j - m)   the exponent in base 2: a subtraction, exact where it matters, and a multiplication
//   plain               v = logit, k = log2(e) logit_scale / temperature (no softcap, one temperature, k > 0)
//   general             v = z = softcap tanh(logit_scale logit / softcap) / temperature, k = log2(e)
//   state (m, s, t)     m = max v, s = sum 2^y, t = sum y 2^y
//
// One multiply-add, k v - fl(k m), would do for y, but its likeliest logit is off by the rounding of k m: above |z| of
// about 1e9 (masked rows have such) by more than 2^y can hold.
//
// A row is cut into spans of 512 logits on aligned addresses: a warp takes one at a time, 16 logits a lane, in 16-byte
// loads whose offsets are constants. Only a span over the row's edge looks at columns; what it has outside is -inf. A
// warp owns the same spans in every pass, and a lane the same logits of them: what it leaves in shared memory or writes
// in place needs no barrier.
//
// A first pass that keeps its row copies it straight into shared memory, kAhead spans before it looks at them. A load
// into registers would be one span of a warp under way, and none while the warp computes; at 4.8 TB/s and about 1 us of
// latency, 132 multiprocessors must have 36 KiB under way each, at all times.
#pragma once

#include "../row_math.h"
#include "device.h"

namespace bandit_rft::cuda {

constexpr int kMaxThreads = 512, kMaxWarps = kMaxThreads / 32, kMaxCluster = 8;
constexpr int kLogits = 16, kSpan = 32 * kLogits;  // of a lane and of a warp at a time
constexpr int kAhead = 4;                          // spans of a warp that are copied while it looks at the one before
// k m for the m that stands for -inf as a maximum, where -inf - (-inf) would be NaN: half of what float32 holds, so
// that k (m - m') is finite for any m' up to as much above zero. A row whose largest |k m| is above this is NaN.
constexpr float kNoExponent = -1.7e38f;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
// exp2_approximate is exactly 0 below -126, and 0 * -inf would be NaN.
constexpr float kExponentFloor = -128.0f;

struct F32 {
    using Stored = float;
    static constexpr uint32_t kMinusInfinity = 0xFF800000u;
    BRFT_DEVICE static float widen(float x) { return x; }
    BRFT_DEVICE static float narrow(float x) { return x; }
    BRFT_DEVICE static uint4 pack(const float* x) {
        uint4 packed;
        memcpy(&packed, x, 16);
        return packed;
    }
};
struct Bf16 {
    using Stored = uint16_t;
    static constexpr uint16_t kMinusInfinity = 0xFF80u;
    BRFT_DEVICE static float widen(uint16_t x) {
        const uint32_t bits = uint32_t(x) << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    BRFT_DEVICE static uint16_t narrow(float x) { return uint16_t(bf16_pair(x, x)); }
    BRFT_DEVICE static uint4 pack(const float* x) {
        return {bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]), bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7])};
    }
};
struct F16 {
    using Stored = uint16_t;
    static constexpr uint16_t kMinusInfinity = 0xFC00u;
    BRFT_DEVICE static float widen(uint16_t x) { return from_f16_bits(x); }
    BRFT_DEVICE static uint16_t narrow(float x) { return uint16_t(f16_pair(x, x)); }
    BRFT_DEVICE static uint4 pack(const float* x) {
        return {f16_pair(x[0], x[1]), f16_pair(x[2], x[3]), f16_pair(x[4], x[5]), f16_pair(x[6], x[7])};
    }
};

// What the launch decides about rows of one shape; a block's share of a row is counted in spans.
struct RowPlan {
    int blocks;   // of a cluster, on one row
    int threads;  // of a block
    int cached;   // spans of a block's share that its shared memory holds
    int share;    // spans of a block's share
    int shared_bytes;
};

struct Rows {
    void* logits;
    int64_t count, vocabulary, stride;
    Scaling scaling;
    float temperature;
    const float* temperatures;  // [count], or null for the one above
    float k, k_error;           // k as it is rounded, and (what it stands for) / k - 1
    float no_logit;             // stands for -inf as a maximum v
};

// Whether the plain template serves (if it is `wanted`), and k for it or for the general one.
inline bool set_scaling(Rows& rows, bool wanted) {
    const double k = kLog2E * double(rows.scaling.logit_scale) / double(rows.temperature);
    // Far beyond any temperature; outside, the general template divides every logit.
    const bool plain = wanted && rows.scaling.softcap == 0.0f && !rows.temperatures && k > 1e-7 && k < 1e7;
    rows.k = float(plain ? k : kLog2E);
    rows.k_error = float((plain ? k : kLog2E) / double(rows.k) - 1.0);
    rows.no_logit = kNoExponent / (rows.k > 0.5f ? rows.k : 0.5f);  // at least float32's lowest number
    return plain;
}

template <bool kPlain>
struct RowScaling {
    Scaling scaling;
    float temperature, reciprocal, k, k_error;

    BRFT_DEVICE RowScaling(const Rows& rows, int64_t index)
        : scaling(rows.scaling),
          temperature(rows.temperatures ? rows.temperatures[index] : rows.temperature),
          reciprocal(1.0f / temperature),
          k(kPlain ? rows.k : float(kLog2E)),
          k_error(rows.k_error) {}

    BRFT_DEVICE float z_of_logit(float x) const {
        float z = x * scaling.logit_scale;
        if (!kPlain && scaling.softcap != 0.0f) z = scaling.softcap * tanhf(z / scaling.softcap);
        // z / temperature, rounded once: an approximate quotient and its exact remainder. An infinity has none.
        const float q = z * reciprocal, exact = fmaf(fmaf(-q, temperature, z), reciprocal, q);
        return fabsf(q) <= 3.402823466e+38f ? exact : q;
    }
    // Whether z is the logit itself, as in most draws: known once, not found out at every logit.
    BRFT_DEVICE bool trivial() const {
        return scaling.logit_scale == 1.0f && scaling.softcap == 0.0f && temperature == 1.0f;
    }
    BRFT_DEVICE float value(float x) const { return kPlain ? x : z_of_logit(x); }  // v
};

enum class Pass { only, first, again };  // the first leaves in shared memory what the next ones read

// A block's spans of one row. kVector logits that a lane has side by side, so that they are 16 bytes as they come or as
// they go, whichever is more logits.
template <class In, bool kPlain, int kVector = 16 / int(sizeof(typename In::Stored))>
struct RowShare {
    using Stored = typename In::Stored;
    static constexpr int kParts = int(sizeof(Stored));            // 16-byte loads of a lane
    static constexpr int kPartsOfVector = kVector * kParts / 16;  // side by side; the next are 32 vectors on
    static constexpr int kStep = 32 * kVector;                    // logits from one vector of a lane to its next

    struct Raw {
        uint4 part[kParts];
    };

    const Stored *row, *start;  // of the row; of this lane's part of the block's first span
    int64_t vocabulary;
    int lane, warp, warps, shift, first, count, cached;
    int inner, inner_count;  // the first span without an edge, and how many there are
    uint4* cache;
    RowScaling<kPlain> scale;

    BRFT_DEVICE RowShare(const Rows& rows, const RowPlan& plan, int64_t index, int rank, uint4* cache_memory)
        : row(static_cast<const Stored*>(rows.logits) + index * rows.stride),
          vocabulary(rows.vocabulary),
          lane(int(threadIdx.x) % 32),
          warp(int(threadIdx.x) / 32),
          warps(int(blockDim.x) / 32),
          shift(int(reinterpret_cast<uintptr_t>(row) % (kVector * sizeof(Stored)) / sizeof(Stored))),
          cached(plan.cached),
          cache(cache_memory + lane),
          scale(rows, index) {
        const int spans = int((vocabulary + shift + kSpan - 1) / kSpan);
        first = rank * plan.share < spans ? rank * plan.share : spans;
        count = spans - first < plan.share ? spans - first : plan.share;
        start = row + column(0);
        inner = shift > 0 && first == 0 ? 1 : 0;
        const int whole = int((vocabulary + shift) / kSpan) - first;  // from the share's first on
        inner_count = (whole < count ? whole : count) - inner;
        if (inner_count < 0) inner_count = 0;
    }

    // The column of the first logit that this lane has of span i; its others are in kLogits / kVector vectors of
    // neighbours, each kStep after the one before.
    BRFT_DEVICE int64_t column(int i) const { return int64_t(first + i) * kSpan + lane * kVector - shift; }
    BRFT_DEVICE static constexpr int offset(int l) { return l / kVector * kStep + l % kVector; }
    BRFT_DEVICE bool edgeless(int i) const { return unsigned(i - inner) < unsigned(inner_count); }
    // Whether this thread is the one that has logit `c`.
    BRFT_DEVICE bool owns(int64_t c) const {
        const int64_t at = c + shift, i = at / kSpan - first;
        return i >= 0 && i < count && int(i) % warps == warp && int(at % kSpan) / kVector % 32 == lane;
    }

    BRFT_DEVICE float v_of(int64_t c) const { return scale.value(In::widen(row[c])); }
    BRFT_DEVICE float z_of(int64_t c) const { return scale.z_of_logit(In::widen(row[c])); }

    // Which of a lane's logits of a span are the row's: inside(l).
    struct Extent {
        int before, logits;  // from the row's first logit, and past its last, to this lane's first

        BRFT_DEVICE bool inside(int l) const { return unsigned(offset(l) - before) < unsigned(logits); }
    };
    BRFT_DEVICE Extent extent(int i) const {
        const int64_t c = column(i), left = vocabulary - c;
        const int before = c < 0 ? int(-c) : 0;
        return {before, (left < kSpan ? left < 0 ? 0 : int(left) : kSpan) - before};
    }

    BRFT_DEVICE static constexpr int vector(int p) {  // where a lane's part p of a span is, in 16 bytes
        return p / kPartsOfVector * 32 * kPartsOfVector + p % kPartsOfVector;
    }
    BRFT_DEVICE const Stored* of_span(int i) const { return start + int64_t(i) * kSpan; }
    BRFT_DEVICE Raw load(int i) const {
        const Stored* from = of_span(i);
        Raw raw;
        if (edgeless(i)) {
            const uint4* parts = reinterpret_cast<const uint4*>(from);
            BRFT_UNROLL
            for (int p = 0; p < kParts; ++p) raw.part[p] = parts[vector(p)];
        } else {
            Stored parts[kLogits];
            const Extent extent = this->extent(i);
            BRFT_UNROLL
            for (int l = 0; l < kLogits; ++l) {
                const auto outside = In::kMinusInfinity;
                memcpy(&parts[l], &outside, sizeof(Stored));
                if (extent.inside(l)) parts[l] = from[offset(l)];
            }
            memcpy(&raw, parts, sizeof(raw));
        }
        return raw;
    }

    BRFT_DEVICE uint4* slot(int i) const { return cache + i * (kParts * 32); }
    BRFT_DEVICE void keep(int i, const Raw& raw) const {
        BRFT_UNROLL
        for (int p = 0; p < kParts; ++p) slot(i)[p * 32] = raw.part[p];
    }
    BRFT_DEVICE Raw kept(int i) const {
        Raw raw;
        BRFT_UNROLL
        for (int p = 0; p < kParts; ++p) raw.part[p] = slot(i)[p * 32];
        return raw;
    }
    BRFT_DEVICE Raw load_kept(int i) const { return i < cached ? kept(i) : load(i); }

    // A group of copies for every span that the warp comes to, even an empty one where a span has an edge or no room,
    // or is past the last: so each turn waits for its own span's by leaving the latest kAhead groups under way.
    BRFT_DEVICE void copy(int i) const {
        if (i < cached && edgeless(i)) {
            const uint4* from = reinterpret_cast<const uint4*>(of_span(i));
            BRFT_UNROLL
            for (int p = 0; p < kParts; ++p) copy_async(slot(i) + p * 32, from + vector(p));
        }
        end_copy_group();
    }
    BRFT_DEVICE Raw load_copied(int i) const {
        if (edgeless(i)) return load_kept(i);
        const Raw raw = load(i);
        if (i < cached) keep(i, raw);
        return raw;
    }

    BRFT_DEVICE void values(int i, const Raw& raw, float* v) const {
        Stored parts[kLogits];
        memcpy(parts, &raw, sizeof(raw));
        if (kPlain || scale.trivial()) {
            BRFT_UNROLL
            for (int l = 0; l < kLogits; ++l) v[l] = In::widen(parts[l]);
        } else {
            BRFT_UNROLL
            for (int l = 0; l < kLogits; ++l) v[l] = scale.z_of_logit(In::widen(parts[l]));
        }
        if constexpr (!kPlain) {
            if (!edgeless(i)) {
                const Extent extent = this->extent(i);
                BRFT_UNROLL
                for (int l = 0; l < kLogits; ++l)
                    if (!extent.inside(l)) v[l] = -INFINITY;
            }
        }
    }

    template <Pass kPass>
    BRFT_DEVICE Raw loaded(int i) const {
        if constexpr (kPass == Pass::first) {
            copy(i + kAhead * warps);
            wait_for_copies<kAhead>();
            return load_copied(i);
        }
        return kPass == Pass::again ? load_kept(i) : load(i);
    }

    // visit(i, v) for every span of this warp, all its lanes together.
    template <Pass kPass, class Visit>
    BRFT_DEVICE void each(const Visit& visit) const {
        if constexpr (kPass == Pass::first) {
            BRFT_NO_UNROLL
            for (int ahead = 0; ahead < kAhead; ++ahead) copy(warp + ahead * warps);
        }
        BRFT_NO_UNROLL
        for (int i = warp; i < count; i += warps) {
            const Raw raw = loaded<kPass>(i);
            float v[kLogits];
            values(i, raw, v);
            visit(i, v);
        }
    }
};

struct ThreadState {
    float m, s = 0.0f, t = 0.0f;

    BRFT_DEVICE explicit ThreadState(const Rows& rows) : m(rows.no_logit) {}
};

// Adds a lane's logits v to its state. x: 2^y of each, by the state's new maximum.
BRFT_DEVICE void add_to_state(ThreadState& state, const float* v, float k, float* x) {
    float m = state.m;
    BRFT_UNROLL
    for (int l = 0; l < kLogits; ++l) m = fmaxf(m, v[l]);
    const float d = (state.m - m) * k, w = exp2_approximate(d);
    float s[2] = {0.0f, 0.0f}, t[2] = {0.0f, 0.0f};
    BRFT_UNROLL
    for (int l = 0; l < kLogits; ++l) {
        const float y = (v[l] - m) * k;
        x[l] = exp2_approximate(y);
        s[l % 2] += x[l];
        t[l % 2] = fmaf(x[l], fmaxf(y, kExponentFloor), t[l % 2]);
    }
    state.t = fmaf(fmaf(d, state.s, state.t), w, t[0] + t[1]);
    state.s = fmaf(state.s, w, s[0] + s[1]);
    state.m = m;
}

// Sums that threads add up from here on are double.
struct RowState {
    float m;
    double s, t;
};

// The state brought to a larger maximum.
BRFT_DEVICE RowState raised(const RowState& state, float m, float k) {
    const float d = (state.m - m) * k;
    const double w = double(exp2f(d));
    return {m, state.s * w, (state.t + double(d) * state.s) * w};
}

BRFT_DEVICE float max_over_warp(float x) {
    for (int mask = 16; mask; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

BRFT_DEVICE RowState merged_over_warp(RowState state, float k) {
    state = raised(state, max_over_warp(state.m), k);
    for (int mask = 16; mask; mask /= 2) {
        state.s += shuffle_xor(state.s, mask);
        state.t += shuffle_xor(state.t, mask);
    }
    return state;
}

// The row's vectors begin in shared memory where a kernel's own header ends, so a header is a multiple of their size.
template <class Header>
constexpr int kHeaderBytes = int(sizeof(Header));
template <class Header>
BRFT_DEVICE uint4* after_header(Header* header) {
    static_assert(alignof(Header) % 16 == 0 && sizeof(Header) % 16 == 0, "the row's vectors would be misaligned");
    return reinterpret_cast<uint4*>(header + 1);
}

// Every warp's state, in the shared memory of every block of the cluster.
struct alignas(16) SharedStates {
    float m[kMaxCluster * kMaxWarps];
    double s[kMaxCluster * kMaxWarps], t[kMaxCluster * kMaxWarps];
};
static_assert(sizeof(SharedStates) % 16 == 0);

// Every warp's state to every block. Expects an open cluster_arrive_first (a block's shared memory may be written only
// once that block runs), and is itself a barrier for all that was read or written before it.
BRFT_DEVICE void share_state(const ThreadState& own, float k, SharedStates* shared, int blocks, int rank) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
    const RowState state = merged_over_warp({own.m, double(own.s), double(own.t)}, k);
    cluster_wait();
    if (lane < blocks) {
        SharedStates* there = in_block(shared, lane);
        there->m[rank * warps + warp] = state.m;
        there->s[rank * warps + warp] = state.s;
        there->t[rank * warps + warp] = state.t;
    }
    cluster_arrive();
    cluster_wait();
}

// The state of the whole row, in every lane of the warp that asks, after share_state.
BRFT_DEVICE RowState whole_state(const SharedStates* shared, float k, int states) {
    RowState all{shared->m[0], 0, 0};
    BRFT_NO_UNROLL
    for (int i = int(threadIdx.x) % 32; i < states; i += 32) {
        const float m = fmaxf(all.m, shared->m[i]);
        const RowState a = raised(all, m, k), b = raised({shared->m[i], shared->s[i], shared->t[i]}, m, k);
        all = {m, a.s + b.s, a.t + b.t};
    }
    return merged_over_warp(all, k);
}

// What is known of a row once its state is. The likeliest logit's own term, on which the log-probability of a token
// that is nearly certain hangs, is exact in s: 2^0. The rounding of k is made good to first order: d log2(s) / d log(k)
// = E[y].
struct RowSoftmax {
    float m;
    double s, mean, log2_s;
    float k, k_error;

    template <bool kPlain>
    BRFT_DEVICE RowSoftmax(const RowState& state, const RowScaling<kPlain>& scale)
        : m(state.m), s(state.s), mean(state.t / s), log2_s(log2(s)), k(scale.k), k_error(scale.k_error) {}

    BRFT_DEVICE float logprob(float v) const {
        const double y = (double(v) - double(m)) * double(k);
        return float(kLn2 * (y * (1.0 + double(k_error)) - double(k_error) * mean - log2_s));
    }
    BRFT_DEVICE float entropy() const { return float(kLn2 * (log2_s - mean)); }
};

}  // namespace bandit_rft::cuda
