// For parameters of odd length, stride, alignment or type: rare, and few bytes beside the rows.
#include "cuda/stage_parameter.h"

#include "core/switch.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace genai_kernels {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void stage_parameter_kernel(Parameter parameter, int64_t n, int64_t padded, float* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= padded) return;
  if (i >= n) {
    out[i] = 0;
    return;
  }
  const T x = static_cast<const T*>(parameter.data)[i * parameter.stride];
  if constexpr (is_same<T, double>)
    out[i] = float(x);
  else
    out[i] = to_float(x);
}

}  // namespace

cudaError_t launch_stage_parameter(const Parameter& parameter, int64_t n, float* out, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const int64_t padded = staged_length(n);
  switch_dtype(parameter.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    error = launch(stage_parameter_kernel<T>, dim3(unsigned((padded + kThreads - 1) / kThreads)), kThreads, 0, stream,
                   parameter, n, padded, out);
  });
  return error;
}

}  // namespace genai_kernels
