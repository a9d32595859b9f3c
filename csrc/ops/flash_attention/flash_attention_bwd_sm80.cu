#include "ops/flash_attention/flash_attention_bwd_sm80.cuh"

namespace genai_kernels {

cudaError_t launch_flash_attention_bwd_sm80(const FlashAttentionParams& p, cudaStream_t stream) {
  return p.dtype == Dtype::bf16 ? sm80::launch_backward_of<bf16>(p, stream) : sm80::launch_backward_of<fp16>(p, stream);
}

}  // namespace genai_kernels
