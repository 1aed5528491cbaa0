// Rows of logits and the LM head on a CPU. Compiled once for each instruction set (BRFT_ISA, BRFT_LANES); see
// kernels.h.
//
//   pass 1   (m, s, t) of each block of 768 logits, merged in order          -> lse, logp, entropy
//   pass 2   dz_j = p_j (-c + e (log p_j + entropy)) + c [j = target]        -> over the logits
//            (with e = 0 and float32, pass 1 leaves exp(z - m) in place and pass 2 is one multiplication)
//   draw     argmax_j z_j + g_j, where g_j is only computed if it can win
//
// Never in memory: probabilities, noise, or anything else of the row's length but the row itself (read from L2 in pass
// 2).
#include "kernels.h"

#include "panel_product.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace bandit_rft::cpu {
namespace BRFT_ISA {

// z of `n` logits from `begin` on. Returns a pointer to them: the row itself where nothing has to be done.
const float* scaled_block(const Row& row, int64_t begin, int n, float* buffer) {
    const float* source;
    if (row.dtype == DType::f32) {
        source = static_cast<const float*>(row.logits) + begin;
    } else {
        const uint16_t* raw = static_cast<const uint16_t*>(row.logits) + begin;
        for (int i = 0; i < n; ++i) buffer[i] = from_bf16(raw[i]);
        source = buffer;
    }
    if (row.scaling.logit_scale != 1.0f) {
        const float scale = row.scaling.logit_scale;
        for (int i = 0; i < n; ++i) buffer[i] = source[i] * scale;
        source = buffer;
    }
    if (row.scaling.softcap != 0.0f) {
        const float cap = row.scaling.softcap;
        for (int i = 0; i < n; ++i) buffer[i] = cap * tanh_fast(source[i] / cap);
        source = buffer;
    }
    if (row.temperature != 1.0f) {
        const float temperature = row.temperature;
        for (int i = 0; i < n; ++i) buffer[i] = source[i] / temperature;
        source = buffer;
    }
    return source;
}

BRFT_INLINE float block_max(const float* z, int n) {
    float m = kLowest;
#pragma omp simd reduction(max : m)
    for (int i = 0; i < n; ++i) m = z[i] > m ? z[i] : m;
    return m;
}

// The state of a block whose maximum is known.
BRFT_INLINE SoftmaxState<double> block_state(const float* z, int n, float m) {
    float s = 0, t = 0;
#pragma omp simd reduction(+ : s, t)
    for (int i = 0; i < n; ++i) {
        const float d = exp_domain(z[i] - m);  // finite: 0 * -inf must not become NaN
        const float x = exp_inside(d);
        s += x;
        t += x * d;
    }
    SoftmaxState<double> state;
    state.m = m;
    state.s = s;
    state.t = t;
    return state;
}

BRFT_INLINE int block_length(int64_t vocabulary, int64_t begin) {
    return int(vocabulary - begin < kBlock ? vocabulary - begin : kBlock);
}

SoftmaxState<double> row_state(const Row& row) {
    alignas(64) float buffer[kBlock];
    SoftmaxState<double> state;
    for (int64_t begin = 0; begin < row.vocabulary; begin += kBlock) {
        const int n = block_length(row.vocabulary, begin);
        const float* z = scaled_block(row, begin, n, buffer);
        state = merge(state, block_state(z, n, block_max(z, n)));
    }
    return state;
}

float row_logit(const Row& row, int64_t index) {
    float buffer[1];
    return *scaled_block(row, index, 1, buffer);
}

void row_scaled(const Row& row, float* z) {
    for (int64_t begin = 0; begin < row.vocabulary; begin += kBlock) {
        const int n = block_length(row.vocabulary, begin);
        const float* source = scaled_block(row, begin, n, z + begin);
        if (source != z + begin) memcpy(z + begin, source, sizeof(float) * size_t(n));
    }
}

void row_gradient(const Row& row, void* out, int64_t target, const SoftmaxState<double>& state, float c, float e) {
    alignas(64) float buffer[kBlock], dz[kBlock];
    const float m = state.m, log_s = float(log(state.s)), entropy = row_entropy(state);
    const float chain = row.scaling.logit_scale / row.temperature;  // dz/dx but for the softcap's own slope
    const float constant = (-c + e * entropy) * chain, slope = e * chain;
    const float cap = row.scaling.softcap, unit = cap != 0.0f ? row.temperature / cap : 0.0f;
    const float z_target = row_logit(row, target);
    // p_target - 1 through expm1: near certainty the subtraction would lose every digit.
    const float logp_target = row_logprob(state, z_target);
    const float p_target = expf(logp_target);  // 0 where the target's logit is -inf: 0 * -inf must not become NaN
    const float pull = p_target == 0.0f ? 0.0f : e * p_target * (logp_target + entropy);
    float at_target = (-c * expm1f(logp_target) + pull) * chain;
    if (cap != 0.0f) at_target *= 1.0f - (z_target * unit) * (z_target * unit);
    for (int64_t begin = 0; begin < row.vocabulary; begin += kBlock) {
        const int n = block_length(row.vocabulary, begin);
        const float* z = scaled_block(row, begin, n, buffer);
        float* to = row.dtype == DType::f32 ? static_cast<float*>(out) + begin : dz;
        if (slope == 0.0f) {
#pragma omp simd
            for (int i = 0; i < n; ++i) to[i] = exp_fast((z[i] - m) - log_s) * constant;
        } else {
#pragma omp simd
            for (int i = 0; i < n; ++i) {
                const float logp = exp_domain((z[i] - m) - log_s);
                to[i] = exp_inside(logp) * (constant + slope * logp);
            }
        }
        if (cap != 0.0f) {  // z may be the very buffer: it is still the z of this block here
            for (int i = 0; i < n; ++i) {
                const float u = z[i] * unit;
                to[i] *= 1.0f - u * u;
            }
        }
        if (target >= begin && target < begin + n) to[target - begin] = at_target;
        if (row.dtype == DType::bf16) {
            uint16_t* narrow = static_cast<uint16_t*>(out) + begin;
            for (int i = 0; i < n; ++i) narrow[i] = to_bf16(dz[i]);
        }
    }
}

SoftmaxState<double> row_exponentials(const Row& row, float* exponentials, float* block_max_of) {
    alignas(64) float buffer[kBlock];
    SoftmaxState<double> state;
    for (int64_t begin = 0; begin < row.vocabulary; begin += kBlock) {
        const int n = block_length(row.vocabulary, begin);
        const float* z = scaled_block(row, begin, n, buffer);
        float* e = exponentials + begin;  // may be z itself
        const float m = block_max(z, n);
        float s = 0, t = 0;
#pragma omp simd reduction(+ : s, t)
        for (int i = 0; i < n; ++i) {
            const float d = exp_domain(z[i] - m);
            const float x = exp_inside(d);
            e[i] = x;
            s += x;
            t += x * d;
        }
        SoftmaxState<double> block;
        block.m = block_max_of[begin / kBlock] = m;
        block.s = s;
        block.t = t;
        state = merge(state, block);
    }
    return state;
}

void scale_exponentials(float* exponentials, int64_t vocabulary, const float* block_max_of, int64_t target,
                        float logp_target, const SoftmaxState<double>& state, float c) {
    for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
        const int n = block_length(vocabulary, begin);
        const float factor = float(-c * exp(double(block_max_of[begin / kBlock]) - state.m) / state.s);
        float* e = exponentials + begin;
#pragma omp simd
        for (int i = 0; i < n; ++i) e[i] *= factor;
    }
    exponentials[target] = -c * expm1f(logp_target);
}

// Philox with each 32-bit word in a 64-bit lane: the product needs no widening, and since it reads only the lower half
// of a lane, what the rounds leave in the upper half never has to be cleared. Compilers find this form only when told.
typedef uint64_t Wide __attribute__((vector_size(BRFT_LANES * 4), may_alias));
constexpr int kWideLanes = BRFT_LANES / 2;

BRFT_INLINE Wide low_product(Wide a, Wide b) {
#if defined(__AVX512F__)
    return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

BRFT_INLINE bool any(Wide mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__SSE2__)
    return _mm_movemask_epi8((__m128i)mask) != 0;
#else
    uint64_t bits = 0;
    for (int l = 0; l < kWideLanes; ++l) bits |= mask[l];
    return bits != 0;
#endif
}

typedef uint32_t Words __attribute__((vector_size(BRFT_LANES * 4), may_alias));
constexpr int kGroup =
    4 * BRFT_LANES;  // tokens whose random words are compared at once: two chains of rounds side by side

// What all counters of one draw share, spread over the lanes once: the ten round keys and three counter words.
struct WideStream {
    Wide key[10][2], position, sequence_low, sequence_high, lane;

    explicit WideStream(const Stream& stream) {
        const Wide zero = {};
        uint32_t k0 = stream.key.low, k1 = stream.key.high;
        for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
            key[round][0] = zero + k0;
            key[round][1] = zero + k1;
        }
        position = zero + stream.position;
        sequence_low = zero + stream.sequence_low;
        sequence_high = zero + stream.sequence_high;
        for (int l = 0; l < kWideLanes; ++l) lane[l] = uint64_t(l);
    }
};

// The words of the kGroup / 4 counters from `first_quad` on: word j of quad q is 32 bits of halves[j / 2][q], which lie
// on the boundary of a vector.
BRFT_INLINE void group_words(const WideStream& stream, uint64_t first_quad, uint64_t (*halves)[kGroup / 4]) {
    const Wide m0 = Wide{} + 0xD2511F53u, m1 = Wide{} + 0xCD9E8D57u;
    BRFT_UNROLL
    for (int i = 0; i < kGroup / 4; i += kWideLanes) {
        Wide c0 = stream.lane + (first_quad + uint64_t(i)), c1 = stream.position;
        Wide c2 = stream.sequence_low, c3 = stream.sequence_high;
        BRFT_UNROLL
        for (int round = 0; round < 10; ++round) {
            const Wide p0 = low_product(c0, m0), p1 = low_product(c2, m1);
            c0 = (p1 >> 32) ^ c1 ^ stream.key[round][0];
            c2 = (p0 >> 32) ^ c3 ^ stream.key[round][1];
            c1 = p1;
            c3 = p0;
        }
        const Wide low = (c0 & 0xFFFFFFFFu) | (c1 << 32), high = (c2 & 0xFFFFFFFFu) | (c3 << 32);
        *reinterpret_cast<Wide*>(halves[0] + i) = low;  // not by memcpy: see vectors.h
        *reinterpret_cast<Wide*>(halves[1] + i) = high;
    }
}

// Offers every token of a block, whose maximum is m, to the draw. Since -log1p(-u) >= u, a token beats `best` only if
// u < exp(z - best). So a group of tokens is passed over when its smallest random word exceeds that bound for z = m
// (one compare a word, no logarithm), and a block needs no random numbers at all when even the largest noise (22.9) on
// its most likely token could not win.
BRFT_INLINE void draw_block(const float* z, float m, int n, int64_t begin, const WideStream& stream, Draw& draw) {
    // exp(m - best) with room for the rounding of z + g and of the exponentials, in units of a random word
    const auto bound_for = [m](float best) {
        const float slack = 1.0f + 1e-4f + 4e-7f * (fabsf(m) + (best > kLowest ? fabsf(best) : 0.0f) + 32.0f);
        return slack * expf(m - best) * 0x1p+32f;
    };
    const auto as_word = [](float limit) { return limit < 4294966784.0f ? uint32_t(limit) + 1u : 0xFFFFFFFFu; };
    float bound = bound_for(draw.best);
    if (!(bound >= 0.5f)) return;
    uint32_t largest = as_word(bound);
    alignas(64) uint64_t halves[2][kGroup / 4];
    for (int start = 0; start < n; start += kGroup) {
        group_words(stream, uint64_t(begin + start) / 4, halves);
        Wide candidates = {};
        BRFT_UNROLL
        for (int i = 0; i < kGroup / BRFT_LANES; ++i) {
            const Words words = reinterpret_cast<const Words*>(halves)[i];
            candidates |= (Wide)(words <= (Words{} + largest));
        }
        if (!any(candidates)) continue;
        const int length = n - start < kGroup ? n - start : kGroup;
        for (int i = 0; i < length; ++i) {
            const uint32_t word = uint32_t(halves[i % 4 / 2][i / 4] >> (i % 2 * 32));
            const float logit = z[start + i];
            if (word > largest || float(word) > exp_fast(logit - m) * bound) continue;
            const float perturbed = logit + gumbel_from_word(word);
            if (perturbed > draw.best) {
                draw.best = perturbed;
                draw.token = begin + start + i;
                bound = bound_for(perturbed);
                largest = as_word(bound);
            }
        }
    }
}

SoftmaxState<double> row_draw(const Row& row, const Stream& stream, Draw& draw) {
    alignas(64) float buffer[kBlock];
    const WideStream wide(stream);
    SoftmaxState<double> state;
    for (int64_t begin = 0; begin < row.vocabulary; begin += kBlock) {
        const int n = block_length(row.vocabulary, begin);
        const float* z = scaled_block(row, begin, n, buffer);
        const float m = block_max(z, n);
        draw_block(z, m, n, begin, wide, draw);
        state = merge(state, block_state(z, n, m));
    }
    return state;
}

// The head, in panels of batch rows, or a few of them each for itself (panel_product.h).
static_assert(kBlock % kRowsOfFew == 0 && kBlock % kTile == 0 && kBlock % 4 == 0,
              "a block is a whole number of head tiles and counters");

void head_logits(const float* packed, int64_t batch, int64_t hidden_size, const void* weight, DType weight_dtype,
                 int64_t weight_stride, const float* bias, int64_t begin, int64_t end, float* out, int64_t out_stride,
                 float* scratch) {
    alignas(64) float sums[kTile * kPanel], few[kFewVectors][kRowsOfFew];
    const int at_once = rows_at_once(batch);
    for (int64_t v = begin; v < end; v += at_once) {
        const int rows = int(end - v < at_once ? end - v : at_once);
        const float* tile;
        int64_t tile_stride;
        if (weight_dtype == DType::f32) {
            tile = static_cast<const float*>(weight) + v * weight_stride;
            tile_stride = weight_stride;
        } else {
            for (int r = 0; r < rows; ++r) {
                const uint16_t* narrow = static_cast<const uint16_t*>(weight) + (v + r) * weight_stride;
                for (int64_t k = 0; k < hidden_size; ++k) scratch[r * hidden_size + k] = from_bf16(narrow[k]);
            }
            tile = scratch;
            tile_stride = hidden_size;
        }
        const auto write = [&](int64_t b, const float* from, int step) {
            float* to = out + b * out_stride + v;
            for (int r = 0; r < rows; ++r) to[r] = from[r * step] + (bias ? bias[v + r] : 0.0f);
        };
        if (batch <= kFewVectors) {
            few_product(rows, tile, tile_stride, packed, hidden_size, hidden_size, batch, few);
            for (int64_t b = 0; b < batch; ++b) write(b, few[b], 1);
            continue;
        }
        for (int64_t first = 0; first < batch; first += kPanel) {
            const int members = int(batch - first < kPanel ? batch - first : kPanel);
            rows_product(rows, tile, tile_stride, packed + first * hidden_size, hidden_size, members, sums);
            for (int b = 0; b < members; ++b) write(first + b, sums + b, kPanel);
        }
    }
}

void pack_hidden(const void* hidden, DType dtype, int64_t stride, int64_t batch, int64_t hidden_size, float* packed) {
    const bool few = batch <= kFewVectors;
    const int64_t lanes = few ? batch : (batch + kPanel - 1) / kPanel * kPanel, step = few ? 1 : kPanel;
    for (int64_t b = 0; b < lanes; ++b) {
        float* to = packed + (few ? b * hidden_size : b / kPanel * kPanel * hidden_size + b % kPanel);
        for (int64_t k = 0; k < hidden_size; ++k) {
            float x = 0.0f;
            if (b < batch)
                x = dtype == DType::f32 ? static_cast<const float*>(hidden)[b * stride + k]
                                        : from_bf16(static_cast<const uint16_t*>(hidden)[b * stride + k]);
            to[k * step] = x;
        }
    }
}

}  // namespace BRFT_ISA

const Kernels BRFT_PASTE(kernels_, BRFT_ISA) = {
    BRFT_STRING(BRFT_ISA),
    BRFT_LANES,
    BRFT_ISA::kPanel,
    BRFT_ISA::rows_at_once,
    BRFT_ISA::row_state,
    BRFT_ISA::row_logit,
    BRFT_ISA::row_scaled,
    BRFT_ISA::row_gradient,
    BRFT_ISA::row_exponentials,
    BRFT_ISA::scale_exponentials,
    BRFT_ISA::row_draw,
    BRFT_ISA::head_logits,
    BRFT_ISA::pack_hidden,
    &BRFT_PASTE(decoder_kernels_, BRFT_ISA),
    &BRFT_PASTE(attention_kernels_, BRFT_ISA),
    &BRFT_PASTE(layer_kernels_, BRFT_ISA),
    &BRFT_PASTE(product_kernels_, BRFT_ISA),
};

}  // namespace bandit_rft::cpu
