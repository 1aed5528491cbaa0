// The products of a decoding step, on panels of sequences or on a few of them each for itself. Included by
// decoder_kernels.cpp, compiled once for each instruction set.
#pragma once

#include "decoder_kernels.h"
#include "panel_product.h"

namespace bandit_rft::cpu {
namespace BRFT_ISA {

// Calls each(lane) for the first `lanes` of a panel, kFew at a time: so many that they are vectors without a rest.
template <class Each>
BRFT_INLINE void every_lane(int lanes, const Each& each) {
    if (lanes == 1) return each(0);
    for (int first = 0; first < lanes; first += kFew) {
#pragma omp simd
        for (int l = first; l < first + kFew; ++l) each(l);
    }
}

BRFT_INLINE int members_of(int64_t panel, int64_t batch) {
    const int64_t left = batch - panel * kPanel;
    return int(left < kPanel ? left : kPanel);
}

// Calls take(r, rows) for tiles of so many of the rows [begin, end).
template <class Take>
BRFT_INLINE void by_tiles(int64_t begin, int64_t end, int tile, const Take& take) {
    for (int64_t r = begin; r < end; r += tile) take(r, int(end - r < tile ? end - r : tile));
}

// Products of a few vectors, each for itself: vector v begins at v * stride.
void single_product(const float* weight, const float* bias, int64_t size, int64_t begin, int64_t end, Panels in,
                    int64_t batch, Panels out, float*) {
    alignas(64) float sums[kFewVectors][kRowsOfFew];
    by_tiles(begin, end, kRowsOfFew, [&](int64_t r, int rows) {
        few_product(rows, weight + r * size, size, in.data, in.stride, size, batch, sums);
        for (int64_t v = 0; v < batch; ++v) {
            float* to = out.data + v * out.stride + r;
            for (int i = 0; i < rows; ++i) to[i] = bias ? sums[v][i] + bias[r + i] : sums[v][i];
        }
    });
}

void single_gated_product(const float* gate, const float* up, int64_t size, int64_t begin, int64_t end, Panels in,
                          int64_t batch, Panels out, float*) {
    alignas(64) float gates[kFewVectors][kRowsOfFew], ups[kFewVectors][kRowsOfFew];
    by_tiles(begin, end, kRowsOfFew, [&](int64_t r, int rows) {
        few_product(rows, gate + r * size, size, in.data, in.stride, size, batch, gates);
        few_product(rows, up + r * size, size, in.data, in.stride, size, batch, ups);
        for (int64_t v = 0; v < batch; ++v) {
            float* to = out.data + v * out.stride + r;
#pragma omp simd
            for (int i = 0; i < rows; ++i) to[i] = gates[v][i] * sigmoid(gates[v][i]) * ups[v][i];
        }
    });
}

// Calls multiply(in, out) with the vectors of one panel each for itself: out of it [vectors, size], into it [vectors,
// rows], in `room` for both. The other lanes that are computed are 0.
template <class Multiply>
BRFT_INLINE void singly(const float* panel, int64_t size, int64_t vectors, float* to, int64_t rows, float* room,
                        const Multiply& multiply) {
    const Panels in{room, size}, out{room + vectors * size, rows};
    for (int64_t k = 0; k < size; ++k)
        for (int64_t v = 0; v < vectors; ++v) in.data[v * size + k] = panel[k * kPanel + v];
    multiply(in, out);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t v = 0; v < kFew; ++v) to[r * kPanel + v] = v < vectors ? out.data[v * rows + r] : 0.0f;
}

void product(const float* weight, const float* bias, int64_t size, int64_t begin, int64_t end, Panels in, int64_t batch,
             Panels out, float* scratch) {
    if (batch <= kFewVectors)
        return singly(in.data, size, batch, out.data + begin * kPanel, end - begin, scratch, [&](Panels x, Panels y) {
            single_product(weight + begin * size, bias ? bias + begin : nullptr, size, 0, end - begin, x, batch, y,
                           nullptr);
        });
    by_tiles(begin, end, kTile, [&](int64_t r, int rows) {
        for (int64_t p = 0; p * kPanel < batch; ++p) {
            const int members = members_of(p, batch), lanes = computed_lanes(members);
            float* to = out.data + p * out.stride + r * kPanel;
            rows_product(rows, weight + r * size, size, in.data + p * in.stride, size, members, to);
            if (bias)
                for (int i = 0; i < rows; ++i) every_lane(lanes, [&](int l) { to[i * kPanel + l] += bias[r + i]; });
        }
    });
}

void gated_product(const float* gate, const float* up, int64_t size, int64_t begin, int64_t end, Panels in,
                   int64_t batch, Panels out, float* scratch) {
    if (batch <= kFewVectors)
        return singly(in.data, size, batch, out.data + begin * kPanel, end - begin, scratch, [&](Panels x, Panels y) {
            single_gated_product(gate + begin * size, up + begin * size, size, 0, end - begin, x, batch, y, nullptr);
        });
    alignas(64) float gates[kTile * kPanel], ups[kTile * kPanel];
    by_tiles(begin, end, kTile, [&](int64_t r, int rows) {
        for (int64_t p = 0; p * kPanel < batch; ++p) {
            const int members = members_of(p, batch), lanes = computed_lanes(members);
            const float* x = in.data + p * in.stride;
            float* to = out.data + p * out.stride + r * kPanel;
            rows_product(rows, gate + r * size, size, x, size, members, gates);
            rows_product(rows, up + r * size, size, x, size, members, ups);
            for (int i = 0; i < rows * kPanel; i += kPanel)
                for (int first = i; first < i + lanes; first += kFew) {
#pragma omp simd
                    for (int l = first; l < first + kFew; ++l) {
                        const float g = gates[l];
                        to[l] = g * sigmoid(g) * ups[l];
                    }
                }
        }
    });
}

}  // namespace BRFT_ISA
}  // namespace bandit_rft::cpu
