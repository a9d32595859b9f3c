// Host of group_norm_silu and group_norm_stats: schemas, checks, allocation, how the work is cut.
#include "ops/group_norm_silu/group_norm_silu.h"

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/parallel.h"
#include "host/rows.h"
#include "host/scratch.h"
#include "host/sum_blocks.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "group_norm_silu";
constexpr const char* kStats = "group_norm_stats";

// Of a slab of x, so that x and y together, or x, dy, dz and dx, stay in a cache of 2 MB; and the least of a pixel's channels
// that is worth a slab of its own: four cache lines.
constexpr int64_t kSlabBytes = 448 << 10, kLeastLineBytes = 256;

// True if the spatial dimensions are one with `inner` between pixels.
bool is_one_dimension(const TensorRef& t, int64_t inner) {
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) != inner) return false;
    inner *= t.size(d);
  }
  return true;
}

int64_t pixels_of(const TensorRef& t) {
  int64_t n = 1;
  for (int64_t d = 2; d < t.dim(); ++d) n *= t.size(d);
  return n;
}

// Between pixels, whatever their dimensions.
int64_t innermost_stride(const TensorRef& t) {
  for (int64_t d = t.dim() - 1; d >= 2; --d)
    if (t.size(d) != 1) return t.stride(d);
  return t.size(1);
}

enum class Order { channels_first, channels_last, other };
bool has_order(const TensorRef& t, Order order) {
  const int64_t pixels = pixels_of(t);
  if (order == Order::channels_first) return (t.size(1) == 1 || t.stride(1) == pixels) && is_one_dimension(t, 1);
  return (t.size(1) == 1 || t.stride(1) == 1) && is_one_dimension(t, innermost_stride(t));
}
// The order of an image without elements does not matter, and one pixel is both: then as a vector of channels.
Order order_of(const TensorRef& t) {
  if (t.numel() == 0 || has_order(t, Order::channels_first)) return Order::channels_first;
  return has_order(t, Order::channels_last) ? Order::channels_last : Order::other;
}

Image image(const char* op, const char* name, const TensorRef& t, const GroupNormParams& p) {
  GK_CHECK_VALUE(t.numel() == 0 || has_order(t, p.channels_last ? Order::channels_last : Order::channels_first), op,
                 name, ": expected the memory format of x, ",
                 p.channels_last ? "channels last" : "channels first, each sample contiguous", ", got other strides");
  return {t.data(), t.stride(0), p.channels_last ? innermost_stride(t) : p.pixels};
}
Image image_like(const char* name, const TensorRef& t, const TensorRef& x, const GroupNormParams& p) {
  check_same_dtype(kOp, name, t, "x", x);
  check_same_shape(kOp, name, t, "x", x);
  return image(kOp, name, t, p);
}

GroupNormParams checked_params(const char* op, const TensorRef& x, int64_t groups, double eps) {
  GroupNormParams p{};
  GK_CHECK_VALUE(x.dim() >= 2, op, "x: expected [batch, channels, ...], got shape ", shape_of(x));
  p.dtype = float_dtype(op, "x", x);
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.groups = groups;
  p.pixels = pixels_of(x);
  p.eps = eps;
  GK_CHECK_VALUE(groups >= 1 && p.channels % groups == 0, op, "num_groups: expected a divisor of the ", p.channels,
                 " channels of x, got ", groups);
  GK_CHECK_VALUE(eps >= 0, op, "eps: expected >= 0, got ", eps);
  const Order order = order_of(x);
  GK_CHECK_VALUE(order != Order::other, op,
                 "x: expected channels first, each sample contiguous, or channels last, got other strides");
  p.channels_last = order == Order::channels_last || p.pixels == 1;
  p.x = image(op, "x", x, p);
  return p;
}

Parameter channel_parameter(const char* name, const OptionalTensor& t, int64_t channels) {
  if (!t) return {};
  GK_CHECK_VALUE(t->dim() == 1 && t->size(0) == channels, kOp, name, ": expected shape [", channels,
                 "], the channels of x, got ", shape_of(*t));
  return {t->data(), t->stride(0), float_dtype(kOp, name, *t)};
}

SampleParameter sample_parameter(const char* name, const OptionalTensor& t, const GroupNormParams& p) {
  if (!t) return {};
  GK_CHECK_VALUE(t->dim() == 2 && t->size(0) == p.batch && t->size(1) == p.channels, kOp, name, ": expected shape [",
                 p.batch, ", ", p.channels, "], the samples and channels of x, got ", shape_of(*t));
  return {{t->data(), t->stride(1), float_dtype(kOp, name, *t)}, t->stride(0)};
}

void set_parameters(GroupNormParams& p, const OptionalTensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& scale, const OptionalTensor& shift, int64_t activation) {
  p.weight = channel_parameter("weight", weight, p.channels);
  p.bias = channel_parameter("bias", bias, p.channels);
  p.scale = sample_parameter("scale", scale, p);
  p.shift = sample_parameter("shift", shift, p);
  GK_CHECK_VALUE(activation >= 0 && activation <= int64_t(GroupActivation::relu), kOp,
                 "activation: expected 0 to 4, got ", activation);
  p.activation = GroupActivation(activation);
}

// Dense, in the memory format of x.
Tensor new_image(const TensorRef& x, const GroupNormParams& p) {
  if (!p.channels_last || p.pixels == 1) return new_like(x);
  int64_t strides[Rows::kMaxDims * 2];
  GK_CHECK_VALUE(x.dim() <= Rows::kMaxDims * 2, kOp, "x: expected at most 16 dimensions, got ", x.dim());
  int64_t step = p.channels;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    strides[d] = step;
    step *= x.size(d);
  }
  strides[1] = 1;
  strides[0] = step;
  return new_strided(x, x.sizes().data(), strides, x.dim(), x.scalar_type());
}

Tensor new_stats(const TensorRef& x, const GroupNormParams& p) {
  return new_empty(x, {p.batch, p.groups, 2}, ScalarType::Double);
}

int64_t element_bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether slabs are computed one by one, each staying in cache from its first pass to its last, or by all threads together
// pass by pass: where a slab is larger than the cache, or there are too few of them. The bits are the same.
struct Plan {
  GroupSlabs slabs;
  bool one_by_one;

  explicit Plan(const GroupNormParams& p) : slabs{p.groups, 1} {
    const int64_t threads = torch::stable::get_num_threads(), slabs_wanted = ceil_div(2 * threads, p.batch);
    const int64_t group_line = p.group_channels() * element_bytes(p.dtype), group = group_line * p.pixels;
    const bool is_small = p.batch * p.groups * group <= kSlabBytes / 8;
    if (p.channels_last) {
      const int64_t least = std::min(ceil_div(kLeastLineBytes, group_line), p.groups);
      slabs.width = std::clamp<int64_t>(kSlabBytes / group, 1, p.groups);
      slabs.width = std::min(slabs.width, std::max(least, p.groups / slabs_wanted));
      if (slabs.width > 8) slabs.width = slabs.width / 8 * 8;  // of at least 16 bytes a pixel: whole cache lines
      one_by_one = is_small || (slabs.width >= least && p.batch * slabs.per_sample() >= 2 * threads);
      if (!one_by_one || is_small) slabs.width = p.groups;
    } else {
      one_by_one = is_small || p.batch * p.groups >= 2 * threads;
    }
  }
  int64_t count(const GroupNormParams& p) const { return p.batch * slabs.per_sample(); }
  int64_t elements(const GroupNormParams& p) const { return slabs.width * p.group_elements(); }
};

int64_t pieces_of(const GroupNormParams& p) {
  return p.batch * (p.channels_last ? ceil_div(p.pixels, kPixelPiece) : p.channels);
}
int64_t piece_elements(const GroupNormParams& p) { return p.channels_last ? kPixelPiece * p.channels : p.pixels; }
int64_t scratch_bytes(const GroupNormParams& p) { return p.channels * kGroupNormScratch * int64_t(sizeof(double)); }
bool is_empty(const GroupNormParams& p) { return p.batch * p.channels * p.pixels == 0; }

// stats, by all threads together.
void run_moments(const GroupNormParams& p, const GroupSlabs& slabs) {
  const ReductionBlocks blocks(p);
  const Scratch memory(p.batch * blocks.count() * p.groups * int64_t(sizeof(Moments)));
  Moments* moments = static_cast<Moments*>(memory.get());
  const int64_t items = p.batch * slabs.per_sample() * blocks.count();
  parallel_for_elements(items, p.batch * p.channels * p.pixels / items, [&](int64_t begin, int64_t end) {
    const Scratch scratch(scratch_bytes(p));
    group_norm_moments_kernel(p, slabs, moments, begin, end, scratch.get());
  });
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t g = 0; g < p.groups; ++g) {
      Moments total;
      for (int64_t b = 0; b < blocks.count(); ++b) total.add(moments[(n * blocks.count() + b) * p.groups + g]);
      total.to_stats(p.eps, p.stats + 2 * (n * p.groups + g));
    }
}

void run_forward(const GroupNormParams& p) {
  if (is_empty(p)) return;
  const Plan plan(p);
  if (plan.one_by_one)
    return parallel_for_elements(plan.count(p), plan.elements(p), [&](int64_t begin, int64_t end) {
      const Scratch scratch(scratch_bytes(p));
      group_norm_fwd_kernel(p, plan.slabs, begin, end, scratch.get());
    });
  run_moments(p, plan.slabs);
  parallel_for_elements(pieces_of(p), piece_elements(p), [&](int64_t begin, int64_t end) {
    const Scratch scratch(scratch_bytes(p));
    group_norm_apply_kernel(p, begin, end, scratch.get());
  });
}

std::tuple<Tensor, Tensor> group_norm_silu(const TensorRef& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                           const OptionalTensor& scale, const OptionalTensor& shift, int64_t groups,
                                           double eps, int64_t activation) {
  GroupNormParams p = checked_params(kOp, x, groups, eps);
  set_parameters(p, weight, bias, scale, shift, activation);
  Tensor y = new_image(x, p), stats = new_stats(x, p);
  p.y = image(kOp, "out", y, p);
  p.stats = static_cast<double*>(stats.mutable_data_ptr());
  run_forward(p);
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> add_group_norm_silu(const TensorRef& x, const TensorRef& residual,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       const OptionalTensor& scale, const OptionalTensor& shift,
                                                       int64_t groups, double eps, int64_t activation) {
  GroupNormParams p = checked_params(kOp, x, groups, eps);
  set_parameters(p, weight, bias, scale, shift, activation);
  p.residual = image_like("residual", residual, x, p);
  Tensor y = new_image(x, p), sum = new_image(x, p), stats = new_stats(x, p);
  p.y = image(kOp, "out", y, p);
  p.sum = image(kOp, "new_residual", sum, p);
  p.stats = static_cast<double*>(stats.mutable_data_ptr());
  run_forward(p);
  return {y, sum, stats};
}

// The same with mean and rstd of their own, [batch, groups]: float32, or float64 for float64.
std::tuple<Tensor, Tensor> group_norm_stats(const TensorRef& x, int64_t groups, double eps) {
  GroupNormParams p = checked_params(kStats, x, groups, eps);
  const ScalarType type = p.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor mean = new_empty(x, {p.batch, groups}, type), rstd = new_empty(x, {p.batch, groups}, type);
  const int64_t count = p.batch * groups;
  const Scratch memory(2 * count * int64_t(sizeof(double)));
  p.stats = static_cast<double*>(memory.get());
  if (is_empty(p))
    for (int64_t i = 0; i < count; ++i) Moments{1, 0, 0}.to_stats(eps, p.stats + 2 * i);
  else
    run_moments(p, {p.groups, p.channels_last ? p.groups : 1});
  for (int64_t which = 0; which < 2; ++which) {
    void* to = (which ? rstd : mean).mutable_data_ptr();
    for (int64_t i = 0; i < count; ++i)
      if (type == ScalarType::Double)
        static_cast<double*>(to)[i] = p.stats[2 * i + which];
      else
        static_cast<float*>(to)[i] = float(p.stats[2 * i + which]);
  }
  return {mean, rstd};
}

// ---- backward ----

// Samples [begin, begin + count).
GroupNormParams part_of(GroupNormParams p, int64_t begin, int64_t count) {
  p.batch = count;
  for (Image* each : {&p.x, &p.dy, &p.dsum, &p.dx})
    if (each->data) each->data = static_cast<char*>(each->data) + begin * each->batch_stride * element_bytes(p.dtype);
  for (SampleParameter* each : {&p.scale, &p.shift})
    if (each->row.data)
      each->row.data =
          static_cast<const char*>(each->row.data) + begin * each->batch_stride * element_bytes(each->row.dtype);
  p.stats += 2 * begin * p.groups;
  return p;
}

// Of scale or shift, from sample n on.
SampleParameter part_of_gradient(const TensorRef& t, int64_t n) {
  const Dtype dtype = float_dtype(kOp, "scale", t);
  return {{static_cast<char*>(t.data()) + n * t.stride(0) * element_bytes(dtype), t.stride(1), dtype}, t.stride(0)};
}

void run_backward(const GroupNormParams& p, double* sums, const GroupNormParameterGrads& grads) {
  const Plan plan(p);
  if (plan.one_by_one) {
    const int64_t kept = plan.elements(p) * (p.dtype == Dtype::f64 ? 8 : 4);
    parallel_for_elements(plan.count(p), plan.elements(p), [&](int64_t begin, int64_t end) {
      const Scratch scratch(scratch_bytes(p) + kept);
      group_norm_bwd_kernel(p, plan.slabs, sums, begin, end, scratch.get());
    });
  } else {
    const int64_t blocks = p.channels_last ? ReductionBlocks(p).count() : 0;
    const Scratch partial(2 * p.batch * blocks * p.channels * int64_t(sizeof(double)));
    double* to = blocks ? static_cast<double*>(partial.get()) : sums;
    const int64_t items = p.batch * (blocks ? blocks : p.channels);
    parallel_for_elements(items, p.batch * p.channels * p.pixels / items, [&](int64_t begin, int64_t end) {
      const Scratch scratch(scratch_bytes(p));
      group_norm_sums_kernel(p, to, begin, end, scratch.get());
    });
    if (blocks)
      parallel_for_elements(p.batch * p.channels, 2 * blocks,
                            [&](int64_t begin, int64_t end) { group_norm_finish_kernel(p, to, sums, begin, end); });
    parallel_for_elements(pieces_of(p), piece_elements(p), [&](int64_t begin, int64_t end) {
      const Scratch scratch(scratch_bytes(p));
      group_norm_dx_kernel(p, sums, begin, end, scratch.get());
    });
  }
  parallel_for_elements(p.channels, 4 * p.batch, [&](int64_t begin, int64_t end) {
    const Scratch scratch((end - begin) * 3 * int64_t(sizeof(double)));
    group_norm_parameters_kernel(p, sums, grads, begin, end, scratch.get());
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_bwd(
    const TensorRef& dy, const OptionalTensor& dsum, const TensorRef& x, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& scale, const OptionalTensor& shift, const TensorRef& stats,
    int64_t groups, double eps, int64_t activation, bool weight_grad, bool bias_grad, bool scale_grad,
    bool shift_grad) {
  GroupNormParams p = checked_params(kOp, x, groups, eps);
  set_parameters(p, weight, bias, scale, shift, activation);
  p.dy = image_like("dy", dy, x, p);
  if (dsum) p.dsum = image_like("dsum", *dsum, x, p);
  GK_CHECK_TYPE(stats.scalar_type() == ScalarType::Double, kOp, "stats: expected float64, got ",
                dtype_name(stats.scalar_type()));
  GK_CHECK_VALUE(stats.dim() == 3 && stats.size(0) == p.batch && stats.size(1) == groups && stats.size(2) == 2 &&
                     stats.is_contiguous(),
                 kOp, "stats: expected a contiguous [", p.batch, ", ", groups, ", 2], got shape ", shape_of(stats));
  p.stats = static_cast<double*>(stats.data());
  const auto gradient = [&](const OptionalTensor& of, bool wanted) {
    return of && wanted ? new_like(*of) : new_empty(x, {0}, x.scalar_type());
  };
  Tensor dx = new_image(x, p), dw = gradient(weight, weight_grad), db = gradient(bias, bias_grad),
         dscale = gradient(scale, scale_grad), dshift = gradient(shift, shift_grad);
  const bool has_dw = weight && weight_grad, has_db = bias && bias_grad;
  p.dx = image(kOp, "dx", dx, p);

  const Scratch totals(2 * p.channels * int64_t(sizeof(double)));
  double* total = static_cast<double*>(totals.get());
  std::fill_n(total, 2 * p.channels, 0.0);
  GroupNormParameterGrads grads{has_dw ? total : nullptr, has_db ? total + p.channels : nullptr, {}, {}};
  // So that the sums stay small beside x where there are few pixels; parts are added in order.
  const int64_t part = std::clamp<int64_t>((1 << 19) / std::max<int64_t>(p.channels, 1), 16, 4096);
  const Scratch sums(2 * std::min(part, p.batch) * p.channels * int64_t(sizeof(double)));
  for (int64_t n = 0; n < p.batch; n += part) {
    const GroupNormParams some = part_of(p, n, std::min(part, p.batch - n));
    if (scale && scale_grad) grads.dscale = part_of_gradient(dscale, n);
    if (shift && shift_grad) grads.dshift = part_of_gradient(dshift, n);
    if (!is_empty(p)) run_backward(some, static_cast<double*>(sums.get()), grads);
  }
  if (is_empty(p))
    for (Tensor* each : {&dscale, &dshift}) torch::stable::zero_(*each);
  if (has_dw) sum_blocks(total, 1, dw);
  if (has_db) sum_blocks(total + p.channels, 1, db);
  return {dx, dw, db, dscale, dshift};
}

}  // namespace
}  // namespace genai_kernels

GK_CPU_OP(group_norm_silu, genai_kernels::group_norm_silu,
          "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int num_groups, float eps, "
          "int activation) -> (Tensor, Tensor)")
GK_CPU_OP(add_group_norm_silu, genai_kernels::add_group_norm_silu,
          "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int num_groups, "
          "float eps, int activation) -> (Tensor, Tensor, Tensor)")
GK_CPU_OP(group_norm_stats, genai_kernels::group_norm_stats,
          "(Tensor x, int num_groups, float eps) -> (Tensor, Tensor)")
GK_CPU_OP(group_norm_silu_bwd, genai_kernels::group_norm_silu_bwd,
          "(Tensor dy, Tensor? dsum, Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
          "Tensor stats, int num_groups, float eps, int activation, bool weight_grad, bool bias_grad, bool scale_grad, "
          "bool shift_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
