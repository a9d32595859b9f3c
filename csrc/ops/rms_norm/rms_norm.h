// The kernels of rms_norm, by rows and, backward, by blocks of rows.
#pragma once
#include "core/launcher.h"
#include "core/norm_rows.h"

namespace genai_kernels {

void rms_norm_fwd_kernel(const NormParams& p, int64_t begin, int64_t end, void* scratch);
void rms_norm_bwd_kernel(const NormParams& p, const RowBlocks& blocks, int64_t begin, int64_t end, void* scratch);
cudaError_t launch_rms_norm_fwd(const NormParams& p, cudaStream_t stream);
cudaError_t launch_rms_norm_bwd(const NormParams& p, const RowBlocks& blocks, cudaStream_t stream);

}  // namespace genai_kernels
