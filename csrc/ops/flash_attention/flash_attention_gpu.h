// The CUDA kernels of flash_attention, and which of them serves a call.
//
//   simt  one warp for a row or a key, float32 arithmetic: float32, and head dims beyond 256
//   sm80  mma.sync on 16-bit elements: every card since Ampere
//   sm90  wgmma and TMA: Hopper, where flash_attention_sm90_serves
//
// Every launcher does all of forward or backward that belongs to its kernels: it writes every element of out (dq, dk,
// dv), of lse and softmax_state where they are given, rows that no sequence owns included. Backward finds p.delta
// computed (launch_flash_attention_delta). p.dbias is computed apart.
#pragma once
#include "core/launcher.h"
#include "ops/flash_attention/flash_attention.h"

namespace genai_kernels {

cudaError_t launch_flash_attention_fwd_simt(const FlashAttentionParams& p, cudaStream_t stream);
cudaError_t launch_flash_attention_fwd_sm80(const FlashAttentionParams& p, cudaStream_t stream);
cudaError_t launch_flash_attention_fwd_sm90(const FlashAttentionParams& p, cudaStream_t stream);

// p.delta for every row, and p.dsink [batch, heads] where it is given. The first step of every backward.
cudaError_t launch_flash_attention_delta(const FlashAttentionParams& p, cudaStream_t stream);
cudaError_t launch_flash_attention_bwd_simt(const FlashAttentionParams& p, cudaStream_t stream);
cudaError_t launch_flash_attention_bwd_sm80(const FlashAttentionParams& p, cudaStream_t stream);
cudaError_t launch_flash_attention_bwd_sm90(const FlashAttentionParams& p, cudaStream_t stream);
// p.dbias, which holds zeros before.
cudaError_t launch_flash_attention_dbias(const FlashAttentionParams& p, cudaStream_t stream);

// True if the Hopper kernels serve a call (dtype, dims, strides, features); asked on a card of capability 9.0 only.
bool flash_attention_fwd_sm90_serves(const FlashAttentionParams& p);
bool flash_attention_bwd_sm90_serves(const FlashAttentionParams& p);

}  // namespace genai_kernels
