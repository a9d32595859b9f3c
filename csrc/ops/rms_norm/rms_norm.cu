#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "ops/rms_norm/rms_norm.h"

namespace genai_kernels {

__global__ void rms_norm_fwd(NormParams p) {
  const int64_t row = blockIdx.x;
  const float* x = p.x.row<float>(row);
  float sum = 0;
  for (int64_t i = threadIdx.x; i < p.x.length; i += 32) sum += x[i * p.x.inner_stride] * x[i * p.x.inner_stride];
  for (int m = 16; m; m >>= 1) sum += __shfl_xor_sync(~0u, sum, m);
  const float r = rsqrtf(sum / float(p.x.length) + float(p.eps));
  for (int64_t i = threadIdx.x; i < p.x.length; i += 32) p.y.row<float>(row)[i] = x[i * p.x.inner_stride] * r * (p.weight.data ? static_cast<const float*>(p.weight.data)[i * p.weight.stride] : 1.f);
}

cudaError_t launch_rms_norm_fwd(const NormParams& p, cudaStream_t stream) {
  return launch(rms_norm_fwd, dim3(unsigned(p.x.count)), 32, 0, stream, p);
}

}  // namespace genai_kernels
