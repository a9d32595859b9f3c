// Host of layer_norm, with and without a residual: schemas, checks, allocation.
#include "ops/layer_norm/layer_norm.h"

#include <tuple>

#include "host/direct_call.h"
#include "host/norm_rows.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "layer_norm";

Tensor layer_norm(const TensorRef& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  NormParams p = norm_params(kOp, x, weight, bias, eps);
  Tensor y = new_like(x);
  p.y = write_rows(kOp, "out", y);
  run_norm_forward(kOp, p, x, layer_norm_fwd_kernel, launch_layer_norm_fwd);
  return y;
}

void layer_norm_out(const TensorRef& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                    const Output& out) {
  NormParams p = norm_params(kOp, x, weight, bias, eps);
  check_norm_output(kOp, "out", out, x, {}, weight, bias);
  p.y = write_rows(kOp, "out", out);
  run_norm_forward(kOp, p, x, layer_norm_fwd_kernel, launch_layer_norm_fwd);
}

std::tuple<Tensor, Tensor> add_layer_norm(const TensorRef& x, const TensorRef& residual, const OptionalTensor& weight,
                                          const OptionalTensor& bias, double eps) {
  NormParams p = norm_params(kOp, x, weight, bias, eps);
  set_residual(kOp, p, x, residual);
  Tensor y = new_like(x), sum = new_like(x);
  p.y = write_rows(kOp, "out", y);
  p.sum = write_rows(kOp, "new_residual", sum);
  run_norm_forward(kOp, p, x, layer_norm_fwd_kernel, launch_layer_norm_fwd);
  return {y, sum};
}

void add_layer_norm_out(const TensorRef& x, const TensorRef& residual, const OptionalTensor& weight,
                        const OptionalTensor& bias, double eps, const Output& out, const Output& out_residual) {
  NormParams p = norm_params(kOp, x, weight, bias, eps);
  set_residual(kOp, p, x, residual);
  check_norm_output(kOp, "out[0]", out, x, residual, weight, bias);
  check_norm_output(kOp, "out[1]", out_residual, x, residual, weight, bias);
  check_no_overlap(kOp, "out[1]", out_residual, "out[0]", out);
  p.y = write_rows(kOp, "out[0]", out);
  p.sum = write_rows(kOp, "out[1]", out_residual);
  run_norm_forward(kOp, p, x, layer_norm_fwd_kernel, launch_layer_norm_fwd);
}

// x is what was normalised, dsum the gradient of the sum where there was a residual.
std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const TensorRef& dy, const OptionalTensor& dsum, const TensorRef& x,
                                                  const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                                  bool weight_grad, bool bias_grad) {
  NormParams p = norm_params(kOp, x, weight, bias, eps);
  if (dsum) {
    check_same_dtype(kOp, "dsum", *dsum, "x", x);
    check_same_shape(kOp, "dsum", *dsum, "x", x);
    p.dsum = read_rows(kOp, "dsum", *dsum);
  }
  Tensor dx = new_like(x), dw = new_parameter_gradient(x, weight, weight_grad),
         db = new_parameter_gradient(x, bias, bias_grad);
  run_norm_backward(kOp, p, dy, x, dx, weight && weight_grad ? &dw : nullptr, bias && bias_grad ? &db : nullptr,
                    layer_norm_bwd_kernel, launch_layer_norm_bwd);
  return {dx, dw, db};
}

}  // namespace
}  // namespace genai_kernels

GK_OP(layer_norm, genai_kernels::layer_norm, "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor")
GK_OP(layer_norm_out, genai_kernels::layer_norm_out,
      "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor(a!) out) -> ()")
GK_OP(add_layer_norm, genai_kernels::add_layer_norm,
      "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)")
GK_OP(add_layer_norm_out, genai_kernels::add_layer_norm_out,
      "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, Tensor(a!) out, Tensor(b!) out_residual) "
      "-> ()")
GK_OP(layer_norm_bwd, genai_kernels::layer_norm_bwd,
      "(Tensor dy, Tensor? dsum, Tensor x, Tensor? weight, Tensor? bias, float eps, bool weight_grad, bool bias_grad) "
      "-> (Tensor, Tensor, Tensor)")
