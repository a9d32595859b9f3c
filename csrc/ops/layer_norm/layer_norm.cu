// Layer norm, with or without a residual addition, on the GPU; the text is in cuda/norm_rows.cuh and
// cuda/norm_rows_bwd.cuh.
#include "ops/layer_norm/layer_norm.h"

#include "cuda/norm_rows_bwd.cuh"

namespace genai_kernels {
namespace {

template <class T, bool kResidual, int kVectors, bool kHeld>
__global__ void __launch_bounds__(kNormThreads<T, kResidual, kVectors, kHeld>)
    layer_norm_fwd_kernel(const __grid_constant__ NormParams p, const __grid_constant__ RowLaunch rows) {
  normalise_rows<T, true, kResidual, kVectors, kHeld>(p, rows);
}

template <class T, int kVectors, bool kHeld>
__global__ void __launch_bounds__(kNormThreads<T, false, kVectors, kHeld>)
    layer_norm_bwd_kernel(const __grid_constant__ NormParams p, const __grid_constant__ RowBlocks blocks,
                          const __grid_constant__ RowLaunch rows) {
  normalise_rows_backward<T, true, kVectors, kHeld>(p, blocks, rows);
}

}  // namespace

cudaError_t launch_layer_norm_fwd(const NormParams& p, cudaStream_t stream) {
  const auto run = [&](auto residual) {
    return launch_norm_forward(p, stream, [](auto type, auto vectors, auto held) {
      return &layer_norm_fwd_kernel<typename decltype(type)::type, decltype(residual)::value, decltype(vectors)::value,
                                    decltype(held)::value>;
    });
  };
  return p.residual.data ? run(BoolTag<true>{}) : run(BoolTag<false>{});
}

cudaError_t launch_layer_norm_bwd(const NormParams& p, const RowBlocks& blocks, cudaStream_t stream) {
  return launch_norm_backward(p, blocks, stream, [](auto type, auto vectors, auto held) {
    return &layer_norm_bwd_kernel<typename decltype(type)::type, decltype(vectors)::value, decltype(held)::value>;
  });
}

}  // namespace genai_kernels
