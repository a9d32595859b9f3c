// Host of rms_norm: schema, checks, allocation, and the parallel loop over rows.
#include "ops/rms_norm/rms_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "host/alloc.h"
#include "host/check.h"
#include "host/parallel.h"
#include "host/rows.h"
#include "host/scratch.h"
#include "host/sum_blocks.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "rms_norm";

RmsNormParams checked_params(const Tensor& x, const OptionalTensor& weight, double eps) {
  RmsNormParams p{};
  GK_CHECK_VALUE(x.dim() >= 1, kOp, "x: expected at least one dimension, got a scalar");
  GK_CHECK_VALUE(eps >= 0, kOp, "eps: expected >= 0, got ", eps);
  p.dtype = float_dtype(kOp, "x", x);
  p.eps = eps;
  p.x = read_rows(kOp, "x", x);
  p.weight = read_parameter(kOp, "weight", weight, p.x.length);
  return p;
}

void forward(const RmsNormParams& p) {
  if (p.x.count == 0 || p.x.length == 0) return;
  parallel_for_elements(p.x.count, p.x.length, [&](int64_t begin, int64_t end) {
    const Scratch scratch(p.x.length * 2 * compute_bytes(p.dtype));
    rms_norm_fwd_kernel(p, begin, end, scratch.get());
  });
}

Tensor rms_norm(const Tensor& x, const OptionalTensor& weight, double eps) {
  RmsNormParams p = checked_params(x, weight, eps);
  Tensor y = new_like(x);
  p.y = write_rows(kOp, "out", y);
  forward(p);
  return y;
}

void rms_norm_out(const Tensor& x, const OptionalTensor& weight, double eps, Tensor out) {
  RmsNormParams p = checked_params(x, weight, eps);
  check_output(kOp, "out", out, "x", x);
  if (weight) check_no_partial_overlap(kOp, "out", out, "weight", *weight);
  p.y = write_rows(kOp, "out", out);
  forward(p);
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, double eps,
                                        bool weight_grad) {
  RmsNormParams p = checked_params(x, weight, eps);
  check_same_dtype(kOp, "dy", dy, "x", x);
  check_same_shape(kOp, "dy", dy, "x", x);
  weight_grad = weight_grad && weight;
  Tensor dx = new_like(x), dw = new_empty(x, {weight_grad ? p.x.length : 0}, (weight ? *weight : x).scalar_type());
  p.dy = read_rows(kOp, "dy", dy);
  p.dx = write_rows(kOp, "dx", dx);
  if (p.x.count == 0 || p.x.length == 0) {
    torch::stable::zero_(dw);
    return {dx, dw};
  }
  const RowBlocks blocks(p.x.count);
  Tensor partial;
  if (weight_grad) {
    partial = new_block_sums(x, blocks.count(), p.x.length);
    p.dw_partial = static_cast<double*>(partial.mutable_data_ptr());
  }
  parallel_for_elements(blocks.count(), p.x.length * blocks.size, [&](int64_t begin, int64_t end) {
    const Scratch scratch(p.x.length * kRmsNormBackwardScratchRows * compute_bytes(p.dtype));
    rms_norm_bwd_kernel(p, blocks, begin, end, scratch.get());
  });
  if (weight_grad) sum_blocks(p.weight.dtype, partial, dw);
  return {dx, dw};
}

}  // namespace
}  // namespace genai_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(genai_kernels, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor");
  m.def("rms_norm_out(Tensor x, Tensor? weight, float eps, Tensor(a!) out) -> ()");
  m.def("rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, float eps, bool weight_grad) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(genai_kernels, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&genai_kernels::rms_norm));
  m.impl("rms_norm_out", TORCH_BOX(&genai_kernels::rms_norm_out));
  m.impl("rms_norm_bwd", TORCH_BOX(&genai_kernels::rms_norm_bwd));
}
