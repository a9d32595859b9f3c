// The last step of a reduction over rows on the GPU.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/launcher.h"

namespace genai_kernels {

// out [n], of type `dtype` = the sum of the rows of partial [blocks, n], float32 or float64, in their order.
cudaError_t launch_sum_blocks(bool in_double, const void* partial, int64_t blocks, int64_t n, Dtype dtype, void* out,
                              cudaStream_t stream);

}  // namespace genai_kernels
