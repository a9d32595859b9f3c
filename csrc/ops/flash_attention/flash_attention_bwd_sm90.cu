// Launcher of the backward kernels for Hopper.
#include "core/switch.h"
#include "cuda/launch.cuh"
#include "ops/flash_attention/flash_attention_bwd_sm90.cuh"
#include "ops/flash_attention/flash_attention_gpu.h"

namespace genai_kernels {
namespace {

using namespace sm90;

// The tensor maps of one kernel, whose tiles have these rows.
cudaError_t encode(BackwardArguments& to, const FlashAttentionParams& p, int queries, int keys, int dim) {
  to.p = p;
  cudaError_t error = encode_tensor_map(&to.q, boxed(p, p.q, true, p.head_dim), p.dtype, queries, dim);
  if (error == cudaSuccess)
    error = encode_tensor_map(&to.dout, boxed(p, p.dout, true, p.value_dim), p.dtype, queries, dim);
  if (error == cudaSuccess) error = encode_tensor_map(&to.k, boxed(p, p.k, false, p.head_dim), p.dtype, keys, dim);
  if (error == cudaSuccess) error = encode_tensor_map(&to.v, boxed(p, p.v, false, p.value_dim), p.dtype, keys, dim);
  return error;
}

template <class T, int kDim>
cudaError_t launch_shape(const FlashAttentionParams& p, cudaStream_t stream) {
  using Keys = KeyGradientShape<kDim>;
  using Queries = QueryGradientShape<kDim>;
  BackwardArguments arguments;
  cudaError_t error = encode(arguments, p, Keys::kBlockM, Keys::kBlockN, kDim);
  if (error == cudaSuccess)
    error = launch(flash_attention_dkv_sm90_kernel<T, kDim>, dim3(unsigned(key_tiles(p, Keys::kBlockN))), kThreads,
                   int(sizeof(KeyGradientStorage<kDim>)), stream, arguments);
  if (error == cudaSuccess) error = encode(arguments, p, Queries::kBlockM, Queries::kBlockN, kDim);
  if (error == cudaSuccess)
    error = launch(flash_attention_dq_sm90_kernel<T, kDim>, dim3(unsigned(row_tiles(p, Queries::kBlockM))), kThreads,
                   int(sizeof(QueryGradientStorage<kDim>)), stream, arguments);
  return error;
}

}  // namespace

bool flash_attention_bwd_sm90_serves(const FlashAttentionParams& p) {
  return (p.dtype == Dtype::bf16 || p.dtype == Dtype::f16) && widest_dim(p) <= 256 && !scores_are_modified(p) &&
         p.dropout_p == 0 && p.softmax_state && fits(p, p.q, true, p.head_dim) && fits(p, p.k, false, p.head_dim) &&
         fits(p, p.v, false, p.value_dim) && fits(p, p.dout, true, p.value_dim);
}

cudaError_t launch_flash_attention_bwd_sm90(const FlashAttentionParams& p, cudaStream_t stream) {
  const int64_t dim = widest_dim(p);
  const auto with_dim = [&](auto type) {
    using T = typename decltype(type)::type;
    return dim <= 64    ? launch_shape<T, 64>(p, stream)
           : dim <= 96  ? launch_shape<T, 96>(p, stream)
           : dim <= 128 ? launch_shape<T, 128>(p, stream)
           : dim <= 192 ? launch_shape<T, 192>(p, stream)
                        : launch_shape<T, 256>(p, stream);
  };
  return p.dtype == Dtype::bf16 ? with_dim(TypeTag<bf16>{}) : with_dim(TypeTag<fp16>{});
}

}  // namespace genai_kernels
