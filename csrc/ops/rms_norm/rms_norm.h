// What the host of rms_norm hands to its kernels.
#pragma once
#include "core/dtype.h"
#include "core/row_blocks.h"
#include "core/rows.h"

namespace genai_kernels {

struct RmsNormParams {
  Dtype dtype;
  double eps;
  Parameter weight;
  Rows x, y;           // forward
  Rows dy, dx;         // backward
  double* dw_partial;  // [blocks, length], or null
};

// Rows [begin, end); scratch for two rows of the compute type.
void rms_norm_fwd_kernel(const RmsNormParams& p, int64_t begin, int64_t end, void* scratch);
// Blocks [begin, end); scratch for kRmsNormBackwardScratchRows rows of the compute type.
inline constexpr int kRmsNormBackwardScratchRows = 1 + 3 * kRowGroup;
void rms_norm_bwd_kernel(const RmsNormParams& p, const RowBlocks& blocks, int64_t begin, int64_t end, void* scratch);

}  // namespace genai_kernels
