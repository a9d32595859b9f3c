// What the host of merge_attention_states hands to its kernels. A row is one head of one token; rows are numbered
// [batch, tokens, heads], the order of o.
#pragma once
#include "core/dtype.h"
#include "core/launcher.h"
#include "core/rows.h"

namespace genai_kernels {

// [batch, heads, tokens] in the compute type, any strides, in elements.
struct PerRow {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
};

struct MergeAttentionStatesParams {
  Dtype dtype;  // of o
  int64_t tokens, heads;
  Rows o_a, o_b, o;
  PerRow lse_a, lse_b, lse;
  // backward only; lse_a, lse_b, o_a and o_b as above
  Rows d_o, d_o_a, d_o_b;
  PerRow dlse, dlse_a, dlse_b;  // dlse.data null: no gradient arrives at lse
};

// Rows [begin, end). `scratch` holds two rows forward and five backward where a row is strided.
void merge_attention_states_fwd_kernel(const MergeAttentionStatesParams& p, int64_t begin, int64_t end, void* scratch);
void merge_attention_states_bwd_kernel(const MergeAttentionStatesParams& p, int64_t begin, int64_t end, void* scratch);
cudaError_t launch_merge_attention_states_fwd(const MergeAttentionStatesParams& p, cudaStream_t stream);
cudaError_t launch_merge_attention_states_bwd(const MergeAttentionStatesParams& p, cudaStream_t stream);

}  // namespace genai_kernels
