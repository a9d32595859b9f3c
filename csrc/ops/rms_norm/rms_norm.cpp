// Host of rms_norm: schema, checks, allocation.
#include "ops/rms_norm/rms_norm.h"

#include <tuple>

#include "host/direct_call.h"
#include "host/norm_rows.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "rms_norm";

Tensor rms_norm(const TensorRef& x, const OptionalTensor& weight, double eps) {
  NormParams p = norm_params(kOp, x, weight, {}, eps);
  Tensor y = new_like(x);
  p.y = write_rows(kOp, "out", y);
  run_norm_forward(kOp, p, x, rms_norm_fwd_kernel, launch_rms_norm_fwd);
  return y;
}

void rms_norm_out(const TensorRef& x, const OptionalTensor& weight, double eps, const Output& out) {
  NormParams p = norm_params(kOp, x, weight, {}, eps);
  check_norm_output(kOp, "out", out, x, {}, weight, {});
  p.y = write_rows(kOp, "out", out);
  run_norm_forward(kOp, p, x, rms_norm_fwd_kernel, launch_rms_norm_fwd);
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const TensorRef& dy, const TensorRef& x, const OptionalTensor& weight,
                                        double eps, bool weight_grad) {
  NormParams p = norm_params(kOp, x, weight, {}, eps);
  Tensor dx = new_like(x), dw = new_parameter_gradient(x, weight, weight_grad);
  run_norm_backward(kOp, p, dy, x, dx, weight && weight_grad ? &dw : nullptr, nullptr, rms_norm_bwd_kernel,
                    launch_rms_norm_bwd);
  return {dx, dw};
}

}  // namespace
}  // namespace genai_kernels

GK_OP(rms_norm, genai_kernels::rms_norm, "(Tensor x, Tensor? weight, float eps) -> Tensor")
GK_OP(rms_norm_out, genai_kernels::rms_norm_out, "(Tensor x, Tensor? weight, float eps, Tensor(a!) out) -> ()")
GK_OP(rms_norm_bwd, genai_kernels::rms_norm_bwd,
      "(Tensor dy, Tensor x, Tensor? weight, float eps, bool weight_grad) -> (Tensor, Tensor)")
