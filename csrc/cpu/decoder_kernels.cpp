// The parts of a decoding step on panels of sequences. Compiled once for each instruction set; see decoder_kernels.h.
//
//   rms norm     y = x / sqrt(mean(x^2) + eps) * weight
//   attention    softmax_t(q . k_t) v_t,  q and k rotated by the position: (a, b) -> (a cos - b sin, b cos + a sin)
//   mlp          down(silu(gate x) * (up x))
//
// Never in memory: a mask, gate x and up x, the queries of more than one head.
#include "decoder_kernels.h"

#include "vectors.h"

namespace bandit_rft::cpu {
namespace BRFT_ISA {

constexpr int kValues = BRFT_LANES == 16 ? 8 : 4;  // elements of a value head whose sums stay in registers
constexpr int kScores = 4;                         // columns scored at once

BRFT_INLINE int computed_lanes(int members) { return members > BRFT_LANES ? kPanel : BRFT_LANES; }
BRFT_INLINE int members_of(int64_t panel, int64_t batch) {
    const int64_t left = batch - panel * kPanel;
    return int(left < kPanel ? left : kPanel);
}

void product(const float* weight, const float* bias, int64_t size, int64_t begin, int64_t end, Panels in, int64_t batch,
             Panels out) {
    for (int64_t r = begin; r < end; r += kTile) {
        const int rows = int(end - r < kTile ? end - r : kTile);
        for (int64_t p = 0; p * kPanel < batch; ++p) {
            const int members = members_of(p, batch), lanes = computed_lanes(members);
            float* to = out.data + p * out.stride + r * kPanel;
            rows_product(rows, weight + r * size, size, in.data + p * in.stride, size, members, to);
            if (bias)
                for (int i = 0; i < rows; ++i)
                    for (int l = 0; l < lanes; ++l) to[i * kPanel + l] += bias[r + i];
        }
    }
}

void gated_product(const float* gate, const float* up, int64_t size, int64_t begin, int64_t end, Panels in, int64_t batch,
                   Panels out) {
    alignas(64) float gates[kTile * kPanel], ups[kTile * kPanel];
    for (int64_t r = begin; r < end; r += kTile) {
        const int rows = int(end - r < kTile ? end - r : kTile);
        for (int64_t p = 0; p * kPanel < batch; ++p) {
            const int members = members_of(p, batch), lanes = computed_lanes(members);
            const float* x = in.data + p * in.stride;
            float* to = out.data + p * out.stride + r * kPanel;
            rows_product(rows, gate + r * size, size, x, size, members, gates);
            rows_product(rows, up + r * size, size, x, size, members, ups);
            for (int i = 0; i < rows * kPanel; i += kPanel) {
#pragma omp simd
                for (int l = 0; l < lanes; ++l) {
                    const float g = gates[i + l];
                    to[i + l] = g / (1.0f + exp_fast(g < -88.0f ? 88.0f : -g)) * ups[i + l];
                }
            }
        }
    }
}

void inverse_rms(const float* x, float eps, int64_t size, int members, float* out) {
    const int lanes = computed_lanes(members);
    alignas(64) float squares[kPanel] = {};
    for (int64_t k = 0; k < size; ++k) {
#pragma omp simd
        for (int l = 0; l < lanes; ++l) squares[l] += x[k * kPanel + l] * x[k * kPanel + l];
    }
    for (int l = 0; l < lanes; ++l) out[l] = 1.0f / sqrtf(squares[l] / float(size) + eps);
}

void rms_norm(const float* x, const float* weight, float eps, int64_t size, int members, float* out) {
    const int lanes = computed_lanes(members);
    alignas(64) float inverse[kPanel];
    inverse_rms(x, eps, size, members, inverse);
    for (int64_t k = 0; k < size; ++k) {
        const float w = weight[k];
#pragma omp simd
        for (int l = 0; l < lanes; ++l) out[k * kPanel + l] = x[k * kPanel + l] * inverse[l] * w;
    }
}

void add(float* x, const float* y, int64_t size, int members) {
    const int lanes = computed_lanes(members);
    for (int64_t k = 0; k < size; ++k) {
#pragma omp simd
        for (int l = 0; l < lanes; ++l) x[k * kPanel + l] += y[k * kPanel + l];
    }
}

// One head of the new token, normalized if there are weights, rotated, times `factor`.
template <int Lanes>
BRFT_INLINE void rotated(const HeadAttention& a, const float* x, const float* weight, const float* given_inverse, float factor,
                         float* out) {
    alignas(64) float inverse[kPanel];
    if (weight && !given_inverse) inverse_rms(x, a.norm_eps, a.head_size, a.members, inverse);
    const float* scale = given_inverse ? given_inverse : inverse;
    const int64_t half = a.head_size / 2;
    for (int64_t d = 0; d < half; ++d) {
        const int64_t low = d * kPanel, high = (d + half) * kPanel;
        const float low_weight = weight ? weight[d] : 1.0f, high_weight = weight ? weight[d + half] : 1.0f;
#pragma omp simd
        for (int l = 0; l < Lanes; ++l) {
            float u = x[low + l], v = x[high + l];
            if (weight) {
                u *= scale[l] * low_weight;
                v *= scale[l] * high_weight;
            }
            out[low + l] = (u * a.cos[low + l] - v * a.sin[low + l]) * factor;
            out[high + l] = (v * a.cos[high + l] + u * a.sin[high + l]) * factor;
        }
    }
}

// scores[t] = q . keys[t] for `Count` columns from t on.
template <int Count, int Columns>
BRFT_INLINE void score(const HeadAttention& a, const float* q, int64_t t, float* scores) {
    Vector sum[Count][Columns] = {};
    const float* keys = a.keys + t * a.column_stride;
    for (int64_t d = 0; d < a.head_size; ++d) {
        BRFT_UNROLL
        for (int c = 0; c < Columns; ++c) {
            const int64_t at = d * kPanel + c * BRFT_LANES;
            const Vector x = load(q + at);
            BRFT_UNROLL
            for (int i = 0; i < Count; ++i) sum[i][c] += x * load(keys + i * a.column_stride + at);
        }
    }
    BRFT_UNROLL
    for (int i = 0; i < Count; ++i) {
        BRFT_UNROLL
        for (int c = 0; c < Columns; ++c) store(scores + (t + i) * kPanel + c * BRFT_LANES, sum[i][c]);
    }
}

// out[d] = sum_t weights[t] values[t, d] / total for `Count` elements from d on.
template <int Count, int Columns>
BRFT_INLINE void mix(const HeadAttention& a, const float* weights, const float* total, int64_t d, float* out) {
    Vector sum[Count][Columns] = {};
    for (int64_t t = a.lowest_first; t < a.columns; ++t) {
        const float* values = a.values + t * a.column_stride + d * kPanel;
        BRFT_UNROLL
        for (int c = 0; c < Columns; ++c) {
            const Vector w = load(weights + t * kPanel + c * BRFT_LANES);
            BRFT_UNROLL
            for (int i = 0; i < Count; ++i) sum[i][c] += w * load(values + i * kPanel + c * BRFT_LANES);
        }
    }
    BRFT_UNROLL
    for (int i = 0; i < Count; ++i) {
        BRFT_UNROLL
        for (int c = 0; c < Columns; ++c)
            store(out + (d + i) * kPanel + c * BRFT_LANES, sum[i][c] / load(total + c * BRFT_LANES));
    }
}

template <int Columns>
BRFT_INLINE void attend_lanes(const HeadAttention& a) {
    constexpr int kLanes = Columns * BRFT_LANES;
    const int64_t newest = (a.columns - 1) * a.column_stride;
    rotated<kLanes>(a, a.key, a.key_norm, a.key_inverse, 1.0f, a.keys + newest);
    memcpy(a.values + newest, a.value, sizeof(float) * size_t(a.head_size * kPanel));
    float *q = a.scratch, *scores = a.scratch + a.head_size * kPanel;
    for (int64_t head = 0; head < a.group; ++head) {
        const float* weight = a.query_norm ? a.query_norm + (a.query_inverse ? head * a.head_size : 0) : nullptr;
        rotated<kLanes>(a, a.query + head * a.head_size * kPanel, weight, a.query_inverse, a.scaling, q);
        int64_t t = a.lowest_first;
        for (; t + kScores <= a.columns; t += kScores) score<kScores, Columns>(a, q, t, scores);
        for (; t < a.columns; ++t) score<1, Columns>(a, q, t, scores);
        for (t = a.lowest_first; t < a.highest_first && t + 1 < a.columns; ++t) {
            for (int l = 0; l < kLanes; ++l) scores[t * kPanel + l] = t < a.first[l] ? -INFINITY : scores[t * kPanel + l];
        }
        alignas(64) float largest[kPanel], total[kPanel];
        for (int l = 0; l < kLanes; ++l) {
            largest[l] = scores[(a.columns - 1) * kPanel + l];  // the new token is seen by every lane, even one that has not begun
            total[l] = 0;
        }
        for (t = a.lowest_first; t + 1 < a.columns; ++t) {
#pragma omp simd
            for (int l = 0; l < kLanes; ++l) {
                const float s = scores[t * kPanel + l];
                largest[l] = s > largest[l] ? s : largest[l];
            }
        }
        for (t = a.lowest_first; t < a.columns; ++t) {
#pragma omp simd
            for (int l = 0; l < kLanes; ++l) {
                const float e = exp_fast(scores[t * kPanel + l] - largest[l]);
                scores[t * kPanel + l] = e;
                total[l] += e;
            }
        }
        float* out = a.out + head * a.head_size * kPanel;
        int64_t d = 0;
        for (; d + kValues <= a.head_size; d += kValues) mix<kValues, Columns>(a, scores, total, d, out);
        for (; d < a.head_size; ++d) mix<1, Columns>(a, scores, total, d, out);
    }
}

void attend(const HeadAttention& a) {
    if (a.members > BRFT_LANES)
        attend_lanes<kColumns>(a);
    else
        attend_lanes<1>(a);
}

}  // namespace BRFT_ISA

const DecoderKernels BRFT_PASTE(decoder_kernels_, BRFT_ISA) = {
    BRFT_ISA::kPanel,      BRFT_ISA::kTile, BRFT_ISA::product, BRFT_ISA::gated_product, BRFT_ISA::rms_norm,
    BRFT_ISA::inverse_rms, BRFT_ISA::add,   BRFT_ISA::attend,
};

}  // namespace bandit_rft::cpu
