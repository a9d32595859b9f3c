// Host of flash_attention on CUDA: which kernels a call takes, and their launches.
#include <algorithm>

#include "core/philox.h"
#include "host/check.h"
#include "ops/flash_attention/gpu_call.h"

namespace genai_kernels {
namespace {

// Positions in a sequence, and their sums, are ints in the kernels.
constexpr int64_t kMostPositions = int64_t{1} << 29;
// K and V of the heads whose tiles run together: a third of the smallest L2 of the cards that train (A100: 40 MB).
constexpr int64_t kBytesTogether = 12 << 20;

}  // namespace

void prepare_for_gpu(const char* op, FlashAttentionParams& p) {
  GK_CHECK_VALUE(p.total_queries < kMostPositions, op, "q: expected fewer than 2^29 tokens on CUDA, got ",
                 p.total_queries);
  GK_CHECK_VALUE(p.total_keys < kMostPositions, op, "k: expected fewer than 2^29 tokens on CUDA, got ", p.total_keys);
  // a window wider than the sequences hides nothing; what is left fits an int
  const int64_t widest = p.total_queries + p.total_keys;
  if (p.left >= widest) p.left = -1;
  if (p.right >= widest) p.right = -1;
  p.dropout_threshold = dropout_threshold(p.dropout_p);
  p.dropout_factor = float(1 / (1 - p.dropout_p));
  const int64_t pairs = std::max<int64_t>(1, p.cu_q ? p.heads : p.batch * p.heads);
  const int64_t bytes = p.total_keys * (p.head_dim + p.value_dim) * (p.dtype == Dtype::f32 ? 4 : 2) / p.group;
  p.pairs_together = p.right >= 0 ? std::clamp<int64_t>(kBytesTogether / std::max<int64_t>(1, bytes), 1, pairs) : 1;
}

AttentionKernel flash_attention_gpu_kernel(const FlashAttentionParams& p, int capability, bool backward) {
  if constexpr (kHasCuda) {
    if (p.dtype == Dtype::f32 || std::max(p.head_dim, p.value_dim) > 256 || capability < 80)
      return AttentionKernel::simt;
    if (capability == 90 && (backward ? flash_attention_bwd_sm90_serves(p) : flash_attention_fwd_sm90_serves(p)))
      return AttentionKernel::sm90;
    return AttentionKernel::sm80;
  }
  return AttentionKernel::none;
}

void flash_attention_fwd_on_gpu(const char* op, const FlashAttentionParams& p, const TensorRef& like) {
  if (p.heads == 0 || p.total_queries == 0 || (!p.cu_q && p.batch == 0)) return;
  const AttentionKernel kernel = flash_attention_gpu_kernel(p, gpu_capability(like), false);
  run_on_gpu(op, like, [&](cudaStream_t stream) {
    if (kernel == AttentionKernel::sm90) return launch_flash_attention_fwd_sm90(p, stream);
    if (kernel == AttentionKernel::sm80) return launch_flash_attention_fwd_sm80(p, stream);
    return launch_flash_attention_fwd_simt(p, stream);
  });
}

void flash_attention_bwd_on_gpu(const char* op, const FlashAttentionParams& p, const TensorRef& like) {
  if (p.heads == 0 || (!p.cu_q && p.batch == 0)) return;
  const AttentionKernel kernel = flash_attention_gpu_kernel(p, gpu_capability(like), true);
  run_on_gpu(op, like, [&](cudaStream_t stream) {
    if (const cudaError_t error = launch_flash_attention_delta(p, stream); error != cudaError_t{}) return error;
    if (kernel == AttentionKernel::sm90) return launch_flash_attention_bwd_sm90(p, stream);
    if (kernel == AttentionKernel::sm80) return launch_flash_attention_bwd_sm80(p, stream);
    return launch_flash_attention_bwd_simt(p, stream);
  });
}

void flash_attention_dbias_on_gpu(const char* op, const FlashAttentionParams& p, const TensorRef& like) {
  if (p.heads == 0 || p.batch == 0 || p.total_queries == 0 || p.total_keys == 0) return;
  run_on_gpu(op, like, [&](cudaStream_t stream) { return launch_flash_attention_dbias(p, stream); });
}

}  // namespace genai_kernels
