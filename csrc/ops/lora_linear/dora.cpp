// Host of what DoRA needs beside lora_linear (dora_norm, scale_columns_bwd), and of the merging of an adapter.
#include "ops/lora_linear/dora.h"

#include <cmath>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/matmul.h"
#include "host/quantized.h"

namespace genai_kernels {
namespace {

// An adapter beside its weight: sizes, dtypes, scaling. The dtype is that of the adapter.
Dtype check_adapter(const char* op, const TensorRef& a, const TensorRef& b, double scaling, int64_t out, int64_t in) {
  const Dtype dtype = float_dtype(op, "lora_a", a);
  check_same_dtype(op, "lora_b", b, "lora_a", a);
  GK_CHECK_VALUE(a.dim() == 2 && a.size(1) == in, op, "lora_a: expected [rank, ", in, "], got shape ", shape_of(a));
  GK_CHECK_VALUE(b.dim() == 2 && b.size(0) == out && b.size(1) == a.size(0), op, "lora_b: expected [", out, ", ",
                 a.size(0), "], out and the rank of lora_a, got shape ", shape_of(b));
  GK_CHECK_VALUE(std::isfinite(scaling), op, "scaling: expected a finite number, got ", scaling);
  return dtype;
}

// [out], float32 (float64 for that).
Tensor dora_norm(const TensorRef& weight, const TensorRef& lora_a, const TensorRef& lora_b, double scaling,
                 const OptionalTensor& weight_scale, const OptionalTensor& weight_zero,
                 const OptionalTensor& weight_code_scale, int64_t group_size) {
  constexpr const char* kOp = "dora_norm";
  GK_CHECK_VALUE(lora_a.dim() == 2, kOp, "lora_a: expected [rank, in], got shape ", shape_of(lora_a));
  const LinearWeight w(kOp, weight, weight_scale, weight_zero, weight_code_scale, lora_a.size(1), group_size);
  const Dtype dtype = check_adapter(kOp, lora_a, lora_b, scaling, w.out, w.in);
  const bool wide = dtype == Dtype::f64;
  GK_CHECK_TYPE(w.quantized || (float_dtype(kOp, "weight", weight) == Dtype::f64) == wide, kOp,
                "lora_a: expected float64 beside a weight of float64, and only there, got ",
                dtype_name(lora_a.scalar_type()));
  const Dtype compute = wide ? Dtype::f64 : Dtype::f32;
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t rank = lora_a.size(0);
  Tensor wa = new_empty(lora_a, {rank, w.out}, type), aa = new_empty(lora_a, {rank, rank}, type),
         baa = new_empty(lora_a, {w.out, rank}, type), norm = new_empty(lora_a, {w.out}, type);
  const auto product = [&](MatmulOperand a, MatmulOperand b, int64_t rows, int64_t columns, int64_t depth,
                           const Tensor& to) {
    DotMatmulParams p{};
    p.a = a;
    p.b = b;
    p.rows = rows;
    p.columns = columns;
    p.depth = depth;
    p.scale = 1;
    p.out = to.mutable_data_ptr();
    p.out_dtype = compute;
    p.out_row = columns;
    return p;
  };
  const MatmulOperand a = operand(kOp, "lora_a", lora_a, 0, 1), b = operand(kOp, "lora_b", lora_b, 0, 1);
  const DotMatmulParams first[] = {product(a, w.operand(kOp), rank, w.out, w.in, wa),
                                   product(a, a, rank, rank, w.in, aa)};
  run_matmuls(std::span<const DotMatmulParams>(first));
  run_matmul(product(b, {aa.mutable_data_ptr(), compute, rank, 1}, w.out, rank, rank, baa));
  const DoraNormParams p{
      w.operand(kOp),          a,   b, w.in, rank, w.out, wa.mutable_data_ptr(), baa.mutable_data_ptr(), scaling,
      norm.mutable_data_ptr(), wide};
  const int64_t bytes = dora_norm_scratch(p);
  parallel_for_elements(w.out, w.in, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    dora_norm_kernel(p, begin, end, scratch.get());
  });
  return norm;
}

// Of y = column_scale * inner.
std::tuple<Tensor, Tensor> scale_columns_bwd(const TensorRef& dy, const TensorRef& column_scale,
                                             const TensorRef& inner) {
  constexpr const char* kOp = "dora_linear";
  const Dtype dtype = float_dtype(kOp, "dy", dy);
  const Dtype kept = float_dtype(kOp, "inner", inner);
  GK_CHECK_TYPE((kept == Dtype::f64) == (dtype == Dtype::f64), kOp, "inner: expected what forward kept, got ",
                dtype_name(inner.scalar_type()));
  GK_CHECK_VALUE(dy.dim() == 2 && inner.dim() == 2 && inner.is_contiguous() && dy.size(0) == inner.size(0) &&
                     dy.size(1) == inner.size(1) && (dy.stride(1) == 1 || dy.size(1) == 1),
                 kOp, "dy: expected rows as forward kept, got shapes ", shape_of(dy), " and ", shape_of(inner));
  const ScalarType type = dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
  GK_CHECK_VALUE(
      column_scale.numel() == dy.size(1) && column_scale.is_contiguous() && column_scale.scalar_type() == type, kOp,
      "column_scale: expected what forward had, got shape ", shape_of(column_scale));
  Tensor d_inner = new_empty(dy, {dy.size(0), dy.size(1)}, dy.scalar_type());
  Tensor d_scale = new_empty(dy, {dy.size(1)}, type);
  const ScaleColumnsParams p{dtype,
                             dy.size(0),
                             dy.size(1),
                             dy.data(),
                             dy.stride(0),
                             inner.data(),
                             column_scale.data(),
                             kept,
                             d_inner.mutable_data_ptr(),
                             d_scale.mutable_data_ptr()};
  // whole cache lines of each row
  const int64_t step = 64, steps = (p.columns + step - 1) / step;
  parallel_for_elements(steps, step * p.rows, [&](int64_t begin, int64_t end) {
    scale_columns_bwd_kernel(p, begin * step, std::min(p.columns, end * step));
  });
  return {d_inner, d_scale};
}

// weight += scaling B A, rounded once.
void merge_lora_(const Output& weight, const TensorRef& lora_a, const TensorRef& lora_b, double scaling) {
  constexpr const char* kOp = "merge_lora_";
  const Dtype dtype = float_dtype(kOp, "weight", weight);
  GK_CHECK_VALUE(weight.dim() == 2 && (weight.stride(1) == 1 || weight.size(1) <= 1), kOp,
                 "weight: expected [out, in] with rows that lie along, got shape ", shape_of(weight));
  const Dtype adapter = check_adapter(kOp, lora_a, lora_b, scaling, weight.size(0), weight.size(1));
  GK_CHECK_TYPE((adapter == Dtype::f64) == (dtype == Dtype::f64), kOp,
                "lora_a: expected float64 beside a weight of float64, and only there, got ",
                dtype_name(lora_a.scalar_type()));
  MatmulTerm term{};
  term.a = operand(kOp, "lora_b", lora_b, 0, 1);
  term.b = operand(kOp, "lora_a", lora_a, 1, 0);
  term.depth = lora_a.size(0);
  MatmulParams p{&term, 1, weight.size(0), weight.size(1), scaling, weight.data(), dtype, weight.stride(0)};
  p.accumulate = true;
  run_matmul(p);
}

}  // namespace
}  // namespace genai_kernels

GK_CPU_OP(dora_norm, genai_kernels::dora_norm,
          "(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, Tensor? weight_scale, Tensor? weight_zero, "
          "Tensor? weight_code_scale, int group_size) -> Tensor")
GK_CPU_OP(scale_columns_bwd, genai_kernels::scale_columns_bwd,
          "(Tensor dy, Tensor column_scale, Tensor inner) -> (Tensor, Tensor)")
GK_CPU_OP(merge_lora_, genai_kernels::merge_lora_,
          "(Tensor(a!) weight, Tensor lora_a, Tensor lora_b, float scaling) -> ()")
