// The last step of a reduction over rows: partial sums to a tensor.
#pragma once
#include "cpu/sum_blocks.h"
#include "cuda/sum_blocks.h"
#include "host/check.h"
#include "host/gpu.h"
#include "host/parallel.h"

namespace genai_kernels {

// out [n], of type `dtype` = the sum of the rows of partial [blocks, n], float32 or float64, in their order.
inline void sum_blocks(Dtype dtype, const TensorRef& partial, const TensorRef& out) {
  const int64_t blocks = partial.size(0), n = partial.size(1);
  const bool in_double = partial.scalar_type() == ScalarType::Double;
  const void* data = partial.data();
  void* sums = out.data();
  if (on_gpu(out))
    return run_on_gpu("sum_blocks", out, [&](cudaStream_t stream) {
      return n ? launch_sum_blocks(in_double, data, blocks, n, dtype, sums, stream) : cudaError_t{};
    });
  parallel_for_elements(n, blocks, [&](int64_t begin, int64_t end) {
    sum_blocks_kernel(in_double, data, blocks, n, dtype, sums, begin, end);
  });
}

// out [n], of any floating dtype = the sum of the rows of partial [blocks, n], in their order.
inline void sum_blocks(const double* partial, int64_t blocks, const TensorRef& out) {
  const int64_t n = out.numel();
  const Dtype dtype = float_dtype("sum_blocks", "out", out);
  void* sums = out.data();
  parallel_for_elements(n, blocks, [&](int64_t begin, int64_t end) {
    sum_blocks_kernel(true, partial, blocks, n, dtype, sums, begin, end);
  });
}

}  // namespace genai_kernels
