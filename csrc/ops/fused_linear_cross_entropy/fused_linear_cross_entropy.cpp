// Host of fused_linear_cross_entropy: schemas, checks, allocation, and the loop over chunks of rows.
#include "ops/fused_linear_cross_entropy/fused_linear_cross_entropy.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/matmul.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "fused_linear_cross_entropy";

// The weight, and the sums for its gradient, go through the caches once for each chunk, and the weight is packed for it.
// So a chunk has as many rows as 32 MiB of logits allow (256 of a vocabulary of 32000, where 128 took 10 % longer), and
// at least as many as one piece of the contraction of dW. At most 1024: more gain nothing.
constexpr int64_t kChunkBytes = 32 << 20, kMostRows = 1024;

int64_t chunk_rows(int64_t row_bytes) {
  return std::clamp(kChunkBytes / std::max<int64_t>(row_bytes, 1) / kMatmulDepth * kMatmulDepth, kMatmulDepth,
                    kMostRows);
}

enum Reduction : int64_t { kNone, kSum, kMean };

struct Arguments {
  const TensorRef &x, &weight, &target;
  const OptionalTensor& bias;
  int64_t ignore_index;
  double label_smoothing, softcap, z_loss;
};

// The rows that are not ignored, and the classes they should name.
struct Wanted {
  std::vector<int64_t> rows, targets;
  int64_t count() const { return int64_t(rows.size()); }
};

Wanted checked(const Arguments& a) {
  float_dtype(kOp, "x", a.x);
  GK_CHECK_VALUE(a.weight.dim() == 2, kOp, "weight: expected [vocabulary, in], got shape ", shape_of(a.weight));
  check_same_dtype(kOp, "weight", a.weight, "x", a.x);
  GK_CHECK_VALUE(a.x.dim() == 2 && a.x.size(1) == a.weight.size(1), kOp, "x: expected a last dimension of ",
                 a.weight.size(1), " as weight has, got shape ", shape_of(a.x));
  GK_CHECK_VALUE(a.x.size(1) <= 1 || a.x.stride(1) == 1, kOp,
                 "x: expected the elements of a row side by side, got stride ", a.x.stride(1));
  const int64_t vocabulary = a.weight.size(0);
  if (a.bias) {
    check_same_dtype(kOp, "bias", *a.bias, "x", a.x);
    GK_CHECK_VALUE(a.bias->dim() == 1 && a.bias->size(0) == vocabulary, kOp, "bias: expected [", vocabulary,
                   "], got shape ", shape_of(*a.bias));
  }
  GK_CHECK_VALUE(a.label_smoothing >= 0 && a.label_smoothing <= 1, kOp,
                 "label_smoothing: expected 0 <= label_smoothing <= 1, got ", a.label_smoothing);
  GK_CHECK_VALUE(std::isfinite(a.softcap) && a.softcap >= 0, kOp,
                 "softcap: expected a finite number >= 0 (0: none), got ", a.softcap);
  GK_CHECK_VALUE(std::isfinite(a.z_loss) && a.z_loss >= 0, kOp, "z_loss: expected a finite number >= 0 (0: none), got ",
                 a.z_loss);
  const ScalarType type = a.target.scalar_type();
  GK_CHECK_TYPE(type == ScalarType::Int || type == ScalarType::Long, kOp, "target: expected int32 or int64, got ",
                dtype_name(type));
  GK_CHECK_VALUE(a.target.dim() == 1 && a.target.size(0) == a.x.size(0), kOp, "target: expected ", a.x.size(0),
                 " classes, one for each row of x, got shape ", shape_of(a.target));
  Wanted wanted;
  wanted.rows.reserve(size_t(a.x.size(0)));
  wanted.targets.reserve(size_t(a.x.size(0)));
  for (int64_t r = 0; r < a.x.size(0); ++r) {
    const int64_t at = r * a.target.stride(0);
    const int64_t target = type == ScalarType::Long ? a.target.data_as<int64_t>()[at] : a.target.data_as<int32_t>()[at];
    if (target == a.ignore_index) continue;
    GK_CHECK_INDEX(target >= 0 && target < vocabulary, kOp, "target: row ", r, ": expected 0 <= class < ", vocabulary,
                   " or ignore_index ", a.ignore_index, ", got ", target);
    wanted.rows.push_back(r);
    wanted.targets.push_back(target);
  }
  return wanted;
}

// What the sums over rows are wanted of, in the type that they are computed in, unscaled; empty if they are not.
struct Gradients {
  Tensor x, weight, bias;

  Gradients(const Arguments& a, bool for_x, bool for_weight, bool for_bias)
      : x(new_sums(a.x, for_x ? a.x.sizes() : std::span<const int64_t>(kEmpty))),
        weight(new_sums(a.x, for_weight ? a.weight.sizes() : std::span<const int64_t>(kEmpty))),
        bias(new_sums(a.x, for_bias ? a.weight.sizes().first(1) : std::span<const int64_t>(kEmpty))) {}

 private:
  static constexpr int64_t kEmpty[] = {0};
  static Tensor new_sums(const TensorRef& like, std::span<const int64_t> sizes) {
    const bool wide = like.scalar_type() == ScalarType::Double;
    return new_empty(like, sizes.data(), int64_t(sizes.size()), wide ? ScalarType::Double : ScalarType::Float);
  }
};

struct Losses {
  std::vector<double> loss, z_loss;  // of the rows that are not ignored
};

Losses run(const Arguments& a, const Wanted& wanted, const double* row_weights, Gradients* gradients, bool for_x,
           bool for_weight, bool for_bias) {
  const Dtype dtype = float_dtype(kOp, "x", a.x), compute = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  const int64_t in = a.x.size(1), vocabulary = a.weight.size(0), count = wanted.count(), bytes = compute_bytes(dtype);
  const int64_t chunk = std::min(chunk_rows(vocabulary * bytes), count);
  const bool all = count == a.x.size(0), gradient = for_x || for_weight || for_bias;
  const int64_t row_stride = (vocabulary + 15) / 16 * 16 + 16;  // rows that do not share the sets of a cache
  const Scratch logits(chunk * row_stride * bytes), dx_rows(for_x && !all ? chunk * in * bytes : 0);
  std::vector<double> bias_sums(size_t(for_bias ? vocabulary : 0));
  Losses losses{std::vector<double>(size_t(count)), std::vector<double>(size_t(count))};

  MatmulOperand x = operand(kOp, "x", a.x, 0, 1);
  if (in <= 1) x.depth = 1;
  char* dx = for_x ? static_cast<char*>(gradients->x.mutable_data_ptr()) : nullptr;
  if (for_x && !all) std::memset(dx, 0, size_t(a.x.size(0) * in * bytes));
  if (for_weight && count == 0) std::memset(gradients->weight.mutable_data_ptr(), 0, size_t(vocabulary * in * bytes));

  for (int64_t begin = 0; begin < count; begin += chunk) {
    const int64_t rows = std::min(chunk, count - begin);
    DotMatmulParams product{};
    product.a = x;
    product.a.tokens = wanted.rows.data() + begin;
    product.b = operand(kOp, "weight", a.weight, 0, 1);
    product.rows = rows;
    product.columns = vocabulary;
    product.depth = in;
    product.scale = 1;
    if (a.bias) product.bias = {a.bias->data(), dtype, a.bias->stride(0), 0};
    product.out = logits.get();
    product.out_dtype = compute;
    product.out_row = row_stride;
    run_matmul(product);

    // bfloat16 where the processor multiplies that; float16 could not hold small probabilities
    const Dtype gradient_dtype = dtype == Dtype::bf16 ? Dtype::bf16 : compute;
    const CrossEntropyParams p{compute,
                               gradient_dtype,
                               logits.get(),
                               vocabulary,
                               row_stride,
                               wanted.targets.data() + begin,
                               row_weights ? row_weights + begin : nullptr,
                               a.label_smoothing,
                               a.softcap,
                               a.z_loss,
                               gradient,
                               losses.loss.data() + begin,
                               losses.z_loss.data() + begin};
    parallel_for_elements(rows, vocabulary, [&](int64_t from, int64_t to) { cross_entropy_rows_kernel(p, from, to); });
    if (!gradient) continue;

    const int64_t gradient_stride = gradient_dtype == Dtype::bf16 ? 2 * row_stride : row_stride;
    MatmulTerm to_x{}, to_weight{};
    to_x.a = {logits.get(), gradient_dtype, gradient_stride, 1};
    to_x.b = operand(kOp, "weight", a.weight, 1, 0);
    to_x.depth = vocabulary;
    to_weight.a = {logits.get(), gradient_dtype, 1, gradient_stride};
    to_weight.b = {x.data, x.dtype, x.depth, x.outer, wanted.rows.data() + begin};
    to_weight.depth = rows;
    std::vector<MatmulParams> products;
    if (for_x)
      products.push_back(
          {&to_x, 1, rows, in, 1, all ? dx + begin * in * bytes : dx_rows.get(), compute, in, /*accumulate=*/false});
    if (for_weight)
      products.push_back(
          {&to_weight, 1, vocabulary, in, 1, gradients->weight.mutable_data_ptr(), compute, in, begin > 0});
    run_matmuls(std::span<const MatmulParams>(products));
    if (for_bias)
      parallel_for_elements(vocabulary, rows, [&](int64_t from, int64_t to) {
        cross_entropy_columns_kernel(p, rows, bias_sums.data(), from, to);
      });
    for (int64_t r = 0; for_x && !all && r < rows; ++r)
      std::memcpy(dx + wanted.rows[size_t(begin + r)] * in * bytes,
                  static_cast<const char*>(dx_rows.get()) + r * in * bytes, size_t(in * bytes));
  }
  for (int64_t j = 0; for_bias && j < vocabulary; ++j) {
    void* to = gradients->bias.mutable_data_ptr();
    if (compute == Dtype::f64)
      static_cast<double*>(to)[j] = bias_sums[size_t(j)];
    else
      static_cast<float*>(to)[j] = float(bias_sums[size_t(j)]);
  }
  return losses;
}

// The losses as they are returned: one for each row, those of ignored rows 0; or their sum or mean, added in order.
Tensor reduced(const Arguments& a, const Wanted& wanted, int64_t reduction, const std::vector<double>& losses) {
  const bool wide = a.x.scalar_type() == ScalarType::Double;
  const int64_t rows = a.x.size(0);
  Tensor result = new_empty(a.x, &rows, reduction == kNone ? 1 : 0, wide ? ScalarType::Double : ScalarType::Float);
  void* to = result.mutable_data_ptr();
  const auto put = [&](int64_t i, double value) {
    if (wide)
      static_cast<double*>(to)[i] = value;
    else
      static_cast<float*>(to)[i] = float(value);
  };
  if (reduction == kNone) {
    for (int64_t r = 0; r < rows; ++r) put(r, 0);
    for (int64_t i = 0; i < wanted.count(); ++i) put(wanted.rows[size_t(i)], losses[size_t(i)]);
  } else {
    const double sum = std::accumulate(losses.begin(), losses.end(), 0.0);
    put(0, reduction == kMean ? sum / double(wanted.count()) : sum);  // NaN of no rows
  }
  return result;
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Loss and z-loss, and the gradients of the sum of all rows' losses. x is [rows, in].
Five fused_linear_cross_entropy(const TensorRef& x, const TensorRef& weight, const TensorRef& target,
                                const OptionalTensor& bias, int64_t ignore_index, double label_smoothing,
                                double softcap, double z_loss, int64_t reduction, bool for_x, bool for_weight,
                                bool for_bias) {
  const Arguments a{x, weight, target, bias, ignore_index, label_smoothing, softcap, z_loss};
  const Wanted wanted = checked(a);
  Gradients gradients(a, for_x, for_weight, for_bias);
  const Losses losses = run(a, wanted, nullptr, &gradients, for_x, for_weight, for_bias);
  return {reduced(a, wanted, reduction, losses.loss), reduced(a, wanted, reduction, losses.z_loss), gradients.x,
          gradients.weight, gradients.bias};
}

using Three = std::tuple<Tensor, Tensor, Tensor>;

// The gradients of the sum of dloss[r] times the loss of row r.
Three fused_linear_cross_entropy_bwd(const TensorRef& dloss, const TensorRef& x, const TensorRef& weight,
                                     const TensorRef& target, const OptionalTensor& bias, int64_t ignore_index,
                                     double label_smoothing, double softcap, double z_loss, bool for_x, bool for_weight,
                                     bool for_bias) {
  const Arguments a{x, weight, target, bias, ignore_index, label_smoothing, softcap, z_loss};
  const Wanted wanted = checked(a);
  GK_CHECK_VALUE(dloss.dim() == 1 && dloss.size(0) == x.size(0), kOp, "dloss: expected [", x.size(0), "], got shape ",
                 shape_of(dloss));
  const Dtype dtype = float_dtype(kOp, "dloss", dloss);
  GK_CHECK_TYPE(dtype == Dtype::f32 || dtype == Dtype::f64, kOp, "dloss: expected float32 or float64, got ",
                dtype_name(dloss.scalar_type()));
  std::vector<double> weights;
  for (const int64_t r : wanted.rows) {
    const int64_t at = r * dloss.stride(0);
    weights.push_back(dtype == Dtype::f64 ? dloss.data_as<double>()[at] : dloss.data_as<float>()[at]);
  }
  Gradients gradients(a, for_x, for_weight, for_bias);
  run(a, wanted, weights.data(), &gradients, for_x, for_weight, for_bias);
  return {gradients.x, gradients.weight, gradients.bias};
}

}  // namespace
}  // namespace genai_kernels

GK_CPU_OP(fused_linear_cross_entropy, genai_kernels::fused_linear_cross_entropy,
          "(Tensor x, Tensor weight, Tensor target, Tensor? bias, int ignore_index, float label_smoothing, "
          "float softcap, float z_loss, int reduction, bool for_x, bool for_weight, bool for_bias) "
          "-> (Tensor, Tensor, Tensor, Tensor, Tensor)")
GK_CPU_OP(fused_linear_cross_entropy_bwd, genai_kernels::fused_linear_cross_entropy_bwd,
          "(Tensor dloss, Tensor x, Tensor weight, Tensor target, Tensor? bias, int ignore_index, "
          "float label_smoothing, float softcap, float z_loss, bool for_x, bool for_weight, bool for_bias) "
          "-> (Tensor, Tensor, Tensor)")
