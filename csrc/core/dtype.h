// Element types as the kernels store them. Arithmetic happens in float (or double), never in the 16-bit types.
#pragma once
#include <cstdint>

namespace genai_kernels {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

enum class Dtype : int32_t { f32, f64, bf16, f16 };

// What a kernel computes in for each stored type.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

inline int64_t compute_bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

}  // namespace genai_kernels
