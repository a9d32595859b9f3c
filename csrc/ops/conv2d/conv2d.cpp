// Host of conv2d: schemas, checks, allocation; forward, and backward as further convolutions.
#include "ops/conv2d/conv2d.h"

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "host/direct_call.h"
#include "ops/conv2d/conv2d_host.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "conv2d";

// Everything but the tensors that are written.
struct Call {
  ConvParams p{};
  ConvNorm norm{};
  std::optional<Scratch> affine, offset;
};

void set_input(ConvParams& p, const TensorRef& x, const OptionalTensor& skip) {
  p.dtype = float_dtype(kOp, "x", x);
  GK_CHECK_VALUE(x.dim() == 4, kOp, "x: expected [batch, channels, height, width], got shape ", shape_of(x));
  p.batch = x.size(0);
  p.in = p.x_channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.x = readable_image(kOp, "x", x);
  if (!skip) return;
  check_same_dtype(kOp, "skip", *skip, "x", x);
  GK_CHECK_VALUE(skip->dim() == 4 && skip->size(0) == p.batch && skip->size(2) == p.height && skip->size(3) == p.width,
                 kOp, "skip: expected the shape of x, ", shape_of(x), ", but for the channels, got ", shape_of(*skip));
  p.in += skip->size(1);
  p.skip = readable_image(kOp, "skip", *skip);
}

void set_weight(ConvParams& p, const TensorRef& x, const TensorRef& weight, int64_t stride, int64_t left, int64_t right,
                int64_t top, int64_t bottom) {
  check_same_dtype(kOp, "weight", weight, "x", x);
  GK_CHECK_VALUE(weight.dim() == 4 && weight.size(1) == p.in, kOp, "weight: expected [out, ", p.in,
                 ", height, width] for the channels of x and skip, got shape ", shape_of(weight));
  p.weight_dtype = p.dtype;
  p.out = weight.size(0);
  p.kernel_height = weight.size(2);
  p.kernel_width = weight.size(3);
  GK_CHECK_VALUE(p.kernel_height >= 1 && p.kernel_width >= 1, kOp,
                 "weight: expected a kernel of at least one tap, got ", shape_of(weight));
  GK_CHECK_VALUE(stride >= 1, kOp, "stride: expected >= 1, got ", stride);
  GK_CHECK_VALUE(left >= 0 && right >= 0 && top >= 0 && bottom >= 0, kOp, "padding: expected >= 0, got (", left, ", ",
                 right, ", ", top, ", ", bottom, ")");
  const int64_t height = p.height + top + bottom - p.kernel_height, width = p.width + left + right - p.kernel_width;
  GK_CHECK_VALUE(height >= 0 && width >= 0, kOp, "x: expected with its padding at least the ", p.kernel_height, " by ",
                 p.kernel_width, " pixels of the kernel, got ", p.height + top + bottom, " by ",
                 p.width + left + right);
  p.stride = stride;
  p.pad_left = left;
  p.pad_top = top;
  p.out_height = height / stride + 1;
  p.out_width = width / stride + 1;
}

Parameter channel_parameter(const char* name, const OptionalTensor& t, int64_t channels) {
  if (!t) return {};
  GK_CHECK_VALUE(t->dim() == 1 && t->size(0) == channels, kOp, name, ": expected shape [", channels, "], got ",
                 shape_of(*t));
  return {t->data(), t->stride(0), float_dtype(kOp, name, *t)};
}
SampleParameter sample_parameter(const char* name, const OptionalTensor& t, int64_t batch, int64_t channels) {
  if (!t) return {};
  GK_CHECK_VALUE(t->dim() == 2 && t->size(0) == batch && t->size(1) == channels, kOp, name, ": expected shape [", batch,
                 ", ", channels, "], got ", shape_of(*t));
  return {{t->data(), t->stride(1), float_dtype(kOp, name, *t)}, t->stride(0)};
}

void set_norm(Call& call, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
              const OptionalTensor& shift, int64_t groups, double eps, int64_t activation) {
  if (groups == 0) return;
  ConvParams& p = call.p;
  GK_CHECK_VALUE(groups >= 1 && p.in % groups == 0, kOp, "num_groups: expected a divisor of the ", p.in,
                 " channels of x and skip, got ", groups);
  GK_CHECK_VALUE(eps >= 0, kOp, "eps: expected >= 0, got ", eps);
  GK_CHECK_VALUE(activation >= 0 && activation <= int64_t(GroupActivation::relu), kOp,
                 "activation: expected 0 to 4, got ", activation);
  p.activation = GroupActivation(activation);
  call.norm = {.dtype = p.dtype,
               .channels = p.in,
               .x_channels = p.x_channels,
               .groups = groups,
               .cells = ConvCells(p.height, p.width),
               .eps = eps,
               .from_moments = false,
               .x = nullptr,
               .skip = nullptr,
               .weight = channel_parameter("norm.weight", weight, p.in),
               .bias = channel_parameter("norm.bias", bias, p.in),
               .scale = sample_parameter("norm.scale", scale, p.batch, p.in),
               .shift = sample_parameter("norm.shift", shift, p.batch, p.in),
               .stats = nullptr,
               .affine = nullptr};
}

void check_stats(const TensorRef& stats, int64_t batch, int64_t groups) {
  GK_CHECK_VALUE(stats.scalar_type() == ScalarType::Double && stats.is_contiguous() && stats.dim() == 3 &&
                     stats.size(0) == batch && stats.size(1) == groups && stats.size(2) == 2,
                 kOp, "stats: expected a contiguous float64 [", batch, ", ", groups, ", 2], got ", shape_of(stats));
}

void run_norm_kernel(const ConvNorm& norm, int64_t batch) {
  parallel_for_elements(batch, 16 * norm.channels,
                        [&](int64_t begin, int64_t end) { conv_norm_kernel(norm, begin, end); });
}

// The statistics of x and skip to `stats`, and the numbers of the norm if there is room for them.
void run_stats(const ConvParams& p, ConvNorm norm, double* stats) {
  const Scratch x = moments_of(p, p.x, p.x_channels), skip = moments_of(p, p.skip, p.in - p.x_channels);
  norm.from_moments = true;
  norm.x = static_cast<double*>(x.get());
  norm.skip = static_cast<double*>(skip.get());
  norm.stats = stats;
  run_norm_kernel(norm, p.batch);
}

// The numbers of the norm, from the images themselves or from statistics that are there.
void run_norm(Call& call, const TensorRef& stats, bool compute) {
  ConvParams& p = call.p;
  call.affine.emplace(p.batch * 3 * p.in * compute_bytes(p.dtype));
  p.affine = call.norm.affine = call.affine->get();
  call.norm.stats = static_cast<double*>(stats.data());
  if (compute)
    run_stats(p, call.norm, call.norm.stats);
  else
    run_norm_kernel(call.norm, p.batch);
}

void set_offset(Call& call, const Parameter& bias, const SampleParameter& channel_bias) {
  ConvParams& p = call.p;
  call.offset.emplace(new_offset(p, bias, channel_bias));
  p.offset = call.offset->get();
}

int64_t checked_winograd(int64_t algorithm, const ConvWeight& w, int64_t stride) {
  GK_CHECK_VALUE(algorithm >= 0 && algorithm <= int64_t(ConvAlgorithm::winograd_f4), kOp,
                 "algorithm: expected 0 to 3, got ", algorithm);
  const ConvAlgorithm which = ConvAlgorithm(algorithm);
  if (which >= ConvAlgorithm::winograd)
    GK_CHECK_VALUE(can_winograd(which, w.dtype, w.height, w.width, stride), kOp, "algorithm: expected ",
                   which == ConvAlgorithm::winograd ? "winograd" : "winograd_f4",
                   " for kernels of 3 by 3 with stride 1 alone, and ",
                   which == ConvAlgorithm::winograd ? "not in float64" : "in float32", ", got ", w.height, " by ",
                   w.width, " with stride ", stride, which == ConvAlgorithm::winograd ? "" : " or another dtype");
  return winograd_side(which, w.dtype, w.out, w.in, w.height, w.width, stride);
}

Tensor conv2d_pack(const TensorRef& weight, int64_t stride, int64_t algorithm) {
  const Dtype dtype = float_dtype(kOp, "weight", weight);
  GK_CHECK_VALUE(weight.dim() == 4, kOp, "weight: expected [out, in, height, width], got shape ", shape_of(weight));
  const ConvWeight w = conv_weight(weight, dtype);
  const int64_t side = checked_winograd(algorithm, w, stride);
  Tensor packed = new_empty(weight, {packed_size(w, side)}, side ? ScalarType::Float : weight.scalar_type());
  if (side)
    pack_winograd(w, side, packed.mutable_data_ptr());
  else
    pack_weight(w, packed.mutable_data_ptr());
  return packed;
}

// The statistics of the norm of [x, skip], [batch, groups, 2].
Tensor conv2d_stats(const TensorRef& x, const OptionalTensor& skip, int64_t groups, double eps) {
  Call call;
  set_input(call.p, x, skip);
  GK_CHECK_VALUE(groups >= 1, kOp, "num_groups: expected >= 1, got ", groups);
  set_norm(call, {}, {}, {}, {}, groups, eps, 0);
  Tensor stats = new_empty(x, {call.p.batch, groups, 2}, ScalarType::Double);
  run_stats(call.p, call.norm, static_cast<double*>(stats.mutable_data_ptr()));
  return stats;
}

// y = direct where y is not finite, of two images that lie alike.
void replace_nonfinite(const Tensor& y, const Tensor& direct) {
  const auto replace = [&](auto exponent) {
    using Bits = decltype(exponent);
    Bits* to = static_cast<Bits*>(y.mutable_data_ptr());
    const Bits* from = static_cast<const Bits*>(direct.const_data_ptr());
    parallel_for_elements(y.numel(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if ((to[i] & exponent) == exponent) to[i] = from[i];
    });
  };
  if (y.scalar_type() == ScalarType::Float)
    replace(uint32_t(0x7f800000));
  else
    replace(uint16_t(y.scalar_type() == ScalarType::BFloat16 ? 0x7f80 : 0x7c00));
}

// (y, the statistics of the norm before it, those of y in groups for a norm after it)
std::tuple<Tensor, Tensor, Tensor> conv2d(const TensorRef& x, const OptionalTensor& skip, const TensorRef& weight,
                                          const OptionalTensor& packed, const OptionalTensor& bias,
                                          const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                          const OptionalTensor& scale, const OptionalTensor& shift,
                                          const OptionalTensor& channel_bias, const OptionalTensor& residual,
                                          int64_t groups, double eps, int64_t activation, int64_t stride, int64_t left,
                                          int64_t right, int64_t top, int64_t bottom, double output_scale,
                                          int64_t algorithm, bool channels_last, const OptionalTensor& given,
                                          int64_t next_groups, double next_eps) {
  Call call;
  ConvParams& p = call.p;
  set_input(p, x, skip);
  set_weight(p, x, weight, stride, left, right, top, bottom);
  set_norm(call, norm_weight, norm_bias, scale, shift, groups, eps, activation);
  const Parameter b = channel_parameter("bias", bias, p.out);
  const SampleParameter cb = sample_parameter("channel_bias", channel_bias, p.batch, p.out);
  if (residual) {
    check_same_dtype(kOp, "residual", *residual, "x", x);
    const int64_t expected[] = {p.batch, p.out, p.out_height, p.out_width};
    GK_CHECK_VALUE(std::equal(expected, expected + 4, residual->sizes().begin(), residual->sizes().end()), kOp,
                   "residual: expected the shape of the result, [", p.batch, ", ", p.out, ", ", p.out_height, ", ",
                   p.out_width, "], got ", shape_of(*residual));
    p.residual = conv_image(*residual);
  }
  if (given) check_stats(*given, p.batch, groups);
  GK_CHECK_VALUE(next_groups >= 0 && (next_groups == 0 || p.out % next_groups == 0), kOp,
                 "return_stats: expected a divisor of the ", p.out, " channels of the result, got ", next_groups);
  GK_CHECK_VALUE(next_eps >= 0, kOp, "return_stats.eps: expected >= 0, got ", next_eps);
  p.winograd = checked_winograd(algorithm, conv_weight(weight, p.dtype), stride);
  if (packed) {
    const int64_t size = packed_size(conv_weight(weight, p.dtype), p.winograd);
    GK_CHECK_VALUE(packed->scalar_type() == (p.winograd ? ScalarType::Float : weight.scalar_type()) &&
                       packed->dim() == 1 && packed->size(0) == size && packed->is_contiguous(),
                   kOp, "packed: expected what conv2d_pack makes of the weight with this stride and algorithm, [", size,
                   "], got ", shape_of(*packed));
  }
  p.scale = output_scale;
  Tensor y = new_conv_image(x, p.batch, p.out, p.out_height, p.out_width, channels_last);
  p.y = conv_image(y);
  Tensor stats = new_empty(x, {groups ? p.batch : 0, groups, 2}, ScalarType::Double);
  if (given) std::copy_n(given->data_as<double>(), given->numel(), static_cast<double*>(stats.mutable_data_ptr()));
  if (groups) run_norm(call, stats, !given);
  set_offset(call, b, cb);
  std::optional<PackedWeight> own;
  if (!packed) own.emplace(conv_weight(weight, p.weight_dtype), p.winograd);
  p.weight = packed ? packed->data() : own->get();
  // A pixel that is not finite spoils the tiles that see it. Those of their pixels that do not are summed directly: the
  // rest keeps its bits.
  const auto run = [&](const ConvMoments* of_y) {
    if (run_conv(p, of_y)) return;
    const PackedWeight plain(conv_weight(weight, p.weight_dtype));
    const Tensor direct = new_conv_image(x, p.batch, p.out, p.out_height, p.out_width, channels_last);
    ConvParams again = p;
    again.winograd = 0;
    again.weight = plain.get();
    again.y = conv_image(direct);
    run_conv(again);
    replace_nonfinite(y, direct);
    if (of_y) run_moments(*of_y, p.batch);
  };
  Tensor next = new_empty(x, {next_groups ? p.batch : 0, next_groups, 2}, ScalarType::Double);
  if (next_groups) {
    const ConvCells cells(p.out_height, p.out_width);
    const Scratch moments = new_moments(p.batch, p.out, cells);
    double* of_y = static_cast<double*>(moments.get());
    const ConvMoments of{p.dtype, readable_image(kOp, "y", y), p.out, cells, true, of_y};
    run(&of);
    run_norm_kernel({.dtype = p.dtype,
                     .channels = p.out,
                     .x_channels = p.out,
                     .groups = next_groups,
                     .cells = cells,
                     .eps = next_eps,
                     .from_moments = true,
                     .x = of_y,
                     .skip = nullptr,
                     .weight = {},
                     .bias = {},
                     .scale = {},
                     .shift = {},
                     .stats = static_cast<double*>(next.mutable_data_ptr()),
                     .affine = nullptr},
                    p.batch);
  } else {
    run(nullptr);
  }
  return {y, stats, next};
}

// ---- backward ----

// How one dimension of dx is a convolution of dy: pixels `phase`, phase + stride, ... see every stride-th tap from `tap` on.
struct Phase {
  int64_t phase, count, tap, taps, pad;
  Phase(int64_t phase, int64_t stride, int64_t kernel, int64_t before, int64_t length)
      : phase(phase),
        count(length > phase ? (length - phase + stride - 1) / stride : 0),
        tap((phase + before) % stride) {
    taps = tap < kernel ? (kernel - tap + stride - 1) / stride : 0;
    pad = taps - 1 - (phase + before - tap) / stride;
  }
};

// dx of the convolution `forward`, whose y is dy, to `dx`.
void run_dx(const ConvParams& forward, const TensorRef& weight, const ConvImage& dx) {
  Call call;
  ConvParams& p = call.p;
  p.dtype = p.weight_dtype = forward.dtype;
  p.batch = forward.batch;
  p.in = p.x_channels = forward.out;
  p.height = forward.out_height;
  p.width = forward.out_width;
  p.x = forward.y;
  p.out = forward.in;
  p.stride = 1;
  p.scale = forward.scale;
  set_offset(call, {}, {});
  const int64_t s = forward.stride;
  for (int64_t i = 0; i < s; ++i)
    for (int64_t j = 0; j < s; ++j) {
      const Phase rows(i, s, forward.kernel_height, forward.pad_top, forward.height);
      const Phase columns(j, s, forward.kernel_width, forward.pad_left, forward.width);
      p.out_height = rows.count;
      p.out_width = columns.count;
      p.kernel_height = rows.taps;
      p.kernel_width = columns.taps;
      p.pad_top = rows.pad;
      p.pad_left = columns.pad;
      const int64_t bytes = element_size(weight.scalar_type());
      p.y = {static_cast<char*>(dx.data) + (i * dx.row + j * dx.pixel) * bytes, dx.batch, dx.channel, dx.row * s,
             dx.pixel * s};
      if (p.taps() == 0) p.kernel_height = p.kernel_width = 0, p.pad_top = p.pad_left = 0;
      // the taps in the opposite order, input and output exchanged
      const ConvWeight of = conv_weight(weight, p.dtype);
      const int64_t last_row = rows.tap + s * (rows.taps - 1), last_column = columns.tap + s * (columns.taps - 1);
      const ConvWeight w{
          static_cast<const char*>(of.data) + (last_row * of.row_stride + last_column * of.column_stride) * bytes,
          p.dtype,
          p.out,
          p.in,
          p.kernel_height,
          p.kernel_width,
          of.in_stride,
          of.out_stride,
          -s * of.row_stride,
          -s * of.column_stride};
      const PackedWeight packed(w);
      p.weight = packed.get();
      run_conv(p);
    }
}

// (gradient of the input of the convolution itself, after its norm; dW; sums of dy over the pixels; and over the images)
std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_bwd(
    const TensorRef& dy, const TensorRef& x, const OptionalTensor& skip, const TensorRef& weight,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const OptionalTensor& scale,
    const OptionalTensor& shift, const TensorRef& stats, int64_t groups, int64_t activation, int64_t stride,
    int64_t left, int64_t right, int64_t top, int64_t bottom, double output_scale, bool input_grad, bool weight_grad,
    bool bias_grad, bool channels_last, bool weight_last) {
  Call call;
  ConvParams& p = call.p;
  set_input(p, x, skip);
  set_weight(p, x, weight, stride, left, right, top, bottom);
  set_norm(call, norm_weight, norm_bias, scale, shift, groups, 0, activation);
  check_same_dtype(kOp, "dy", dy, "x", x);
  const int64_t expected[] = {p.batch, p.out, p.out_height, p.out_width};
  GK_CHECK_VALUE(std::equal(expected, expected + 4, dy.sizes().begin(), dy.sizes().end()), kOp,
                 "dy: expected the shape of the result, [", p.batch, ", ", p.out, ", ", p.out_height, ", ", p.out_width,
                 "], got ", shape_of(dy));
  if (groups) check_stats(stats, p.batch, groups);
  p.y = readable_image(kOp, "dy", dy);
  p.scale = output_scale;
  const auto type = x.scalar_type();
  const int64_t none = 0;
  Tensor da =
      input_grad ? new_conv_image(x, p.batch, p.in, p.height, p.width, channels_last) : new_empty(x, &none, 1, type);
  Tensor dw = weight_grad ? new_conv_image(x, p.out, p.in, p.kernel_height, p.kernel_width, weight_last)
                          : new_empty(x, &none, 1, type);
  Tensor sums = new_empty(x, {bias_grad ? p.batch : 0, p.out}, ScalarType::Double);
  Tensor total = new_empty(x, {bias_grad ? p.out : 0}, ScalarType::Double);
  if (input_grad && da.numel()) run_dx(p, weight, conv_image(da));
  if (weight_grad) {
    if (groups) run_norm(call, stats, false);
    const TensorRef to(dw);
    run_weight_grad({p, to.data(), false, to.stride(0), to.stride(1), to.stride(2), to.stride(3)});
  }
  if (bias_grad) {
    ConvParams of = p;
    of.height = p.out_height;
    of.width = p.out_width;
    sum_pixels(of, p.y, p.out, output_scale, static_cast<double*>(sums.mutable_data_ptr()),
               static_cast<double*>(total.mutable_data_ptr()));
  }
  return {da, dw, sums, total};
}

}  // namespace
}  // namespace genai_kernels

GK_CPU_OP(conv2d_pack, genai_kernels::conv2d_pack, "(Tensor weight, int stride, int algorithm) -> Tensor")
GK_CPU_OP(conv2d, genai_kernels::conv2d,
          "(Tensor x, Tensor? skip, Tensor weight, Tensor? packed, Tensor? bias, Tensor? norm_weight, Tensor? "
          "norm_bias, Tensor? scale, Tensor? shift, Tensor? channel_bias, Tensor? residual, int num_groups, float eps, "
          "int activation, int stride, int left, int right, int top, int bottom, float output_scale, int "
          "algorithm, bool channels_last, Tensor? given_stats, int next_groups, float next_eps) -> (Tensor, Tensor, "
          "Tensor)")
GK_CPU_OP(conv2d_stats, genai_kernels::conv2d_stats, "(Tensor x, Tensor? skip, int num_groups, float eps) -> Tensor")
GK_CPU_OP(conv2d_bwd, genai_kernels::conv2d_bwd,
          "(Tensor dy, Tensor x, Tensor? skip, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, Tensor? scale, "
          "Tensor? shift, Tensor stats, int num_groups, int activation, int stride, int left, int right, int top, int "
          "bottom, float output_scale, bool input_grad, bool weight_grad, bool bias_grad, bool "
          "channels_last, bool "
          "weight_last) -> (Tensor, Tensor, Tensor, Tensor)")
