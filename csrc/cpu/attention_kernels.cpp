// Causal attention of one sequence, SIMD lanes over queries. Compiled once for each instruction set; see attention.h.
//
//   forward    P = softmax(scaling Q K^T),  O = P V
//   backward   dV = P^T dO,  dS = P * (dO V^T - rowsum(dO * O)),  dQ = scaling dS K,  dK = scaling dS^T Q
//
// Everything is kept transposed, [keys, a panel of queries], so that a softmax runs down the rows and every product is
// one of rows with a panel. Never in memory: scores of more than one panel of queries of one head, a mask, padding.
#include "attention.h"

#include "panel_product.h"

namespace bandit_rft::cpu {
namespace BRFT_ISA {

BRFT_INLINE int64_t panels_of(int64_t size) { return (size + kPanel - 1) / kPanel; }
BRFT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// out [rows, kPanel] = weight [rows, size] . panel [size, kPanel], of which `width` lanes count.
void product(int64_t rows, const float* weight, int64_t stride, const float* panel, int64_t size, int width,
             float* out) {
    for (int64_t r = 0; r < rows; r += kTile)
        rows_product(int(smaller(rows - r, kTile)), weight + r * stride, stride, panel, size, width, out + r * kPanel);
}

// The same added to out [rows, stride_out], `width` floats a row.
void add_product(int64_t rows, const float* weight, int64_t stride, const float* panel, int64_t size, int width,
                 float* out, int64_t stride_out) {
    alignas(64) float sums[kTile * kPanel];
    for (int64_t r = 0; r < rows; r += kTile) {
        const int some = int(smaller(rows - r, kTile));
        rows_product(some, weight + r * stride, stride, panel, size, width, sums);
        for (int i = 0; i < some; ++i) {
            float* to = out + (r + i) * stride_out;
#pragma omp simd
            for (int l = 0; l < width; ++l) to[l] += sums[i * kPanel + l];
        }
    }
}

// Columns up to a whole vector, as to_lanes writes them.
BRFT_INLINE int64_t padded(int64_t columns) { return (columns + BRFT_LANES - 1) / BRFT_LANES * BRFT_LANES; }

// to [size, kPanel] = the rows' transpose times `factor`; lanes without a row are zero.
BRFT_INLINE void to_panel(const float* rows, int64_t stride, int64_t count, int64_t size, float factor, float* to) {
    to_lanes(rows, stride, count, size, to, kPanel, kPanel);
#pragma omp simd
    for (int64_t i = 0; i < size * kPanel; ++i) to[i] *= factor;
}

// to [ceil(size / kPanel), kPanel, kPanel] = the rows times `factor`, not transposed; nothing where there are none.
BRFT_INLINE void in_panels(const float* rows, int64_t stride, int64_t count, int64_t size, float factor, float* to) {
    for (int64_t l = 0; l < count; ++l)
        for (int64_t d = 0; d < size; d += kPanel) {
            const int64_t some = smaller(kPanel, size - d);
#pragma omp simd
            for (int64_t k = 0; k < some; ++k) to[(d + l) * kPanel + k] = rows[l * stride + d + k] * factor;
        }
}

// A panel of queries of one head.
struct Block {
    int64_t first, count, keys;  // queries first, ..., first + count - 1 see keys 0, ..., keys - 1 at most
    int width;                   // lanes that count

    Block(int64_t begin, int64_t length)
        : first(begin), count(smaller(kPanel, length - begin)), keys(begin + count), width(int(count)) {}
};

// scores [keys, kPanel] with those a query does not see at -inf.
BRFT_INLINE void masked_scores(const Block& block, const float* keys, int64_t stride, const float* queries,
                               int64_t size, float* scores) {
    product(block.keys, keys, stride, queries, size, block.width, scores);
    for (int64_t j = block.first; j < block.keys; ++j)
        for (int64_t l = 0; l < j - block.first; ++l) scores[j * kPanel + l] = -INFINITY;
}

// Calls each(G, lane) for vectors of the lanes that are computed where the first `width` of a panel count.
template <class Each>
BRFT_INLINE void by_vectors(int width, const Each& each) {
    const int lanes = computed_lanes(width);
    if (lanes < BRFT_LANES) return each(Group<kFew>(), 0);
    for (int lane = 0; lane < lanes; lane += BRFT_LANES) each(Group<BRFT_LANES>(), lane);
}

// exp(scores - largest) over scores [keys, a vector of each kPanel], and their sums.
template <class G>
BRFT_INLINE void exponentiate(int64_t keys, float* scores, float* largest, float* total) {
    auto most = G::load(scores), sum = typename G::Vector{};  // every query sees the first key
    for (int64_t j = 1; j < keys; ++j) {
        const auto s = G::load(scores + j * kPanel);
        most = s > most ? s : most;
    }
    G::store(largest, most);
    for (int64_t j = 0; j < keys; ++j) {
        float* row = scores + j * kPanel;
#pragma omp simd
        for (int l = 0; l < G::kLanes; ++l) row[l] = exp_fast(row[l] - largest[l]);
        sum += G::load(row);
    }
    G::store(total, sum);
}

// P = exp(weights - lse) over weights, and dS = P * (dP - mean) over grad_scores, of a vector of each kPanel.
template <class G>
BRFT_INLINE void softmax_backward(int64_t keys, float* weights, float* grad_scores, const float* lse,
                                  const float* mean) {
    for (int64_t j = 0; j < keys; ++j) {
        float *row = weights + j * kPanel, *grad = grad_scores + j * kPanel;
#pragma omp simd
        for (int l = 0; l < G::kLanes; ++l) {
            const float p = exp_fast(row[l] - lse[l]);
            row[l] = p;
            grad[l] = p * (grad[l] - mean[l]);
        }
    }
}

int64_t scratch_floats(const PackedAttention& a, int64_t longest) {
    const int64_t size = a.head_size, wide = panels_of(size) * kPanel;
    return size * padded(longest) + 2 * size * kPanel + 2 * kPanel * wide + 2 * longest * kPanel + 2 * longest * wide +
           size * kPanel;
}

void forward(const PackedAttention& a, const AttentionUnit& unit, float* out, float* lse, float* scratch) {
    const int64_t size = a.head_size, length = unit.length, group = a.heads / a.key_value_heads;
    const int64_t columns = padded(length);
    const float* keys = a.key + unit.begin * a.key_values() + unit.key_value_head * size;
    const float* values = a.value + unit.begin * a.key_values() + unit.key_value_head * size;
    float *values_t = scratch, *queries_t = values_t + size * columns, *out_t = queries_t + size * kPanel;
    float* scores = out_t + size * kPanel;
    to_lanes(values, a.key_values(), length, size, values_t, columns, columns);
    for (int64_t head = unit.key_value_head * group; head < (unit.key_value_head + 1) * group; ++head) {
        for (int64_t i = 0; i < length; i += kPanel) {
            const Block block(i, length);
            const int64_t first = (unit.begin + i) * a.queries() + head * size;
            to_panel(a.query + first, a.queries(), block.count, size, a.scaling, queries_t);
            masked_scores(block, keys, a.key_values(), queries_t, size, scores);
            alignas(64) float largest[kPanel], total[kPanel];
            by_vectors(block.width, [&](auto of, int lane) {
                exponentiate<decltype(of)>(block.keys, scores + lane, largest + lane, total + lane);
            });
            product(size, values_t, columns, scores, block.keys, block.width, out_t);
            for (int64_t l = 0; l < block.count; ++l)
                lse[(unit.begin + i + l) * a.heads + head] = largest[l] + logf(total[l]);
            by_vectors(block.width, [&](auto of, int lane) {
                const auto inverse = 1.0f / of.load(total + lane);
                for (int64_t d = 0; d < size; ++d)
                    of.store(out_t + d * kPanel + lane, of.load(out_t + d * kPanel + lane) * inverse);
            });
            from_panel(out_t, block.count, size, out + first, a.queries());
        }
    }
}

void backward(const PackedAttention& a, const AttentionUnit& unit, const AttentionGradients& g, float* scratch) {
    const int64_t size = a.head_size, length = unit.length, group = a.heads / a.key_value_heads;
    const int64_t columns = padded(length), wide = panels_of(size) * kPanel;
    const int64_t at = unit.begin * a.key_values() + unit.key_value_head * size;
    const float *keys = a.key + at, *values = a.value + at;
    float *keys_t = scratch, *queries_t = keys_t + size * columns, *grad_out_t = queries_t + size * kPanel;
    float *grad_query_t = grad_out_t + size * kPanel,
          *queries = grad_query_t + size * kPanel;  // [kPanel, wide], in panels
    float *grad_outs = queries + kPanel * wide, *weights = grad_outs + kPanel * wide,
          *grad_scores = weights + length * kPanel;
    float *grad_keys = grad_scores + length * kPanel, *grad_values = grad_keys + length * wide;
    to_lanes(keys, a.key_values(), length, size, keys_t, columns, columns);
    for (int64_t i = 0; i < length * wide; ++i) grad_keys[i] = grad_values[i] = 0.0f;
    for (int64_t head = unit.key_value_head * group; head < (unit.key_value_head + 1) * group; ++head) {
        for (int64_t i = 0; i < length; i += kPanel) {
            const Block block(i, length);
            const int64_t first = (unit.begin + i) * a.queries() + head * size;
            to_panel(a.query + first, a.queries(), block.count, size, a.scaling, queries_t);
            to_panel(g.grad_out + first, a.queries(), block.count, size, 1.0f, grad_out_t);
            alignas(64) float lse[kPanel] = {}, mean[kPanel] = {};
            for (int64_t l = 0; l < block.count; ++l) lse[l] = g.lse[(unit.begin + i + l) * a.heads + head];
            float* const out_t = grad_query_t;  // which is not there yet
            to_panel(g.out + first, a.queries(), block.count, size, 1.0f, out_t);
            for (int64_t d = 0; d < size; ++d) {
#pragma omp simd
                for (int l = 0; l < kPanel; ++l) mean[l] += out_t[d * kPanel + l] * grad_out_t[d * kPanel + l];
            }
            in_panels(a.query + first, a.queries(), block.count, size, a.scaling, queries);
            in_panels(g.grad_out + first, a.queries(), block.count, size, 1.0f, grad_outs);
            masked_scores(block, keys, a.key_values(), queries_t, size, weights);
            product(block.keys, values, a.key_values(), grad_out_t, size, block.width, grad_scores);
            by_vectors(block.width, [&](auto of, int lane) {
                softmax_backward<decltype(of)>(block.keys, weights + lane, grad_scores + lane, lse + lane, mean + lane);
            });
            product(size, keys_t, columns, grad_scores, block.keys, block.width, grad_query_t);
#pragma omp simd
            for (int64_t k = 0; k < size * kPanel; ++k) grad_query_t[k] *= a.scaling;
            from_panel(grad_query_t, block.count, size, g.query + first, a.queries());
            for (int64_t d = 0; d < size; d += kPanel) {
                const int width = int(smaller(size - d, kPanel));
                add_product(block.keys, weights, kPanel, grad_outs + d * kPanel, block.count, width, grad_values + d,
                            wide);
                add_product(block.keys, grad_scores, kPanel, queries + d * kPanel, block.count, width, grad_keys + d,
                            wide);
            }
        }
    }
    for (int64_t j = 0; j < length; ++j) {
        memcpy(g.key + at + j * a.key_values(), grad_keys + j * wide, sizeof(float) * size_t(size));
        memcpy(g.value + at + j * a.key_values(), grad_values + j * wide, sizeof(float) * size_t(size));
    }
}

}  // namespace BRFT_ISA

const AttentionKernels BRFT_PASTE(attention_kernels_, BRFT_ISA) = {
    BRFT_ISA::scratch_floats,
    BRFT_ISA::forward,
    BRFT_ISA::backward,
};

}  // namespace bandit_rft::cpu
