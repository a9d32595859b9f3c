// What the host of rms_norm hands to its kernels.
#pragma once
#include "core/dtype.h"
#include "core/rows.h"

namespace genai_kernels {

// Rows whose dw contributions are summed by one thread before the blocks are added in order. Fixed, so that the result
// does not depend on the thread count; 64 rows make the partial sums 1/64 of x.
inline constexpr int64_t kRmsNormRowsPerBlock = 64;

struct RmsNormParams {
  Dtype dtype;
  double eps;
  Rows x, y;           // forward
  Rows dy, dx;         // backward
  const void* weight;  // [length], contiguous, or null
  void* dw_partial;    // [blocks, length] in the compute type, or null
};

// Rows [begin, end); scratch for one row per thread where a row is strided.
void rms_norm_fwd_kernel(const RmsNormParams& p, int64_t begin, int64_t end, void* scratch);
// Blocks of kRmsNormRowsPerBlock rows [begin, end); scratch for three rows.
void rms_norm_bwd_kernel(const RmsNormParams& p, int64_t begin, int64_t end, void* scratch);

}  // namespace genai_kernels
