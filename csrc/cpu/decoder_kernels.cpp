// The parts of a decoding step on panels of sequences. Compiled once for each instruction set; see decoder_kernels.h.
//
//   rms norm     y = x / sqrt(mean(x^2) + eps) * weight
//   attention    softmax_t(q . k_t) v_t,  q and k rotated by the position: (a, b) -> (a cos - b sin, b cos + a sin)
//   mlp          down(silu(gate x) * (up x))
//
// Never in memory: a mask, gate x and up x, scores of more than one head.
#include "decoder_kernels.h"

#include "decoder_products.h"

namespace bandit_rft::cpu {
namespace BRFT_ISA {

constexpr int kValues = BRFT_LANES == 16 ? 8 : 4;  // elements of a value head whose sums stay in registers
constexpr int kScores = 4;                         // columns scored at once

int lanes_of(int members) { return computed_lanes(members); }

// Lanes of a panel of Panel sequences that are computed where `members` count.
template <int Panel>
BRFT_INLINE int lanes_in(int members) {
    return Panel == 1 ? 1 : computed_lanes(members);
}

// The squares are added up in kFew chains, every kFew-th in one, which a panel of one has in a vector.
template <int Panel>
void inverse_rms(const float* x, float eps, int64_t size, int members, float* out) {
    const int lanes = lanes_in<Panel>(members);
    alignas(64) float squares[kFew][Panel] = {};
    int64_t k = 0;
    if constexpr (Panel == 1) {
        using G = Group<kFew>;
        typename G::Vector sum = {};
        for (; k + kFew <= size; k += kFew) sum += G::load(x + k) * G::load(x + k);
        G::store(squares[0], sum);
    }
    for (; k < size; ++k) {
        float* const chain = squares[k % kFew];
        every_lane(lanes, [&](int l) { chain[l] += x[k * Panel + l] * x[k * Panel + l]; });
    }
    for (int l = 0; l < lanes; ++l) {
        float sum = squares[0][l];
        for (int i = 1; i < kFew; ++i) sum += squares[i][l];
        out[l] = 1.0f / sqrtf(sum / float(size) + eps);
    }
}

template <int Panel>
void rms_norm(const float* x, const float* weight, float eps, int64_t size, int members, float* out) {
    const int lanes = lanes_in<Panel>(members);
    alignas(64) float inverse[Panel];
    inverse_rms<Panel>(x, eps, size, members, inverse);
    for (int64_t k = 0; k < size; ++k) {
        const float w = weight[k];
        every_lane(lanes, [&](int l) { out[k * Panel + l] = x[k * Panel + l] * inverse[l] * w; });
    }
}

template <int Panel>
void add(float* x, const float* y, int64_t size, int members) {
    const int lanes = lanes_in<Panel>(members);
    for (int64_t k = 0; k < size; ++k) every_lane(lanes, [&](int l) { x[k * Panel + l] += y[k * Panel + l]; });
}

// One head of the new token, normalized if there are weights, rotated, times `factor`; to out [head_size, out_lanes].
template <int Panel, int Lanes>
BRFT_INLINE void rotated(const HeadAttention& a, const float* x, const float* weight, const float* given_inverse,
                         float factor, float* out, int64_t out_lanes = Panel) {
    alignas(64) float inverse[Panel];
    if (weight && !given_inverse) inverse_rms<Panel>(x, a.norm_eps, a.head_size, a.members, inverse);
    const float* scale = given_inverse ? given_inverse : inverse;
    const int64_t half = a.head_size / 2;
    for (int64_t d = 0; d < half; ++d) {
        const int64_t low = d * Panel, high = (d + half) * Panel;
        const float low_weight = weight ? weight[d] : 1.0f, high_weight = weight ? weight[d + half] : 1.0f;
#pragma omp simd
        for (int l = 0; l < Lanes; ++l) {
            float u = x[low + l], v = x[high + l];
            if (weight) {
                u *= scale[l] * low_weight;
                v *= scale[l] * high_weight;
            }
            out[d * out_lanes + l] = (u * a.cos[low + l] - v * a.sin[low + l]) * factor;
            out[(d + half) * out_lanes + l] = (v * a.cos[high + l] + u * a.sin[high + l]) * factor;
        }
    }
}

// Element d of column t, of keys or values: each lane's own in [columns, head_size, lanes], or one for all lanes in
// [columns, head_size].
template <bool Shared>
struct Cached {
    const float* data;
    int64_t stride, lanes;
};
template <class G>
BRFT_INLINE typename G::Vector element(const Cached<false>& x, int64_t t, int64_t d, int lane) {
    return G::load(x.data + t * x.stride + d * x.lanes + lane);
}
template <class G>
BRFT_INLINE float element(const Cached<true>& x, int64_t t, int64_t d, int) {
    return x.data[t * x.stride + d];
}

// scores[t] = q . keys[t] for `Count` columns from t on.
template <int Count, int Lanes, bool Shared>
BRFT_INLINE void score(const Cached<Shared>& keys, const float* q, int64_t head_size, int64_t t, float* scores) {
    using G = Group<Lanes>;
    typename G::Vector sum[Count][G::kVectors] = {};
    for (int64_t d = 0; d < head_size; ++d) {
        BRFT_UNROLL
        for (int c = 0; c < G::kVectors; ++c) {
            const auto x = G::load(q + d * kPanel + c * G::kWidth);
            BRFT_UNROLL
            for (int i = 0; i < Count; ++i) sum[i][c] += x * element<G>(keys, t + i, d, c * G::kWidth);
        }
    }
    BRFT_UNROLL
    for (int i = 0; i < Count; ++i) {
        BRFT_UNROLL
        for (int c = 0; c < G::kVectors; ++c) G::store(scores + (t + i) * kPanel + c * G::kWidth, sum[i][c]);
    }
}
template <int Lanes, bool Shared>
BRFT_INLINE void score_all(const Cached<Shared>& keys, const float* q, int64_t head_size, int64_t from, int64_t to,
                           float* scores) {
    int64_t t = from;
    for (; t + kScores <= to; t += kScores) score<kScores, Lanes>(keys, q, head_size, t, scores);
    for (; t < to; ++t) score<1, Lanes>(keys, q, head_size, t, scores);
}

// exp(scores - largest) of the columns [from, to), and its sum; a score of -inf is a column that the lane does not see.
template <int Lanes>
BRFT_INLINE void exponentiate(float* scores, int64_t from, int64_t to, float* total) {
    alignas(64) float largest[kPanel];
    for (int l = 0; l < Lanes; ++l) {
        largest[l] = -INFINITY;
        total[l] = 0;
    }
    for (int64_t t = from; t < to; ++t) {
#pragma omp simd
        for (int l = 0; l < Lanes; ++l) {
            const float s = scores[t * kPanel + l];
            largest[l] = s > largest[l] ? s : largest[l];
        }
    }
    for (int64_t t = from; t < to; ++t) {
#pragma omp simd
        for (int l = 0; l < Lanes; ++l) {
            const float e = exp_fast(scores[t * kPanel + l] - largest[l]);
            scores[t * kPanel + l] = e;
            total[l] += e;
        }
    }
}

// out[d] = sum_t weights[t] values[t, d] / total for `Count` elements from d on.
template <int Count, int Lanes, bool Shared>
BRFT_INLINE void mix(const Cached<Shared>& values, const float* weights, const float* total, int64_t from, int64_t to,
                     int64_t d, float* out) {
    using G = Group<Lanes>;
    typename G::Vector sum[Count][G::kVectors] = {};
    for (int64_t t = from; t < to; ++t) {
        BRFT_UNROLL
        for (int c = 0; c < G::kVectors; ++c) {
            const auto w = G::load(weights + t * kPanel + c * G::kWidth);
            BRFT_UNROLL
            for (int i = 0; i < Count; ++i) sum[i][c] += w * element<G>(values, t, d + i, c * G::kWidth);
        }
    }
    BRFT_UNROLL
    for (int i = 0; i < Count; ++i) {
        BRFT_UNROLL
        for (int c = 0; c < G::kVectors; ++c)
            G::store(out + (d + i) * kPanel + c * G::kWidth, sum[i][c] / G::load(total + c * G::kWidth));
    }
}
template <int Lanes, bool Shared>
BRFT_INLINE void mix_all(const Cached<Shared>& values, const float* weights, const float* total, int64_t head_size,
                         int64_t from, int64_t to, float* out) {
    int64_t d = 0;
    for (; d + kValues <= head_size; d += kValues) mix<kValues, Lanes>(values, weights, total, from, to, d, out);
    for (; d < head_size; ++d) mix<1, Lanes>(values, weights, total, from, to, d, out);
}

BRFT_INLINE const float* query_weight(const HeadAttention& a, int64_t head) {
    return a.query_norm ? a.query_norm + (a.query_inverse ? head * a.head_size : 0) : nullptr;
}

template <int Lanes>
BRFT_INLINE void attend_lanes(const HeadAttention& a) {
    const int64_t stride = a.key_stride.column, lanes = a.key_stride.element, newest = (a.columns - 1) * stride;
    rotated<kPanel, Lanes>(a, a.key, a.key_norm, a.key_inverse, 1.0f, a.keys + newest, lanes);
    for (int64_t d = 0; d < a.head_size; ++d)
        memcpy(a.values + newest + d * lanes, a.value + d * kPanel, sizeof(float) * Lanes);
    const Cached<false> keys{a.keys, stride, lanes}, values{a.values, stride, lanes};
    float *q = a.scratch, *scores = a.scratch + a.head_size * kPanel;
    for (int64_t head = 0; head < a.group; ++head) {
        const int64_t at = head * a.head_size * kPanel;
        rotated<kPanel, Lanes>(a, a.query + at, query_weight(a, head), a.query_inverse, a.scaling, q);
        score_all<Lanes>(keys, q, a.head_size, a.lowest_first, a.columns, scores);
        for (int64_t t = a.lowest_first; t < a.highest_first; ++t) {
            for (int l = 0; l < Lanes; ++l)
                scores[t * kPanel + l] = t < a.first[l] ? -INFINITY : scores[t * kPanel + l];
        }
        alignas(64) float total[kPanel];
        exponentiate<Lanes>(scores, a.lowest_first, a.columns, total);
        mix_all<Lanes>(values, scores, total, a.head_size, a.lowest_first, a.columns, a.out + at);
    }
}

void attend(const HeadAttention& a) {
    switch (computed_lanes(a.members)) {
        case kPanel:
            return attend_lanes<kPanel>(a);
        case kFew:
            return attend_lanes<kFew>(a);
        default:
            return attend_lanes<BRFT_LANES>(a);
    }
}

// scores[t] = q . keys[t] for `Vectors` vectors of columns: of each, the sum that `score` computes in a lane.
template <int Vectors>
BRFT_INLINE void score_columns(const float* keys, int64_t stride, const float* q, int64_t head_size, float* scores) {
    using G = Group<BRFT_LANES>;
    typename G::Vector sum[Vectors] = {};
    for (int64_t d = 0; d < head_size; ++d) {
        BRFT_UNROLL
        for (int i = 0; i < Vectors; ++i) sum[i] += q[d] * G::load(keys + d * stride + i * BRFT_LANES);
    }
    BRFT_UNROLL
    for (int i = 0; i < Vectors; ++i) G::store(scores + i * BRFT_LANES, sum[i]);
}

// exp(scores - largest), and their sum, in the order in which `exponentiate` has it.
BRFT_INLINE float exponentiate_columns(float* scores, int64_t columns) {
    using G = Group<BRFT_LANES>;
    float largest = -INFINITY, total = 0;
    typename G::Vector of_lanes = largest + typename G::Vector{};
    int64_t t = 0;
    for (; t + BRFT_LANES <= columns; t += BRFT_LANES) {
        const auto x = G::load(scores + t);
        of_lanes = x > of_lanes ? x : of_lanes;
    }
    for (int l = 0; l < BRFT_LANES; ++l) largest = of_lanes[l] > largest ? of_lanes[l] : largest;
    for (; t < columns; ++t) largest = scores[t] > largest ? scores[t] : largest;
#pragma omp simd
    for (t = 0; t < columns; ++t) scores[t] = exp_fast(scores[t] - largest);
    for (t = 0; t < columns; ++t) total += scores[t];
    return total;
}

// out[d] = sum_t weights[t] values[t, d] / total for `Vectors` vectors of elements: the sums of `mix`.
template <int Vectors>
BRFT_INLINE void mix_elements(const float* values, int64_t stride, const float* weights, float total, int64_t columns,
                              float* out) {
    using G = Group<BRFT_LANES>;
    typename G::Vector sum[Vectors] = {};
    for (int64_t t = 0; t < columns; ++t) {
        BRFT_UNROLL
        for (int i = 0; i < Vectors; ++i) sum[i] += weights[t] * G::load(values + t * stride + i * BRFT_LANES);
    }
    BRFT_UNROLL
    for (int i = 0; i < Vectors; ++i) G::store(out + i * BRFT_LANES, sum[i] / total);
}

// scratch: the rotated query [head_size]; the output and scores, up to whole lines.
void attend_singly(const HeadAttention& a) {
    constexpr int kVectors = 4;
    const int64_t newest = a.columns - 1, elements = a.value_stride.column;
    const int64_t first = a.first[0], columns = a.columns - first;
    float *q = a.scratch, *mixed = q + a.head_size, *scores = mixed + elements;
    rotated<1, 1>(a, a.key, a.key_norm, a.key_inverse, 1.0f, a.keys + newest, a.key_stride.element);
    memcpy(a.values + newest * elements, a.value, sizeof(float) * size_t(a.head_size));
    const float *keys = a.keys + first, *values = a.values + first * elements;
    for (int64_t head = 0; head < a.group; ++head) {
        const int64_t at = head * a.head_size;
        rotated<1, 1>(a, a.query + at, query_weight(a, head), a.query_inverse, a.scaling, q);
        int64_t t = 0;
        for (; t + kVectors * BRFT_LANES <= columns; t += kVectors * BRFT_LANES)
            score_columns<kVectors>(keys + t, a.key_stride.element, q, a.head_size, scores + t);
        for (; t < columns; t += BRFT_LANES)
            score_columns<1>(keys + t, a.key_stride.element, q, a.head_size, scores + t);
        const float total = exponentiate_columns(scores, columns);
        int64_t d = 0;
        for (; d + kVectors * BRFT_LANES <= a.head_size; d += kVectors * BRFT_LANES)
            mix_elements<kVectors>(values + d, elements, scores, total, columns, mixed + d);
        for (; d < a.head_size; d += BRFT_LANES)
            mix_elements<1>(values + d, elements, scores, total, columns, mixed + d);
        memcpy(a.out + at, mixed, sizeof(float) * size_t(a.head_size));
    }
}

template <int Lanes>
BRFT_INLINE void rotate_lanes(const HeadAttention& a) {
    rotated<kPanel, Lanes>(a, a.key, a.key_norm, a.key_inverse, 1.0f, a.key);
    for (int64_t head = 0; head < a.group; ++head) {
        float* query = a.query + head * a.head_size * kPanel;
        rotated<kPanel, Lanes>(a, query, query_weight(a, head), a.query_inverse, a.scaling, query);
    }
}

void rotate(const HeadAttention& a) {
    switch (computed_lanes(a.members)) {
        case kPanel:
            return rotate_lanes<kPanel>(a);
        case kFew:
            return rotate_lanes<kFew>(a);
        default:
            return rotate_lanes<BRFT_LANES>(a);
    }
}

// Up to a panel of queries, in consecutive columns of which the first has `before` others before it; out may be q.
template <int Lanes>
BRFT_INLINE void attend_to_one(const Cached<true>& keys, const Cached<true>& values, const float* q, int64_t head_size,
                               int64_t before, int members, float* scores, float* out) {
    const int64_t columns = before + members;
    score_all<Lanes>(keys, q, head_size, 0, columns, scores);
    for (int t = 1; t < members; ++t) {
        for (int l = 0; l < t; ++l) scores[(before + t) * kPanel + l] = -INFINITY;
    }
    alignas(64) float total[kPanel];
    exponentiate<Lanes>(scores, 0, columns, total);
    mix_all<Lanes>(values, scores, total, head_size, 0, columns, out);
}

// Calls each(floats before a panel's first row, i, n) for rows [row, row + count): row + i and the n - 1 after it lie
// side by side there.
template <class Each>
BRFT_INLINE void side_by_side(const Panels& panels, int64_t row, int64_t count, const Each& each) {
    for (int64_t i = 0; i < count;) {
        const int64_t lane = (row + i) % kPanel, n = count - i < kPanel - lane ? count - i : kPanel - lane;
        each((row + i) / kPanel * panels.stride + lane, i, n);
        i += n;
    }
}

// A head's new columns, `fresh`, into the cache and, after those before them, to `to` [columns, head_size].
BRFT_INLINE void gather(const HeadPrefill& a, const Panels& fresh, float* cached, const Stride& stride, float* to) {
    for (int64_t t = 0; t < a.begin; ++t)
        for (int64_t d = 0; d < a.head_size; ++d)
            to[t * a.head_size + d] = cached[t * stride.column + d * stride.element];
    side_by_side(fresh, a.row, a.count, [&](int64_t at, int64_t i, int64_t n) {
        for (int64_t t = 0; t < n; ++t)
            for (int64_t d = 0; d < a.head_size; ++d) {
                const float x = fresh.data[at + d * kPanel + t];
                to[(a.begin + i + t) * a.head_size + d] = x;
                cached[(a.begin + i + t) * stride.column + d * stride.element] = x;
            }
    });
}

void prefill(const HeadPrefill& a) {
    const int64_t columns = a.begin + a.count, size = a.head_size;
    float *q = a.scratch, *scores = q + size * kPanel, *keys = scores + columns * kPanel,
          *values = keys + columns * size;
    gather(a, a.key, a.keys, a.key_stride, keys);
    gather(a, a.value, a.values, a.value_stride, values);
    for (int64_t head = 0; head < a.group; ++head)
        for (int64_t i = 0; i < a.count; i += kPanel) {
            const int members = int(a.count - i < kPanel ? a.count - i : kPanel);
            memset(q, 0, sizeof(float) * size_t(size * kPanel));
            side_by_side(a.query, a.row + i, members, [&](int64_t at, int64_t first, int64_t n) {
                const float* from = a.query.data + at + head * size * kPanel;
                for (int64_t d = 0; d < size; ++d)
                    memcpy(q + d * kPanel + first, from + d * kPanel, sizeof(float) * size_t(n));
            });
            const auto attend = [&](auto lanes) {
                attend_to_one<lanes.kLanes>({keys, size, 0}, {values, size, 0}, q, size, a.begin + i, members, scores,
                                            q);
            };
            switch (computed_lanes(members)) {
                case kPanel:
                    attend(Group<kPanel>());
                    break;
                case kFew:
                    attend(Group<kFew>());
                    break;
                default:
                    attend(Group<BRFT_LANES>());
            }
            side_by_side(a.out, a.row + i, members, [&](int64_t at, int64_t first, int64_t n) {
                float* to = a.out.data + at + head * size * kPanel;
                for (int64_t d = 0; d < size; ++d)
                    memcpy(to + d * kPanel, q + d * kPanel + first, sizeof(float) * size_t(n));
            });
        }
}

}  // namespace BRFT_ISA

const DecoderKernels BRFT_PASTE(decoder_kernels_, BRFT_ISA) = {
    {BRFT_ISA::kPanel, BRFT_ISA::product, BRFT_ISA::gated_product, BRFT_ISA::rms_norm<BRFT_ISA::kPanel>,
     BRFT_ISA::inverse_rms<BRFT_ISA::kPanel>, BRFT_ISA::add<BRFT_ISA::kPanel>, BRFT_ISA::attend},
    {1, BRFT_ISA::single_product, BRFT_ISA::single_gated_product, BRFT_ISA::rms_norm<1>, BRFT_ISA::inverse_rms<1>,
     BRFT_ISA::add<1>, BRFT_ISA::attend_singly},
    BRFT_ISA::rows_at_once,
    BRFT_ISA::lanes_of,
    BRFT_ISA::kFewVectors,
    BRFT_LANES,
    BRFT_ISA::rotate,
    BRFT_ISA::prefill,
};

}  // namespace bandit_rft::cpu
