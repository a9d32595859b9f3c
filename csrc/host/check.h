// Checks of the host functions. A failed one throws an exception that reaches Python as ValueError, IndexError,
// TypeError or NotImplementedError with the text `genai_kernels.<op>: <argument>: expected <what>, got <value>`.
//
// Python's bindings turn std::invalid_argument into ValueError and std::out_of_range into IndexError by themselves. The
// other two have no counterpart in std: they arrive as a RuntimeError that names its kind in front of the text, and
// genai_kernels/registry.py turns it into the exception it names.
#pragma once
#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/dtype.h"
#include "host/tensor_ref.h"

namespace genai_kernels {

template <class... Parts>
std::string error_text(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "genai_kernels." << op << ": ";
  (text << ... << parts);
  return text.str();
}

#define GK_CHECK_VALUE(cond, op, ...) \
  if (!(cond)) [[unlikely]]           \
  throw std::invalid_argument(::genai_kernels::error_text(op, __VA_ARGS__))
#define GK_CHECK_INDEX(cond, op, ...) \
  if (!(cond)) [[unlikely]]           \
  throw std::out_of_range(::genai_kernels::error_text(op, __VA_ARGS__))
#define GK_CHECK_TYPE(cond, op, ...) \
  if (!(cond)) [[unlikely]]          \
  throw std::runtime_error("[TypeError] " + ::genai_kernels::error_text(op, __VA_ARGS__))
#define GK_CHECK_IMPLEMENTED(cond, op, ...) \
  if (!(cond)) [[unlikely]]                 \
  throw std::runtime_error("[NotImplementedError] " + ::genai_kernels::error_text(op, __VA_ARGS__))

// "[2, 3, 4]", for messages.
inline std::string shape_of(const TensorRef& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    default:
      return "another dtype";
  }
}

// The element type of a floating tensor, or a TypeError.
inline Dtype float_dtype(const char* op, const char* name, const TensorRef& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      GK_CHECK_TYPE(false, op, name, ": expected float32, bfloat16, float16 or float64, got ",
                    dtype_name(t.scalar_type()));
  }
  return Dtype::f32;
}

// The CUDA kernels compute in float32.
inline void check_gpu_dtype(const char* op, const char* name, Dtype dtype) {
  GK_CHECK_IMPLEMENTED(dtype != Dtype::f64, op, name,
                       ": float64: expected float32, bfloat16 or float16 on CUDA, got float64; "
                       "convert it, or move it to the CPU");
}

inline void check_same_dtype(const char* op, const char* name, const TensorRef& t, const char* like_name,
                             const TensorRef& like) {
  GK_CHECK_TYPE(t.scalar_type() == like.scalar_type(), op, name, ": expected the dtype of ", like_name, ", ",
                dtype_name(like.scalar_type()), ", got ", dtype_name(t.scalar_type()));
}

// An output that several indices share (an expanded tensor) cannot be written.
inline void check_writable(const char* op, const char* name, const TensorRef& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t i = 0; i < sizes.size(); ++i)
    GK_CHECK_VALUE(sizes[i] <= 1 || strides[i] != 0, op, name,
                   ": expected a tensor without internal overlap, got stride 0 in dimension ", i,
                   "; pass a copy (.clone())");
}

inline bool same_shape(const TensorRef& a, const TensorRef& b) {
  const auto p = a.sizes(), q = b.sizes();
  return std::equal(p.begin(), p.end(), q.begin(), q.end());
}
inline void check_same_shape(const char* op, const char* name, const TensorRef& t, const char* like_name,
                             const TensorRef& like) {
  GK_CHECK_VALUE(same_shape(t, like), op, name, ": expected the shape of ", like_name, ", ", shape_of(like), ", got ",
                 shape_of(t));
}

inline int64_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      return 1;
  }
}

// The bytes between the first and the last element of a tensor.
struct ByteRange {
  const char *begin, *end;
};
inline ByteRange byte_range(const TensorRef& t) {
  const char* data = t.data_as<char>();
  if (t.numel() == 0) return {data, data};
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return {data, data + (last + 1) * element_size(t.scalar_type())};
}

inline void check_no_overlap(const char* op, const char* name, const TensorRef& t, const char* input_name,
                             const TensorRef& input) {
  const ByteRange a = byte_range(t), b = byte_range(input);
  GK_CHECK_VALUE(a.begin >= b.end || b.begin >= a.end, op, name, ": expected memory that does not overlap ", input_name,
                 ", got an overlap");
}

// An output may be the input itself (same elements in the same places) where the kernel reads a row before it writes
// it; any other overlap would read what was just written.
inline void check_no_partial_overlap(const char* op, const char* name, const TensorRef& t, const char* input_name,
                                     const TensorRef& input) {
  const ByteRange a = byte_range(t), b = byte_range(input);
  if (a.begin >= b.end || b.begin >= a.end) return;
  bool same = a.begin == b.begin && same_shape(t, input);
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) <= 1 || t.stride(i) == input.stride(i);
  GK_CHECK_VALUE(same, op, name, ": expected memory that does not overlap ", input_name,
                 " (or is exactly it), got a partial overlap");
}

// An `out` argument for a result like x, which may be x itself.
inline void check_output(const char* op, const char* name, const TensorRef& out, const char* x_name,
                         const TensorRef& x) {
  check_same_dtype(op, name, out, x_name, x);
  check_same_shape(op, name, out, x_name, x);
  check_no_partial_overlap(op, name, out, x_name, x);
}

}  // namespace genai_kernels
