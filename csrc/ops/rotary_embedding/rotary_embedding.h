// What the host of rotary_embedding hands to its kernel.
#pragma once
#include "core/dtype.h"
#include "core/launcher.h"
#include "core/rows.h"

namespace genai_kernels {

struct RotaryParams {
  Dtype dtype, table_dtype;   // of x and y; of cos and sin
  bool interleaved, inverse;  // inverse: by the negative angle, which is the backward pass
  int64_t heads, head_dim, rotary_dim;
  Rows x, y;  // one row per token: its heads; inner_stride is that of head_dim
  int64_t x_head_stride, y_head_stride;
  Rows cos, sin;        // one row per token, or per position where there are positions
  Rows positions;       // one int per token
  bool long_positions;  // int64, otherwise int32
};

// Tokens [begin, end); scratch for 2 rotary_dim + head_dim elements of the compute type.
void rotary_fwd_kernel(const RotaryParams& p, int64_t begin, int64_t end, void* scratch);
cudaError_t launch_rotary_fwd(const RotaryParams& p, cudaStream_t stream);

}  // namespace genai_kernels
