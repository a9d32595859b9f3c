// Calls on tensors of a GPU: which they are, and a launcher run on torch's current stream of their device. Without CUDA
// in the build there are none. tests/cuda_simulator/host/gpu.h takes every call for one.
#pragma once
#include <cstdint>
#include <string>
#include <utility>

#include "core/launcher.h"
#include "host/check.h"

#ifdef GENAI_KERNELS_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

// Lives in libtorch_cuda.so: bound in a torch with CUDA, null elsewhere, where no tensor leads here. torch's own header
// shows it to builds against a torch with CUDA only.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace genai_kernels {

#ifdef GENAI_KERNELS_CUDA
inline constexpr bool kHasCuda = true;
inline bool on_gpu(const TensorRef& t) { return t.device().type() == torch::headeronly::DeviceType::CUDA; }

// launch(stream) with the device of `like` made current; it returns a cudaError_t.
template <class Launch>
void run_on_gpu(const char* op, const TensorRef& like, const Launch& launch) {
  const auto device = like.device().index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream || aoti_torch_get_current_cuda_stream(device, &stream) != 0)
    throw std::runtime_error(error_text(op, "device: expected a torch with CUDA, got one without its current stream"));
  const cudaError_t error = launch(static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess)
    throw std::runtime_error(error_text(op, "CUDA: ", cudaGetErrorString(error), " when its kernel was launched"));
}

// 10 * major + minor of the device's compute capability.
inline int gpu_capability(const TensorRef& like) {
  int major = 0, minor = 0;
  const int device = like.device().index();
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}
#else
inline constexpr bool kHasCuda = false;
constexpr bool on_gpu(const TensorRef&) { return false; }
template <class Launch>
void run_on_gpu(const char*, const TensorRef&, const Launch&) {}
inline int gpu_capability(const TensorRef&) { return 0; }
#endif

}  // namespace genai_kernels
