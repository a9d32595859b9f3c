// Adds partial sums in index order: how every reduction over rows ends, so that its bits depend on no thread count.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace genai_kernels {

// out[j] = partial[0][j] + partial[1][j] + ... for j in [begin, end), partial [blocks, n] in the compute type of `dtype`
// (double for f64, otherwise float), out [n] in `dtype`.
void sum_blocks_kernel(Dtype dtype, const void* partial, int64_t blocks, int64_t n, void* out, int64_t begin,
                       int64_t end);

}  // namespace genai_kernels
