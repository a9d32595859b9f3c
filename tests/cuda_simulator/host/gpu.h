// csrc/host/gpu.h in the simulator: every call is one for the GPU, whose memory is the host's.
#pragma once
#include <cstdlib>

#include "core/launcher.h"
#include "host/check.h"

namespace genai_kernels {

inline constexpr bool kHasCuda = true;
constexpr bool on_gpu(const TensorRef&) { return true; }
template <class Launch>
void run_on_gpu(const char* op, const TensorRef&, const Launch& launch) {
  if (const cudaError_t error = launch(cudaStream_t{}); error != cudaSuccess)
    throw std::runtime_error(error_text(op, "CUDA: ", cudaGetErrorString(error), " when its kernel was launched"));
}
// Which card is played: CUDA_SIMULATOR_CAPABILITY, 80 where it is not set.
inline int gpu_capability(const TensorRef&) {
  const char* given = std::getenv("CUDA_SIMULATOR_CAPABILITY");
  return given ? std::atoi(given) : 80;
}

}  // namespace genai_kernels
