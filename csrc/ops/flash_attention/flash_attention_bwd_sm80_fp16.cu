#include "ops/flash_attention/flash_attention_bwd_sm80.cuh"

namespace genai_kernels {

template cudaError_t sm80::launch_backward_of<fp16>(const FlashAttentionParams& p, cudaStream_t stream);

}  // namespace genai_kernels
