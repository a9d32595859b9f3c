// What the hosts of the row norms share: checks, and the loops over rows.
#pragma once
#include "core/norm_rows.h"
#include "cuda/norm_row_blocks.h"
#include "cuda/stage_parameter.h"
#include "host/alloc.h"
#include "host/check.h"
#include "host/gpu.h"
#include "host/parallel.h"
#include "host/rows.h"
#include "host/scratch.h"
#include "host/sum_blocks.h"

#include <torch/csrc/stable/ops.h>

namespace genai_kernels {

inline NormParams norm_params(const char* op, const TensorRef& x, const OptionalTensor& weight,
                              const OptionalTensor& bias, double eps) {
  NormParams p{};
  GK_CHECK_VALUE(x.dim() >= 1, op, "x: expected at least one dimension, got a scalar");
  GK_CHECK_VALUE(eps >= 0, op, "eps: expected >= 0, got ", eps);
  p.dtype = float_dtype(op, "x", x);
  p.eps = eps;
  p.x = read_rows(op, "x", x);
  p.weight = read_parameter(op, "weight", weight, p.x.length);
  p.bias = read_parameter(op, "bias", bias, p.x.length);
  return p;
}

inline void set_residual(const char* op, NormParams& p, const TensorRef& x, const TensorRef& residual) {
  check_same_dtype(op, "residual", residual, "x", x);
  check_same_shape(op, "residual", residual, "x", x);
  p.residual = read_rows(op, "residual", residual);
}

// `out` may be x or the residual itself: a row is read before it is written.
inline void check_norm_output(const char* op, const char* name, const TensorRef& out, const TensorRef& x,
                              const OptionalTensor& residual, const OptionalTensor& weight,
                              const OptionalTensor& bias) {
  check_output(op, name, out, "x", x);
  check_writable(op, name, out);
  if (residual) check_no_partial_overlap(op, name, out, "residual", *residual);
  if (weight) check_no_overlap(op, name, out, "weight", *weight);
  if (bias) check_no_overlap(op, name, out, "bias", *bias);
}

// Parameters as the CUDA kernels read them, 16 bytes at a time: contiguous, aligned, a whole number of vectors, of the
// rows' type or float32. Others are copied first.
class GpuParameter {
 public:
  GpuParameter(const char* op, const TensorRef& x, const NormParams& p, Parameter& parameter) {
    const int64_t n = p.x.length;
    const bool as_it_is = parameter.stride == 1 && reinterpret_cast<uintptr_t>(parameter.data) % 16 == 0 &&
                          (parameter.dtype == p.dtype || parameter.dtype == Dtype::f32) &&
                          n % (p.dtype == Dtype::f32 ? 4 : 8) == 0;
    if (!parameter.data || as_it_is) return;
    staged_ = new_empty(x, {staged_length(n)}, ScalarType::Float);
    float* data = static_cast<float*>(staged_.mutable_data_ptr());
    run_on_gpu(op, x, [&](cudaStream_t stream) { return launch_stage_parameter(parameter, n, data, stream); });
    parameter = {data, 1, Dtype::f32};
  }

 private:
  Tensor staged_;
};

template <class Launch>
void run_norm_on_gpu(const char* op, const TensorRef& x, NormParams p, const Launch& launch) {
  check_gpu_dtype(op, "x", p.dtype);
  const GpuParameter weight(op, x, p, p.weight), bias(op, x, p, p.bias);
  run_on_gpu(op, x, [&](cudaStream_t stream) { return launch(p, stream); });
}

template <class Kernel, class Launcher>
void run_norm_forward(const char* op, const NormParams& p, const TensorRef& x, Kernel kernel, Launcher launch) {
  if (p.x.count == 0 || p.x.length == 0) return;
  if (on_gpu(x)) return run_norm_on_gpu(op, x, p, launch);
  parallel_for_elements(p.x.count, p.x.length, [&](int64_t begin, int64_t end) {
    const Scratch scratch(p.x.length * kNormForwardScratchRows * compute_bytes(p.dtype));
    kernel(p, begin, end, scratch.get());
  });
}

// dx, and dw and db (null: not wanted; otherwise [length]).
template <class Kernel, class Launcher>
void run_norm_backward(const char* op, NormParams& p, const TensorRef& dy, const TensorRef& x, const TensorRef& dx,
                       const Tensor* dw, const Tensor* db, Kernel kernel, Launcher launch) {
  check_same_dtype(op, "dy", dy, "x", x);
  check_same_shape(op, "dy", dy, "x", x);
  p.dy = read_rows(op, "dy", dy);
  p.dx = write_rows(op, "dx", dx);
  if (p.x.count == 0 || p.x.length == 0) {
    for (const Tensor* t : {dw, db})
      if (t) {
        Tensor zeroed = *t;
        torch::stable::zero_(zeroed);
      }
    return;
  }
  if (on_gpu(x)) {
    check_gpu_dtype(op, "x", p.dtype);
    const RowBlocks blocks = gpu_norm_blocks(p.x.count, p.x.length, p.dtype);
    Tensor dw_partial, db_partial;
    const auto partial = [&](const Tensor* wanted, Tensor& sums) -> void* {
      if (!wanted) return nullptr;
      const ScalarType type = p.dtype == Dtype::f32 ? ScalarType::Double : ScalarType::Float;
      sums = new_empty(x, {blocks.count(), p.x.length}, type);
      return sums.mutable_data_ptr();
    };
    p.dw_partial = partial(dw, dw_partial);
    p.db_partial = partial(db, db_partial);
    run_norm_on_gpu(op, x, p, [&](const NormParams& staged, cudaStream_t s) { return launch(staged, blocks, s); });
    if (dw) sum_blocks(float_dtype(op, "weight", *dw), dw_partial, *dw);
    if (db) sum_blocks(float_dtype(op, "bias", *db), db_partial, *db);
    return;
  }
  const RowBlocks blocks(p.x.count);
  const int64_t wanted = (dw ? 1 : 0) + (db ? 1 : 0), size = blocks.count() * p.x.length;
  const Scratch sums(wanted * size * int64_t(sizeof(double)));
  double* next = static_cast<double*>(sums.get());
  if (dw) p.dw_partial = next;
  if (db) p.db_partial = next + (dw ? size : 0);
  parallel_for_elements(blocks.count(), p.x.length * blocks.size, [&](int64_t begin, int64_t end) {
    const Scratch scratch(p.x.length * kNormBackwardScratchRows * compute_bytes(p.dtype));
    kernel(p, blocks, begin, end, scratch.get());
  });
  if (dw) sum_blocks(static_cast<double*>(p.dw_partial), blocks.count(), *dw);
  if (db) sum_blocks(static_cast<double*>(p.db_partial), blocks.count(), *db);
}

// A gradient like a parameter, or empty where it is not wanted.
inline Tensor new_parameter_gradient(const TensorRef& x, const OptionalTensor& parameter, bool wanted) {
  return parameter && wanted ? new_like(*parameter) : new_empty(x, {0}, x.scalar_type());
}

}  // namespace genai_kernels
