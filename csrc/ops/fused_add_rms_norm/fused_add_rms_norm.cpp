// Host of fused_add_rms_norm: schema, checks, allocation.
#include "ops/fused_add_rms_norm/fused_add_rms_norm.h"

#include <tuple>

#include "host/direct_call.h"
#include "host/norm_rows.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "fused_add_rms_norm";

std::tuple<Tensor, Tensor> fused_add_rms_norm(const TensorRef& x, const TensorRef& residual,
                                              const OptionalTensor& weight, double eps) {
  NormParams p = norm_params(kOp, x, weight, {}, eps);
  set_residual(kOp, p, x, residual);
  Tensor y = new_like(x), sum = new_like(x);
  p.y = write_rows(kOp, "out", y);
  p.sum = write_rows(kOp, "new_residual", sum);
  run_norm_forward(kOp, p, x, fused_add_rms_norm_fwd_kernel, launch_fused_add_rms_norm_fwd);
  return {y, sum};
}

void fused_add_rms_norm_out(const TensorRef& x, const TensorRef& residual, const OptionalTensor& weight, double eps,
                            const Output& out, const Output& out_residual) {
  NormParams p = norm_params(kOp, x, weight, {}, eps);
  set_residual(kOp, p, x, residual);
  check_norm_output(kOp, "out[0]", out, x, residual, weight, {});
  check_norm_output(kOp, "out[1]", out_residual, x, residual, weight, {});
  check_no_overlap(kOp, "out[1]", out_residual, "out[0]", out);
  p.y = write_rows(kOp, "out[0]", out);
  p.sum = write_rows(kOp, "out[1]", out_residual);
  run_norm_forward(kOp, p, x, fused_add_rms_norm_fwd_kernel, launch_fused_add_rms_norm_fwd);
}

// sum = x + residual. The gradient of x and of the residual is the same.
std::tuple<Tensor, Tensor> fused_add_rms_norm_bwd(const TensorRef& dy, const OptionalTensor& dsum, const TensorRef& sum,
                                                  const OptionalTensor& weight, double eps, bool weight_grad) {
  NormParams p = norm_params(kOp, sum, weight, {}, eps);
  if (dsum) {
    check_same_dtype(kOp, "dsum", *dsum, "x", sum);
    check_same_shape(kOp, "dsum", *dsum, "x", sum);
    p.dsum = read_rows(kOp, "dsum", *dsum);
  }
  Tensor dx = new_like(sum), dw = new_parameter_gradient(sum, weight, weight_grad);
  run_norm_backward(kOp, p, dy, sum, dx, weight && weight_grad ? &dw : nullptr, nullptr, fused_add_rms_norm_bwd_kernel,
                    launch_fused_add_rms_norm_bwd);
  return {dx, dw};
}

}  // namespace
}  // namespace genai_kernels

GK_OP(fused_add_rms_norm, genai_kernels::fused_add_rms_norm,
      "(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)")
GK_OP(fused_add_rms_norm_out, genai_kernels::fused_add_rms_norm_out,
      "(Tensor x, Tensor residual, Tensor? weight, float eps, Tensor(a!) out, Tensor(b!) out_residual) -> ()")
GK_OP(fused_add_rms_norm_bwd, genai_kernels::fused_add_rms_norm_bwd,
      "(Tensor dy, Tensor? dsum, Tensor sum, Tensor? weight, float eps, bool weight_grad) -> (Tensor, Tensor)")
