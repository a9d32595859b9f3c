// Residual addition and RMS norm on the GPU; the text is in cuda/norm_rows.cuh and cuda/norm_rows_bwd.cuh.
#include "ops/fused_add_rms_norm/fused_add_rms_norm.h"

#include "cuda/norm_rows_bwd.cuh"

namespace genai_kernels {
namespace {

template <class T, int kVectors, bool kHeld>
__global__ void __launch_bounds__(kNormThreads<T, true, kVectors, kHeld>)
    fused_add_rms_norm_fwd_kernel(const __grid_constant__ NormParams p, const __grid_constant__ RowLaunch rows) {
  normalise_rows<T, false, true, kVectors, kHeld>(p, rows);
}

template <class T, int kVectors, bool kHeld>
__global__ void __launch_bounds__(kNormThreads<T, false, kVectors, kHeld>)
    fused_add_rms_norm_bwd_kernel(const __grid_constant__ NormParams p, const __grid_constant__ RowBlocks blocks,
                                  const __grid_constant__ RowLaunch rows) {
  normalise_rows_backward<T, false, kVectors, kHeld>(p, blocks, rows);
}

}  // namespace

cudaError_t launch_fused_add_rms_norm_fwd(const NormParams& p, cudaStream_t stream) {
  return launch_norm_forward(p, stream, [](auto type, auto vectors, auto held) {
    return &fused_add_rms_norm_fwd_kernel<typename decltype(type)::type, decltype(vectors)::value,
                                          decltype(held)::value>;
  });
}

cudaError_t launch_fused_add_rms_norm_bwd(const NormParams& p, const RowBlocks& blocks, cudaStream_t stream) {
  return launch_norm_backward(p, blocks, stream, [](auto type, auto vectors, auto held) {
    return &fused_add_rms_norm_bwd_kernel<typename decltype(type)::type, decltype(vectors)::value,
                                          decltype(held)::value>;
  });
}

}  // namespace genai_kernels
