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
// A thread gets at least this many elements: about 5 us of work, what it costs to wake it.
constexpr int64_t kGrain = 16384;

RmsNormParams checked_params(const Tensor& x, const OptionalTensor& weight, double eps) {
  RmsNormParams p{};
  GK_CHECK_VALUE(x.dim() >= 1, kOp, "x: expected at least one dimension, got a scalar");
  p.dtype = float_dtype(kOp, "x", x);
  p.eps = eps;
  GK_CHECK_VALUE(eps >= 0, kOp, "eps: expected >= 0, got ", eps);
  if (weight) {
    check_same_dtype(kOp, "weight", *weight, "x", x);
    GK_CHECK_VALUE(weight->dim() == 1 && weight->size(0) == x.size(x.dim() - 1), kOp, "weight: expected shape [",
                   x.size(x.dim() - 1), "], the last dimension of x, got ", shape_of(*weight));
  }
  p.x = read_rows(kOp, "x", x);
  return p;
}

void forward(RmsNormParams& p, const OptionalTensor& weight, const Tensor& y) {
  if (y.numel() == 0) return;
  const Tensor w = weight ? torch::stable::contiguous(*weight) : Tensor();
  p.weight = weight ? w.const_data_ptr() : nullptr;
  const int64_t strided = p.x.inner_stride != 1 || p.y.inner_stride != 1 ? p.x.length * 8 : 0;
  parallel_for(p.x.count, 1 + kGrain / p.x.length, [&](int64_t begin, int64_t end) {
    const Scratch scratch(strided);
    rms_norm_fwd_kernel(p, begin, end, scratch.get());
  });
}

Tensor rms_norm(const Tensor& x, const OptionalTensor& weight, double eps) {
  RmsNormParams p = checked_params(x, weight, eps);
  Tensor y = new_like(x);
  p.y = write_rows(kOp, "out", y);
  forward(p, weight, y);
  return y;
}

void rms_norm_out(const Tensor& x, const OptionalTensor& weight, double eps, Tensor out) {
  RmsNormParams p = checked_params(x, weight, eps);
  check_same_dtype(kOp, "out", out, "x", x);
  check_same_shape(kOp, "out", out, "x", x);
  check_no_partial_overlap(kOp, "out", out, "x", x);
  p.y = write_rows(kOp, "out", out);
  forward(p, weight, out);
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const OptionalTensor& weight, double eps) {
  RmsNormParams p = checked_params(x, weight, eps);
  check_same_dtype(kOp, "dy", dy, "x", x);
  check_same_shape(kOp, "dy", dy, "x", x);
  Tensor dx = new_like(x);
  p.dy = read_rows(kOp, "dy", dy);
  p.dx = write_rows(kOp, "dx", dx);
  const int64_t n = p.x.length, blocks = (p.x.count + kRmsNormRowsPerBlock - 1) / kRmsNormRowsPerBlock;
  Tensor w, partial, dw = new_empty(x, {weight ? n : 0}, x.scalar_type());
  if (weight) {
    w = torch::stable::contiguous(*weight);
    p.weight = w.const_data_ptr();
    partial = new_partial_sums(x, p.dtype, blocks, n);
    p.dw_partial = partial.mutable_data_ptr();
  }
  if (x.numel() == 0) {
    torch::stable::zero_(dw);
    return {dx, dw};
  }
  parallel_for(blocks, 1 + kGrain / (n * kRmsNormRowsPerBlock), [&](int64_t begin, int64_t end) {
    const Scratch scratch(n * 8 * 3);
    rms_norm_bwd_kernel(p, begin, end, scratch.get());
  });
  if (weight) sum_blocks(p.dtype, partial, dw);
  return {dx, dw};
}

}  // namespace
}  // namespace genai_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(genai_kernels, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor");
  m.def("rms_norm_out(Tensor x, Tensor? weight, float eps, Tensor(a!) out) -> ()");
  m.def("rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(genai_kernels, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&genai_kernels::rms_norm));
  m.impl("rms_norm_out", TORCH_BOX(&genai_kernels::rms_norm_out));
  m.impl("rms_norm_bwd", TORCH_BOX(&genai_kernels::rms_norm_bwd));
}
