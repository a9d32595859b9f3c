// Backward on Hopper is that of sm_80: it serves nothing here.
#include "ops/flash_attention/flash_attention_gpu.h"

namespace genai_kernels {

bool flash_attention_bwd_sm90_serves(const FlashAttentionParams&) { return false; }
cudaError_t launch_flash_attention_bwd_sm90(const FlashAttentionParams&, cudaStream_t) { return cudaErrorNotSupported; }

}  // namespace genai_kernels
