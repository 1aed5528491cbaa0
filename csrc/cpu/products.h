// The three float32 products of a language-model head and its gradients, in the core's own tiles.
//
// A sum of k terms is added up in stretches of 384, one after the other: its bits depend on its terms alone, not on the
// rows beside it, the threads or the strides (but on the instruction set). The terms of a weight's gradient are the
// rows of a chunk. Packed are about 4 MiB at most, or 0.4 MiB a thread where that is more, in memory that the calling
// thread keeps: large pages of 2 MiB where the system has them.
#pragma once

#include "product_kernels.h"

namespace bandit_rft::cpu {

// Whether these are faster than a vendor's library here, as far as that was measured (products.cpp).
bool products_pay();

// out [m, n] (+)= a [m, k] . b [k, n] where a has few rows and b is large: logits, and the gradient of hidden states.
// a is packed once (or a stretch of k at a time), and every thread takes columns of b. A small b (a layer's weight) is
// multiplied as below, if a has rows enough for the threads.
void product_of_few_rows(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, bool accumulate,
                         int threads);

// out [m, n] (+)= a [m, k] . b [k, n] where a has many rows, and b is small: the gradient of a weight. Every thread
// takes rows of a, packs b (a stretch of k at a time, or some columns) for itself, and reads a where it is, if it lies
// well in the cache.
void product_of_many_rows(const Matrix& a, const Matrix& b, float* out, int64_t out_stride, bool accumulate,
                          int threads);

}  // namespace bandit_rft::cpu
