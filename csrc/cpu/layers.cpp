#include "layers.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace bandit_rft::cpu {
namespace {

constexpr int64_t kNumbers = 8192;  // of a block of rows, which one thread takes: they stay in its first cache
constexpr int64_t kRowsASum = 64;   // at least, whose shares of a weight's gradient are added up before they are kept
constexpr int64_t kNumbersPerLogit = 8;  // that are added and multiplied in the time of a logit (see `parallel`)
constexpr int64_t kSigmoidsPerLogit = 2;

int64_t rows_a_block(int64_t size) { return std::max<int64_t>(1, kNumbers / std::max<int64_t>(1, size)); }

}  // namespace

void norm_forward(const Norm& n, float* out, int threads) {
    parallel(n.rows, rows_a_block(n.size), n.rows * n.size / kNumbersPerLogit, threads,
             [&](int64_t begin, int64_t end) { kernels().layer->norm_forward(n, begin, end, out); });
}

void norm_backward(const Norm& n, const float* dy, const float* add, float* dx, float* dweight, int threads) {
    const LayerKernels& k = *kernels().layer;
    const int64_t rows = std::max(kRowsASum, rows_a_block(n.size)), blocks = (n.rows + rows - 1) / rows;
    std::vector<float> sums(static_cast<size_t>(dweight ? blocks * n.size : 0));  // a block's own, whoever computes it
    parallel(blocks, 1, 3 * n.rows * n.size / kNumbersPerLogit, threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
            k.norm_backward(n, b * rows, std::min(n.rows, (b + 1) * rows), dy, add, dx,
                            dweight ? sums.data() + b * n.size : nullptr);
    });
    if (!dweight) return;
    std::fill(dweight, dweight + n.size, 0.0f);
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t i = 0; i < n.size; ++i) dweight[i] += sums[size_t(b * n.size + i)];
}

void gated_silu_forward(const float* gate, const float* up, int64_t count, float* out, int threads) {
    parallel(count, kNumbers, count / kSigmoidsPerLogit, threads, [&](int64_t begin, int64_t end) {
        kernels().layer->silu_forward(gate + begin, up + begin, end - begin, out + begin);
    });
}

void gated_silu_backward(const float* gate, const float* up, const float* dy, int64_t count, float* dgate, float* dup,
                         float* out, int threads) {
    parallel(count, kNumbers, 2 * count / kSigmoidsPerLogit, threads, [&](int64_t begin, int64_t end) {
        kernels().layer->silu_backward(gate + begin, up + begin, dy + begin, end - begin, dgate + begin, dup + begin,
                                       out + begin);
    });
}

}  // namespace bandit_rft::cpu
