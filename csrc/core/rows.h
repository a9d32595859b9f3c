// A tensor seen as rows along its last dimension, whatever its strides: sizes and strides of the outer dimensions with
// neighbours merged where they are contiguous, so that a contiguous tensor has one.
#pragma once
#include <cstdint>

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
  int64_t offset(int64_t r) const {
    if (dims <= 1) return dims ? r * stride[0] : 0;
    int64_t at = 0;
    for (int d = dims - 1; d >= 0; --d) {
      at += r % size[d] * stride[d];
      r /= size[d];
    }
    return at;
  }
  template <class T>
  T* row(int64_t r) const {
    return static_cast<T*>(data) + offset(r);
  }
};

}  // namespace genai_kernels
