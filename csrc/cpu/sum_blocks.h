// Adds partial sums in index order: how every reduction over rows ends, so that its bits depend on no thread count.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace genai_kernels {

// out[j] = partial[0][j] + partial[1][j] + ... for j in [begin, end), added in double. partial [blocks, n] is f64 if
// `in_double`, otherwise f32; out [n] has the type `dtype`.
void sum_blocks_kernel(bool in_double, const void* partial, int64_t blocks, int64_t n, Dtype dtype, void* out,
                       int64_t begin, int64_t end);

}  // namespace genai_kernels
