// A weight or bias as the row kernels want it on the GPU.
#pragma once
#include <cstdint>

#include "core/launcher.h"
#include "core/rows.h"

namespace genai_kernels {

// Elements of a staged parameter of n elements: the kernels read 16 bytes at a time, up to 8 elements.
inline int64_t staged_length(int64_t n) { return (n + 7) / 8 * 8; }

// out [staged_length(n)], float32 = the n elements of a parameter, and zeros.
cudaError_t launch_stage_parameter(const Parameter& parameter, int64_t n, float* out, cudaStream_t stream);

}  // namespace genai_kernels
