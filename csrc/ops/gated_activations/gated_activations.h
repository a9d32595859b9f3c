// What the host of silu_and_mul, gelu_and_mul and gelu_tanh_and_mul hands to their kernels.
#pragma once
#include "core/dtype.h"
#include "core/gate.h"
#include "core/launcher.h"
#include "core/rows.h"

namespace genai_kernels {

struct GatedActivationParams {
  Dtype dtype;
  Gate gate;
  Rows x, y;    // rows of 2n and n
  Rows dy, dx;  // backward: rows of n and 2n
};

// Rows [begin, end); scratch for three rows of x where a row is strided.
void gated_activation_fwd_kernel(const GatedActivationParams& p, int64_t begin, int64_t end, void* scratch);
void gated_activation_bwd_kernel(const GatedActivationParams& p, int64_t begin, int64_t end, void* scratch);
cudaError_t launch_gated_activation_fwd(const GatedActivationParams& p, cudaStream_t stream);
cudaError_t launch_gated_activation_bwd(const GatedActivationParams& p, cudaStream_t stream);

}  // namespace genai_kernels
