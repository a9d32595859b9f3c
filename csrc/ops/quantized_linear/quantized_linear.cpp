// Host of the linear layers with a quantized weight: schemas, checks, allocation, the products of forward and backward.
#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/matmul.h"
#include "host/quantized.h"
#include "ops/quantized_linear/w8a8.h"

namespace genai_kernels {
namespace {

// The public function that a call came from, by what its data are.
const char* name_of(const TensorRef& data, const OptionalTensor& zero) {
  return data.scalar_type() == ScalarType::Char ? "int8_linear" : zero ? "int4_linear" : "nf4_linear";
}

MatmulOperand checked_bias(const char* op, const TensorRef& bias, const TensorRef& x, int64_t columns) {
  check_same_dtype(op, "bias", bias, "x", x);
  GK_CHECK_VALUE(bias.dim() == 1 && bias.size(0) == columns, op, "bias: expected [", columns, "], got shape ",
                 shape_of(bias));
  return {bias.data(), float_dtype(op, "bias", bias), bias.stride(0), 0};
}

// x is [rows, in].
Tensor quantized_linear(const TensorRef& x, const TensorRef& data, const TensorRef& scale, const OptionalTensor& zero,
                        const OptionalTensor& code_scale, int64_t inputs, int64_t group_size,
                        const OptionalTensor& bias) {
  const char* op = name_of(data, zero);
  DotMatmulParams p{};
  p.a = operand(op, "x", x, 0, 1);
  const QuantizedMatrix weight = quantized_matrix(op, data, scale, zero, code_scale, inputs, group_size);
  p.b = operand(weight);
  GK_CHECK_VALUE(x.dim() == 2 && x.size(1) == inputs, op, "x: expected a last dimension of ", inputs,
                 " as weight has, got shape ", shape_of(x));
  p.rows = x.size(0);
  p.columns = data.size(0);
  p.depth = inputs;
  p.scale = 1;
  if (bias) p.bias = checked_bias(op, *bias, x, p.columns);
  Tensor y = new_empty(x, {p.rows, p.columns}, x.scalar_type());
  p.out = y.mutable_data_ptr();
  p.out_dtype = p.a.dtype;
  p.out_row = p.columns;
  run_matmul(p);
  return y;
}

// dx = dy Q.
Tensor quantized_linear_dx(const TensorRef& dy, const TensorRef& data, const TensorRef& scale,
                           const OptionalTensor& zero, const OptionalTensor& code_scale, int64_t inputs,
                           int64_t group_size) {
  const char* op = name_of(data, zero);
  const QuantizedMatrix weight = quantized_matrix(op, data, scale, zero, code_scale, inputs, group_size);
  GK_CHECK_VALUE(dy.dim() == 2 && dy.size(1) == data.size(0), op, "dy: expected a last dimension of ", data.size(0),
                 ", got shape ", shape_of(dy));
  MatmulTerm term{};
  term.a = operand(op, "dy", dy, 0, 1);
  term.b = operand(weight, true);
  term.depth = data.size(0);
  Tensor dx = new_empty(dy, {dy.size(0), inputs}, dy.scalar_type());
  run_matmul(MatmulParams{&term, 1, dy.size(0), inputs, 1, dx.mutable_data_ptr(), term.a.dtype, inputs});
  return dx;
}

// Rows of x in int8, each with its own scale, times a weight of int8 with a scale for each row.
Tensor w8a8_linear(const TensorRef& x, const TensorRef& data, const TensorRef& scale, int64_t inputs,
                   const OptionalTensor& bias) {
  constexpr const char* kOp = "w8a8_linear";
  W8a8Params p{};
  p.x = operand(kOp, "x", x, 0, 1);
  GK_CHECK_TYPE(p.x.dtype != Dtype::f64, kOp, "x: expected float32, bfloat16 or float16, got float64");
  const QuantizedMatrix weight = quantized_matrix(kOp, data, scale, std::nullopt, std::nullopt, inputs, 0);
  GK_CHECK_TYPE(weight.kind == QuantizedKind::int8, kOp, "weight.data: expected int8, got uint8");
  GK_CHECK_VALUE(x.dim() == 2 && x.size(1) == inputs, kOp, "x: expected a last dimension of ", inputs,
                 " as weight has, got shape ", shape_of(x));
  GK_CHECK_IMPLEMENTED(inputs <= kW8a8MostDepth, kOp, "weight: expected at most ", kW8a8MostDepth,
                       " inputs, whose products fit 32 bits, got ", inputs);
  p.weight = reinterpret_cast<const int8_t*>(weight.data);
  p.scale = weight.scale;
  p.rows = x.size(0);
  p.columns = data.size(0);
  p.depth = inputs;
  if (bias) p.bias = checked_bias(kOp, *bias, x, p.columns);
  Tensor y = new_empty(x, {p.rows, p.columns}, x.scalar_type());
  p.out = y.mutable_data_ptr();
  if (p.rows == 0 || p.columns == 0) return y;
  // Rows of an item are 256 KiB of an L2, in int8.
  const int64_t most_rows = std::clamp<int64_t>((256 << 10) / std::max<int64_t>(inputs, 1), 8, 128);
  const MatmulGrid grid(p.rows, p.columns, 6, most_rows, 768);
  const int64_t bytes = w8a8_scratch(p, grid.largest_rows());
  parallel_for_dynamic(
      grid.count(), [&] { return Scratch(bytes); },
      [&](int64_t i, Scratch& scratch) { w8a8_kernel(p, grid.item(i), scratch.get()); });
  return y;
}

}  // namespace
}  // namespace genai_kernels

GK_CPU_OP(w8a8_linear, genai_kernels::w8a8_linear,
          "(Tensor x, Tensor data, Tensor scale, int inputs, Tensor? bias) -> Tensor")
GK_CPU_OP(quantized_linear, genai_kernels::quantized_linear,
          "(Tensor x, Tensor data, Tensor scale, Tensor? zero, Tensor? code_scale, int inputs, int group_size, "
          "Tensor? bias) -> Tensor")
GK_CPU_OP(quantized_linear_dx, genai_kernels::quantized_linear_dx,
          "(Tensor dy, Tensor data, Tensor scale, Tensor? zero, Tensor? code_scale, int inputs, int group_size) "
          "-> Tensor")
