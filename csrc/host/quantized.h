// The tensors of a genai_kernels.QuantizedWeight as a matrix for MatmulOperand::quantized, checked.
#pragma once
#include <bit>
#include <optional>

#include "cpu/matmul.h"
#include "host/check.h"

namespace genai_kernels {

// The kind is in the tensors: int8 data is int8, uint8 data with a zero is int4, without one nf4. `group_size` 0: a row.
inline QuantizedMatrix quantized_matrix(const char* op, const TensorRef& data, const TensorRef& scale,
                                        const OptionalTensor& zero, const OptionalTensor& code_scale, int64_t columns,
                                        int64_t group_size) {
  const bool wide = data.scalar_type() == ScalarType::Char;
  GK_CHECK_TYPE(wide || data.scalar_type() == ScalarType::Byte, op, "weight.data: expected int8 or uint8, got ",
                dtype_name(data.scalar_type()));
  QuantizedMatrix m{};
  m.kind = wide ? QuantizedKind::int8 : zero ? QuantizedKind::int4 : QuantizedKind::nf4;
  m.row_bytes = wide ? columns : (columns + 31) / 32 * 16;
  GK_CHECK_VALUE(columns >= 0 && data.dim() == 2 && data.size(1) == m.row_bytes, op, "weight.data: expected [out, ",
                 m.row_bytes, "] for ", columns, " inputs, got shape ", shape_of(data));
  GK_CHECK_VALUE(group_size == 0 || (group_size >= 32 && std::has_single_bit(uint64_t(group_size))), op,
                 "weight.group_size: expected a power of two of at least 32, or 0 for a row, got ", group_size);
  m.group_bits = group_size ? std::countr_zero(uint64_t(group_size)) : 62;
  m.groups = group_size ? (columns + group_size - 1) / group_size : 1;
  const int64_t rows = data.size(0);
  const auto check = [&](const char* name, const TensorRef& t, bool fits, const auto&... expected) {
    GK_CHECK_VALUE(fits && t.is_contiguous(), op, "weight.", name, ": expected a contiguous ", expected...,
                   ", got shape ", shape_of(t));
  };
  check("data", data, true, "tensor");
  check("scale", scale, scale.dim() == 2 && scale.size(0) == rows && scale.size(1) == m.groups, "[", rows, ", ",
        m.groups, "]");
  m.data = static_cast<const uint8_t*>(data.data());
  if (zero) {
    GK_CHECK_TYPE(!wide && zero->scalar_type() == ScalarType::Byte, op,
                  "weight.zero: expected uint8, beside data of 4 bits, got ", dtype_name(zero->scalar_type()));
    check("zero", *zero, zero->dim() == 2 && zero->size(0) == rows && zero->size(1) == m.groups, "[", rows, ", ",
          m.groups, "]");
    m.zero = static_cast<const uint8_t*>(zero->data());
  }
  GK_CHECK_TYPE(scale.scalar_type() == (code_scale ? ScalarType::Byte : ScalarType::Float), op,
                "weight.scale: expected ", code_scale ? "uint8 beside a code_scale" : "float32", ", got ",
                dtype_name(scale.scalar_type()));
  if (code_scale) {
    const int64_t blocks = (rows * m.groups + kScaleBlock - 1) / kScaleBlock;
    GK_CHECK_TYPE(code_scale->scalar_type() == ScalarType::Float, op, "weight.code_scale: expected float32, got ",
                  dtype_name(code_scale->scalar_type()));
    check("code_scale", *code_scale, code_scale->dim() == 1 && code_scale->size(0) == blocks, "[", blocks, "]");
    m.scale_code = static_cast<const uint8_t*>(scale.data());
    m.code_scale = static_cast<const float*>(code_scale->data());
  } else {
    m.scale = static_cast<const float*>(scale.data());
  }
  return m;
}

// As the B of C = A Q' or, `across`, of C = A Q.
inline MatmulOperand operand(const QuantizedMatrix& m, bool across = false) {
  MatmulOperand b;
  b.outer = across ? 1 : 0;
  b.depth = across ? 0 : 1;
  b.quantized = &m;
  return b;
}

// The weight [out, in] of a linear layer: a tensor of x's dtype or, with a scale, the data of a quantized one.
struct LinearWeight {
  const TensorRef& data;
  std::optional<QuantizedMatrix> quantized;
  int64_t out, in;

  LinearWeight(const char* op, const TensorRef& data, const OptionalTensor& scale, const OptionalTensor& zero,
               const OptionalTensor& code_scale, int64_t inputs, int64_t group_size)
      : data(data) {
    GK_CHECK_VALUE(data.dim() == 2, op, "weight: expected [out, in], got shape ", shape_of(data));
    if (scale) quantized = quantized_matrix(op, data, *scale, zero, code_scale, inputs, group_size);
    out = data.size(0);
    in = quantized ? inputs : data.size(1);
  }
  // As the B of C = A W' or, `across`, of C = A W.
  MatmulOperand operand(const char* op, bool across = false) const {
    if (quantized) return genai_kernels::operand(*quantized, across);
    return {data.data(), float_dtype(op, "weight", data), data.stride(across ? 1 : 0), data.stride(across ? 0 : 1)};
  }
};

}  // namespace genai_kernels
