// What the hosts of rms_norm, fused_add_rms_norm and layer_norm hand to their kernels (cpu/norm_rows.h).
#pragma once
#include "core/dtype.h"
#include "core/row_blocks.h"
#include "core/rows.h"

namespace genai_kernels {

struct NormParams {
  Dtype dtype;
  double eps;
  Parameter weight, bias;
  Rows x, y;           // forward; in backward, x is what was normalised
  Rows residual, sum;  // or null: x + residual is normalised, and written to sum
  Rows dy, dx, dsum;   // backward; dsum, the gradient of sum, or null
  void* dw_partial;    // [blocks, length], or null: double; on the GPU float where x has 16 bits
  void* db_partial;
};

// Rows of scratch, of the compute type: the parameters, the sum, and x, residual and y where they are strided.
inline constexpr int kNormForwardScratchRows = 6;
// The parameters, and dy, x, dx and dsum of each row of a group where they are strided.
inline constexpr int kNormBackwardScratchRows = 1 + 4 * kRowGroup;

}  // namespace genai_kernels
