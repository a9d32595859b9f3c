// A tensor seen as rows along its last dimension, whatever its strides: sizes and strides of the outer dimensions with
// neighbours merged where they are contiguous, so that a contiguous tensor has one.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/host_device.h"

namespace genai_kernels {

struct Rows {
  static constexpr int kMaxDims = 8;

  void* data = nullptr;
  int64_t count = 1;         // rows
  int64_t length = 1;        // elements in a row
  int64_t inner_stride = 1;  // between the elements of a row
  int dims = 0;
  int64_t size[kMaxDims], stride[kMaxDims];  // outermost first

  // Where row r begins, in elements from data.
  GK_HOST_DEVICE int64_t offset(int64_t r) const {
    if (dims <= 1) return dims ? r * stride[0] : 0;
    int64_t at = 0;
    for (int d = dims - 1; d >= 0; --d) {
      at += r % size[d] * stride[d];
      r /= size[d];
    }
    return at;
  }
  // Appends a dimension of the outer ones, merged with the one before where they are contiguous; false: no place left.
  bool append(int64_t length_of_dim, int64_t stride_of_dim) {
    count *= length_of_dim;
    if (length_of_dim == 1) return true;
    if (dims && stride[dims - 1] == stride_of_dim * length_of_dim) {
      size[dims - 1] *= length_of_dim;
      stride[dims - 1] = stride_of_dim;
      return true;
    }
    if (dims == kMaxDims) return false;
    size[dims] = length_of_dim;
    stride[dims++] = stride_of_dim;
    return true;
  }
  template <class T>
  GK_HOST_DEVICE T* row(int64_t r) const {
    return static_cast<T*>(data) + offset(r);
  }
};

// A parameter of one row's length (weight, bias), in a dtype of its own, or absent.
struct Parameter {
  const void* data = nullptr;
  int64_t stride = 1;
  Dtype dtype = Dtype::f32;
};

}  // namespace genai_kernels
