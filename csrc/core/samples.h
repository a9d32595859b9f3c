// A tensor [batch, ...] as dense samples at any distance from each other.
#pragma once
#include <cstdint>

namespace genai_kernels {

struct Samples {
  void* data = nullptr;  // null: absent
  int64_t stride = 0;    // in elements
  template <class T>
  T* sample(int64_t n) const {
    return static_cast<T*>(data) + n * stride;
  }
  explicit operator bool() const { return data; }
};

// A unit of work: so many elements of one sample. Sums over a sample are split here, by nothing else, and the parts added
// in order.
inline constexpr int64_t kSamplePiece = 4096;

struct SamplePieces {
  int64_t elements;  // of a sample
  int64_t per_sample() const { return (elements + kSamplePiece - 1) / kSamplePiece; }
  int64_t sample(int64_t item) const { return item / per_sample(); }
  int64_t begin(int64_t item) const { return item % per_sample() * kSamplePiece; }
  int64_t end(int64_t item) const {
    const int64_t at = begin(item) + kSamplePiece;
    return at < elements ? at : elements;
  }
  int64_t largest() const { return elements < kSamplePiece ? elements : kSamplePiece; }
};

}  // namespace genai_kernels
