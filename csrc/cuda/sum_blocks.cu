// One thread for each column: partial sums are few beside the rows they came from.
#include "cuda/sum_blocks.h"

#include <type_traits>

#include "core/switch.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace genai_kernels {
namespace {

constexpr int kThreads = 128;

template <class Partial, class Out>
__global__ void sum_blocks_kernel(const Partial* partial, int64_t blocks, int64_t n, Out* out) {
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= n) return;
  double sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += double(partial[b * n + column]);
  if constexpr (is_same<Out, double>)
    out[column] = sum;
  else
    out[column] = from_float<Out>(float(sum));
}

}  // namespace

cudaError_t launch_sum_blocks(bool in_double, const void* partial, int64_t blocks, int64_t n, Dtype dtype, void* out,
                              cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  switch_dtype(dtype, [&](auto tag) {
    using Out = typename decltype(tag)::type;
    switch_bool(in_double, [&](auto doubles) {
      using Partial = std::conditional_t<decltype(doubles)::value, double, float>;
      error = launch(sum_blocks_kernel<Partial, Out>, dim3(unsigned((n + kThreads - 1) / kThreads)), kThreads, 0,
                     stream, static_cast<const Partial*>(partial), blocks, n, static_cast<Out*>(out));
    });
  });
  return error;
}

}  // namespace genai_kernels
