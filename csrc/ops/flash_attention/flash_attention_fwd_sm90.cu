// Launcher of the forward kernels for Hopper.
#include "core/switch.h"
#include "cuda/launch.cuh"
#include "ops/flash_attention/flash_attention_fwd_sm90.cuh"
#include "ops/flash_attention/flash_attention_gpu.h"

namespace genai_kernels {
namespace {

using namespace sm90;

template <class T, int kDim, bool kExtras>
cudaError_t launch_shape(const FlashAttentionParams& p, cudaStream_t stream) {
  using Shape = ForwardShape<kDim, kExtras>;
  ForwardArguments arguments;
  arguments.p = p;
  cudaError_t error = encode_tensor_map(&arguments.q, boxed(p, p.q, true, p.head_dim), p.dtype, Shape::kBlockM, kDim);
  if (error == cudaSuccess)
    error = encode_tensor_map(&arguments.k, boxed(p, p.k, false, p.head_dim), p.dtype, Shape::kBlockN, kDim);
  if (error == cudaSuccess)
    error = encode_tensor_map(&arguments.v, boxed(p, p.v, false, p.value_dim), p.dtype, Shape::kBlockN, kDim);
  if (error != cudaSuccess) return error;
  const auto kernel = flash_attention_fwd_sm90_kernel<T, kDim, kExtras>;
  return launch(kernel, dim3(unsigned(row_tiles(p, Shape::kBlockM))), kThreads,
                int(sizeof(ForwardStorage<kDim, kExtras>)), stream, arguments);
}

}  // namespace

bool flash_attention_fwd_sm90_serves(const FlashAttentionParams& p) {
  return (p.dtype == Dtype::bf16 || p.dtype == Dtype::f16) && widest_dim(p) <= 256 && fits(p, p.q, true, p.head_dim) &&
         fits(p, p.k, false, p.head_dim) && fits(p, p.v, false, p.value_dim);
}

cudaError_t launch_flash_attention_fwd_sm90(const FlashAttentionParams& p, cudaStream_t stream) {
  const int64_t dim = widest_dim(p);
  const bool extras = scores_are_modified(p) || p.dropout_p > 0 || p.sink;
  cudaError_t error = cudaSuccess;
  const auto with_dim = [&](auto type, auto has_extras) {
    using T = typename decltype(type)::type;
    constexpr bool kExtras = decltype(has_extras)::value;
    error = dim <= 64    ? launch_shape<T, 64, kExtras>(p, stream)
            : dim <= 96  ? launch_shape<T, 96, kExtras>(p, stream)
            : dim <= 128 ? launch_shape<T, 128, kExtras>(p, stream)
            : dim <= 192 ? launch_shape<T, 192, kExtras>(p, stream)
                         : launch_shape<T, 256, kExtras>(p, stream);
  };
  switch_bool(extras, [&](auto has_extras) {
    if (p.dtype == Dtype::bf16)
      with_dim(TypeTag<bf16>{}, has_extras);
    else
      with_dim(TypeTag<fp16>{}, has_extras);
  });
  return error;
}

}  // namespace genai_kernels
