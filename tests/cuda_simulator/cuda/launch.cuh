// csrc/cuda/launch.cuh on the host.
#pragma once
#include "cuda_runtime.h"
#include "simulator.h"

namespace genai_kernels {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t,
                   const Arguments&... arguments) {
  simulator::launch(grid, threads, shared_bytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}

}  // namespace genai_kernels
