// A call of flash_attention on CUDA tensors, from checked parameters to launches.
#pragma once
#include "host/gpu.h"
#include "ops/flash_attention/flash_attention_gpu.h"

namespace genai_kernels {

// What only the CUDA kernels want to know. Nothing is read from device memory.
void prepare_for_gpu(const char* op, FlashAttentionParams& p);

void flash_attention_fwd_on_gpu(const char* op, const FlashAttentionParams& p, const TensorRef& like);
void flash_attention_bwd_on_gpu(const char* op, const FlashAttentionParams& p, const TensorRef& like);
void flash_attention_dbias_on_gpu(const char* op, const FlashAttentionParams& p, const TensorRef& like);

// Which kernels serve a call on a card of this capability (10 * major + minor).
enum class AttentionKernel { none, simt, sm80, sm90 };
inline constexpr const char* kAttentionKernelNames[] = {"none", "simt", "sm80", "sm90"};
AttentionKernel flash_attention_gpu_kernel(const FlashAttentionParams& p, int capability, bool backward);

}  // namespace genai_kernels
