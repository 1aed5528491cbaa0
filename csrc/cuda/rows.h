// One row of logits spread over the threads of a block, or of a cluster of blocks, in 16-byte vectors.
//
// Vectors lie on 16-byte addresses whatever the row's own address; the first and the last of a row may be partial. Each
// thread owns the same vectors in every pass, so what it leaves in shared memory or writes in place needs no barrier.
#pragma once

#include "../row_math.h"
#include "device.h"

namespace bandit_rft::cuda {

constexpr int kMaxThreads = 512, kMaxWarps = kMaxThreads / 32, kMaxCluster = 8;
constexpr float kExpFloor = -104.0f;  // exp is exactly 0 from here on down, and 0 * kExpFloor is no NaN

struct F32 {
    using Stored = float;
    BRFT_DEVICE static float widen(float x) { return x; }
    BRFT_DEVICE static float narrow(float x) { return x; }
};
struct Bf16 {
    using Stored = uint16_t;
    BRFT_DEVICE static float widen(uint16_t x) {
        const uint32_t bits = uint32_t(x) << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    BRFT_DEVICE static uint16_t narrow(float x) { return bf16_bits(x); }
};
struct F16 {
    using Stored = uint16_t;
    BRFT_DEVICE static float widen(uint16_t x) { return from_f16_bits(x); }
    BRFT_DEVICE static uint16_t narrow(float x) { return f16_bits(x); }
};

// Logits as they are to z = softcap * tanh(logit_scale * x / softcap) / temperature.
struct RowScaling {
    Scaling scaling;
    float temperature, reciprocal;

    BRFT_DEVICE RowScaling(const Scaling& s, float t) : scaling(s), temperature(t), reciprocal(1.0f / t) {}
    BRFT_DEVICE float operator()(float x) const {
        float z = x;
        if (scaling.logit_scale != 1.0f) z *= scaling.logit_scale;
        if (scaling.softcap != 0.0f) z = scaling.softcap * tanhf(z / scaling.softcap);
        if (temperature != 1.0f) {
            // z / temperature, rounded once: an approximate quotient and its exact remainder. An infinity has none.
            const float q = z * reciprocal, exact = fmaf(fmaf(-q, temperature, z), reciprocal, q);
            z = fabsf(q) <= 3.402823466e+38f ? exact : q;
        }
        return z;
    }
};

// What the launch decides about rows of one shape.
struct RowPlan {
    int blocks;   // of a cluster, on one row
    int threads;  // of a block
    int cached;   // vectors of a block's share that its shared memory holds
    int share;    // vectors of a block's share
    int shared_bytes;
};

struct Rows {
    void* logits;
    int64_t count, vocabulary, stride;
    Scaling scaling;
    float temperature;
    const float* temperatures;  // [count], or null for the one above
};

template <class In>
struct RowShare {
    using Stored = typename In::Stored;
    static constexpr int kWidth = 16 / int(sizeof(Stored));
    static constexpr int kUnroll = 16 / kWidth;  // vectors of a thread in flight: 16 logits

    const Stored* row;
    int64_t vocabulary;
    int shift, rank, first, count, cached;
    uint4* cache;
    RowScaling scale;

    BRFT_DEVICE RowShare(const Rows& rows, const RowPlan& plan, int64_t index, int block_rank, uint4* cache_memory)
        : row(static_cast<const Stored*>(rows.logits) + index * rows.stride),
          vocabulary(rows.vocabulary),
          shift(int(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(Stored))),
          rank(block_rank),
          cached(plan.cached),
          cache(cache_memory),
          scale(rows.scaling, rows.temperatures ? rows.temperatures[index] : rows.temperature) {
        const int vectors = int((vocabulary + shift + kWidth - 1) / kWidth);
        first = rank * plan.share < vectors ? rank * plan.share : vectors;
        count = vectors - first < plan.share ? vectors - first : plan.share;
    }

    BRFT_DEVICE int64_t column(int i) const { return int64_t(first + i) * kWidth - shift; }
    BRFT_DEVICE bool whole(int i) const { return column(i) >= 0 && column(i) + kWidth <= vocabulary; }
    BRFT_DEVICE bool inside(int i, int lane) const {
        return uint64_t(column(i) + lane) < uint64_t(vocabulary);  // a negative column is a huge one
    }

    BRFT_DEVICE uint4 load(int i) const {
        if (whole(i)) return *reinterpret_cast<const uint4*>(row + column(i));
        Stored parts[kWidth];
        for (int l = 0; l < kWidth; ++l) parts[l] = inside(i, l) ? row[column(i) + l] : Stored(0);
        uint4 raw;
        memcpy(&raw, parts, 16);
        return raw;
    }
    BRFT_DEVICE uint4 load_cached(int i) const { return i < cached ? cache[i] : load(i); }

    BRFT_DEVICE void scaled(int i, const uint4& raw, float* z) const {
        Stored parts[kWidth];
        memcpy(parts, &raw, 16);
        BRFT_UNROLL
        for (int l = 0; l < kWidth; ++l) z[l] = scale(In::widen(parts[l]));
        if (!whole(i))
            for (int l = 0; l < kWidth; ++l)
                if (!inside(i, l)) z[l] = -INFINITY;
    }

    // visit(i, z): kUnroll vectors are loaded before the first is looked at. Fills the cache on the first pass.
    template <bool kFirstPass, class Visit>
    BRFT_DEVICE void each(const Visit& visit) const {
        for (int base = int(threadIdx.x); base < count; base += kUnroll * int(blockDim.x)) {
            uint4 raw[kUnroll];
            BRFT_UNROLL
            for (int u = 0; u < kUnroll; ++u) {
                const int i = base + u * int(blockDim.x);
                if (i < count) raw[u] = kFirstPass ? load(i) : load_cached(i);
            }
            BRFT_UNROLL
            for (int u = 0; u < kUnroll; ++u) {
                const int i = base + u * int(blockDim.x);
                if (i < count) {
                    if (kFirstPass && i < cached) cache[i] = raw[u];
                    float z[kWidth];
                    scaled(i, raw[u], z);
                    visit(i, z);
                }
            }
        }
    }
};

BRFT_DEVICE float exp_domain(float d) { return d < kExpFloor ? kExpFloor : d; }  // a NaN stays

// Adds the logits z of one vector to a thread's state.
template <int kWidth>
BRFT_DEVICE void add_to_state(SoftmaxState<float>& state, const float* z) {
    float m = state.m;
    BRFT_UNROLL
    for (int l = 0; l < kWidth; ++l) m = z[l] > m ? z[l] : m;
    if (m > state.m) {
        const float d = exp_domain(state.m - m), w = expf(d);
        state.t = (state.t + d * state.s) * w;
        state.s *= w;
        state.m = m;
    }
    BRFT_UNROLL
    for (int l = 0; l < kWidth; ++l) {
        const float d = exp_domain(z[l] - m), x = expf(d);
        state.s += x;
        state.t += x * d;
    }
}

// The state brought to a larger maximum; sums that threads add up from here on are double.
BRFT_DEVICE SoftmaxState<double> raised(const SoftmaxState<double>& state, float m) {
    SoftmaxState<double> out;
    const float d = exp_domain(state.m - m);
    const double w = double(expf(d));
    out.m = m;
    out.s = state.s * w;
    out.t = (state.t + d * state.s) * w;
    return out;
}

BRFT_DEVICE SoftmaxState<double> merged_over_warp(SoftmaxState<double> state) {
    float m = state.m;
    for (int mask = 16; mask; mask /= 2) {
        const float other = shuffle_xor(m, mask);
        m = other > m ? other : m;
    }
    state = raised(state, m);
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

// The state of the whole row, in every thread of the cluster. Expects an open cluster_arrive (a block's shared memory
// may be written only once that block runs), and is itself a barrier for all that was read or written before it.
BRFT_DEVICE SoftmaxState<double> merged_over_cluster(const SoftmaxState<float>& own, SharedStates* shared, int blocks,
                                                     int rank) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
    SoftmaxState<double> state;
    state.m = own.m;
    state.s = own.s;
    state.t = own.t;
    state = merged_over_warp(state);
    cluster_wait();
    if (lane < blocks) {
        SharedStates* there = in_block(shared, lane);
        there->m[rank * warps + warp] = state.m;
        there->s[rank * warps + warp] = state.s;
        there->t[rank * warps + warp] = state.t;
    }
    cluster_arrive();
    cluster_wait();
    SoftmaxState<double> all;
    for (int i = lane; i < blocks * warps; i += 32) {
        SoftmaxState<double> part;
        part.m = shared->m[i];
        part.s = shared->s[i];
        part.t = shared->t[i];
        const float m = all.m > part.m ? all.m : part.m;
        const SoftmaxState<double> a = raised(all, m), b = raised(part, m);
        all.m = m;
        all.s = a.s + b.s;
        all.t = a.t + b.t;
    }
    return merged_over_warp(all);
}

}  // namespace bandit_rft::cuda
