// New tensors. Straight to the C shim: torch::stable::empty_like goes through a dispatcher look-up by name, which costs
// more than the rest of a small call.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "host/check.h"

namespace genai_kernels {

// Uninitialised, on the device of `like`.
inline Tensor new_strided(const TensorRef& like, const int64_t* sizes, const int64_t* strides, int64_t dim,
                          torch::headeronly::ScalarType dtype) {
  const auto device = like.device();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      int32_t(device.type()), int32_t(device.index()), &handle));
  return Tensor(handle);
}

// The same, contiguous.
inline Tensor new_empty(const TensorRef& like, const int64_t* sizes, int64_t dim, torch::headeronly::ScalarType dtype) {
  int64_t strides[16];
  GK_CHECK_VALUE(dim <= 16, "new_empty", "shape: expected at most 16 dimensions, got ", dim);
  int64_t step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = step;
    step *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return new_strided(like, sizes, strides, dim, dtype);
}
inline Tensor new_empty(const TensorRef& like, std::initializer_list<int64_t> sizes,
                        torch::headeronly::ScalarType dtype) {
  return new_empty(like, sizes.begin(), int64_t(sizes.size()), dtype);
}

// Contiguous, with the shape and dtype of `like`.
inline Tensor new_like(const TensorRef& like) {
  return new_empty(like, like.sizes().data(), like.dim(), like.scalar_type());
}

}  // namespace genai_kernels
