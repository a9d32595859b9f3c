// How a launcher starts its kernel. tests/cuda_simulator/cuda/launch.cuh runs it on the host instead.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

namespace genai_kernels {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {  // more than every kernel may use without asking
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, most, shared_bytes); error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace genai_kernels
