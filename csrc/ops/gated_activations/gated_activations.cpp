// Host of silu_and_mul, gelu_and_mul and gelu_tanh_and_mul: schemas, checks, allocation, the parallel loop over rows.
#include "ops/gated_activations/gated_activations.h"

#include <torch/csrc/stable/ops.h>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/gpu.h"
#include "host/parallel.h"
#include "host/rows.h"
#include "host/scratch.h"

namespace genai_kernels {
namespace {

constexpr const char* kNames[] = {"silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"};  // in the order of Gate

GatedActivationParams checked_params(Gate gate, const TensorRef& x) {
  const char* op = kNames[int(gate)];
  GatedActivationParams p{};
  p.gate = gate;
  p.dtype = float_dtype(op, "x", x);
  const int64_t dim = x.dim();
  GK_CHECK_VALUE(dim >= 1 && x.size(dim - 1) % 2 == 0, op,
                 "x: expected a last dimension of even size, the gate and then the factor, got shape ", shape_of(x));
  p.x = read_rows(op, "x", x);
  return p;
}

// The shape of y.
struct HalfShape {
  int64_t sizes[64], dim;
  explicit HalfShape(const TensorRef& x) : dim(x.dim()) {
    const auto full = x.sizes();
    std::copy(full.begin(), full.end(), sizes);
    sizes[dim - 1] /= 2;
  }
  bool fits(const TensorRef& t) const {
    const auto other = t.sizes();
    return std::equal(sizes, sizes + dim, other.begin(), other.end());
  }
};

int64_t scratch_bytes(const GatedActivationParams& p, bool strided) {
  return strided ? p.x.length * 3 * compute_bytes(p.dtype) : 0;
}

void forward(const GatedActivationParams& p, const TensorRef& x) {
  if (p.x.count == 0 || p.x.length == 0) return;
  if (on_gpu(x)) {
    check_gpu_dtype(kNames[int(p.gate)], "x", p.dtype);
    return run_on_gpu(kNames[int(p.gate)], x, [&](cudaStream_t s) { return launch_gated_activation_fwd(p, s); });
  }
  const int64_t bytes = scratch_bytes(p, p.x.inner_stride != 1 || p.y.inner_stride != 1);
  parallel_for_elements(p.x.count, p.x.length, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    gated_activation_fwd_kernel(p, begin, end, scratch.get());
  });
}

template <Gate kGate>
Tensor gated(const TensorRef& x) {
  GatedActivationParams p = checked_params(kGate, x);
  const HalfShape half(x);
  Tensor y = new_empty(x, half.sizes, half.dim, x.scalar_type());
  p.y = write_rows(kNames[int(kGate)], "out", y);
  forward(p, x);
  return y;
}

template <Gate kGate>
void gated_out(const TensorRef& x, const Output& out) {
  constexpr const char* op = kNames[int(kGate)];
  GatedActivationParams p = checked_params(kGate, x);
  check_same_dtype(op, "out", out, "x", x);
  GK_CHECK_VALUE(HalfShape(x).fits(out), op, "out: expected half the last dimension of x, ", shape_of(x), ", got ",
                 shape_of(out));
  check_no_overlap(op, "out", out, "x", x);
  p.y = write_rows(op, "out", out);
  forward(p, x);
}

template <Gate kGate>
Tensor gated_bwd(const TensorRef& dy, const TensorRef& x) {
  constexpr const char* op = kNames[int(kGate)];
  GatedActivationParams p = checked_params(kGate, x);
  check_same_dtype(op, "dy", dy, "x", x);
  GK_CHECK_VALUE(HalfShape(x).fits(dy), op, "dy: expected half the last dimension of x, ", shape_of(x), ", got ",
                 shape_of(dy));
  Tensor dx = new_like(x);
  p.dy = read_rows(op, "dy", dy);
  p.dx = write_rows(op, "dx", dx);
  if (p.x.count == 0 || p.x.length == 0) return dx;
  if (on_gpu(x)) {
    check_gpu_dtype(op, "x", p.dtype);
    run_on_gpu(op, x, [&](cudaStream_t s) { return launch_gated_activation_bwd(p, s); });
    return dx;
  }
  const int64_t bytes = 2 * scratch_bytes(p, p.x.inner_stride != 1 || p.dy.inner_stride != 1);
  parallel_for_elements(p.x.count, p.x.length, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    gated_activation_bwd_kernel(p, begin, end, scratch.get());
  });
  return dx;
}

}  // namespace
}  // namespace genai_kernels

GK_OP(silu_and_mul, genai_kernels::gated<genai_kernels::Gate::silu>, "(Tensor x) -> Tensor")
GK_OP(silu_and_mul_out, genai_kernels::gated_out<genai_kernels::Gate::silu>, "(Tensor x, Tensor(a!) out) -> ()")
GK_OP(silu_and_mul_bwd, genai_kernels::gated_bwd<genai_kernels::Gate::silu>, "(Tensor dy, Tensor x) -> Tensor")
GK_OP(gelu_and_mul, genai_kernels::gated<genai_kernels::Gate::gelu>, "(Tensor x) -> Tensor")
GK_OP(gelu_and_mul_out, genai_kernels::gated_out<genai_kernels::Gate::gelu>, "(Tensor x, Tensor(a!) out) -> ()")
GK_OP(gelu_and_mul_bwd, genai_kernels::gated_bwd<genai_kernels::Gate::gelu>, "(Tensor dy, Tensor x) -> Tensor")
GK_OP(gelu_tanh_and_mul, genai_kernels::gated<genai_kernels::Gate::gelu_tanh>, "(Tensor x) -> Tensor")
GK_OP(gelu_tanh_and_mul_out, genai_kernels::gated_out<genai_kernels::Gate::gelu_tanh>,
      "(Tensor x, Tensor(a!) out) -> ()")
GK_OP(gelu_tanh_and_mul_bwd, genai_kernels::gated_bwd<genai_kernels::Gate::gelu_tanh>,
      "(Tensor dy, Tensor x) -> Tensor")
