// Host of linear: schemas, checks, allocation, the products of forward and backward.
#include <torch/csrc/stable/ops.h>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/matmul.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "linear";

struct Sizes {
  Dtype dtype;
  int64_t rows, in, out;
};

Sizes checked(const TensorRef& x, const TensorRef& weight) {
  const Dtype dtype = float_dtype(kOp, "x", x);
  GK_CHECK_VALUE(weight.dim() == 2, kOp, "weight: expected [out, in], got shape ", shape_of(weight));
  check_same_dtype(kOp, "weight", weight, "x", x);
  GK_CHECK_VALUE(x.dim() == 2 && x.size(1) == weight.size(1), kOp, "x: expected a last dimension of ", weight.size(1),
                 " as weight has, got shape ", shape_of(x));
  return {dtype, x.size(0), weight.size(1), weight.size(0)};
}

// x is [rows, in].
Tensor linear(const TensorRef& x, const TensorRef& weight, const OptionalTensor& bias) {
  const Sizes n = checked(x, weight);
  DotMatmulParams p{};
  p.a = operand(kOp, "x", x, 0, 1);
  p.b = operand(kOp, "weight", weight, 0, 1);
  p.rows = n.rows;
  p.columns = n.out;
  p.depth = n.in;
  p.scale = 1;
  if (bias) {
    check_same_dtype(kOp, "bias", *bias, "x", x);
    GK_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == n.out, kOp, "bias: expected [", n.out, "], got shape ",
                   shape_of(*bias));
    p.bias = {bias->data(), n.dtype, bias->stride(0), 0};
  }
  Tensor y = new_empty(x, {n.rows, n.out}, x.scalar_type());
  p.out = y.mutable_data_ptr();
  p.out_dtype = n.dtype;
  p.out_row = n.out;
  run_matmul(p);
  return y;
}

// dx = dy W.
Tensor linear_dx(const TensorRef& dy, const TensorRef& weight) {
  check_same_dtype(kOp, "dy", dy, "weight", weight);
  GK_CHECK_VALUE(weight.dim() == 2 && dy.dim() == 2 && dy.size(1) == weight.size(0), kOp,
                 "dy: expected [rows, out] for a weight [out, in], got shapes ", shape_of(dy), " and ",
                 shape_of(weight));
  Tensor dx = new_empty(dy, {dy.size(0), weight.size(1)}, dy.scalar_type());
  MatmulTerm term{};
  term.a = operand(kOp, "dy", dy, 0, 1);
  term.b = operand(kOp, "weight", weight, 1, 0);
  term.depth = weight.size(0);
  run_matmul(
      MatmulParams{&term, 1, dy.size(0), weight.size(1), 1, dx.mutable_data_ptr(), term.a.dtype, weight.size(1)});
  return dx;
}

// dW = dy' x.
Tensor linear_dw(const TensorRef& dy, const TensorRef& x) {
  check_same_dtype(kOp, "dy", dy, "x", x);
  GK_CHECK_VALUE(x.dim() == 2 && dy.dim() == 2 && dy.size(0) == x.size(0), kOp,
                 "dy: expected as many rows as x has, got shapes ", shape_of(dy), " and ", shape_of(x));
  Tensor dw = new_empty(dy, {dy.size(1), x.size(1)}, dy.scalar_type());
  MatmulTerm term{};
  term.a = operand(kOp, "dy", dy, 1, 0);
  term.b = operand(kOp, "x", x, 1, 0);
  term.depth = dy.size(0);
  run_matmul(MatmulParams{&term, 1, dy.size(1), x.size(1), 1, dw.mutable_data_ptr(), term.a.dtype, x.size(1)});
  return dw;
}

}  // namespace
}  // namespace genai_kernels

GK_CPU_OP(linear, genai_kernels::linear, "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
GK_CPU_OP(linear_dx, genai_kernels::linear_dx, "(Tensor dy, Tensor weight) -> Tensor")
GK_CPU_OP(linear_dw, genai_kernels::linear_dw, "(Tensor dy, Tensor x) -> Tensor")
