#include "ops/flash_attention/flash_attention_bwd_sm80.cuh"

namespace genai_kernels {

// Compiled beside this file, in flash_attention_bwd_sm80_fp16.cu: together they would take minutes in one compiler.
extern template cudaError_t sm80::launch_backward_of<fp16>(const FlashAttentionParams& p, cudaStream_t stream);

cudaError_t launch_flash_attention_bwd_sm80(const FlashAttentionParams& p, cudaStream_t stream) {
  return p.dtype == Dtype::bf16 ? sm80::launch_backward_of<bf16>(p, stream) : sm80::launch_backward_of<fp16>(p, stream);
}

}  // namespace genai_kernels
