// Host of up_conv2d: a 3 x 3 convolution of a map of twice the size, as four of 2 x 2 on the map itself; and backward.
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "host/direct_call.h"
#include "ops/conv2d/conv2d_host.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "up_conv2d";
constexpr int kFour = 2;  // UpTaps of backward

struct Sizes {
  Dtype dtype;
  int64_t batch, in, height, width, out;
};

Sizes checked(const TensorRef& x, const TensorRef& weight) {
  const Dtype dtype = float_dtype(kOp, "x", x);
  GK_CHECK_VALUE(x.dim() == 4, kOp, "x: expected [batch, channels, height, width], got shape ", shape_of(x));
  check_same_dtype(kOp, "weight", weight, "x", x);
  GK_CHECK_VALUE(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 3 && weight.size(3) == 3, kOp,
                 "weight: expected [out, ", x.size(1), ", 3, 3] for the channels of x, got shape ", shape_of(weight));
  return {dtype, x.size(0), x.size(1), x.size(2), x.size(3), weight.size(0)};
}

// The sums of a weight's taps, contiguous in the compute type.
class UpWeight {
 public:
  UpWeight(const TensorRef& weight, Dtype dtype, const UpTaps& rows, const UpTaps& columns)
      : w_(conv_weight(weight, dtype)), memory_(w_.out * w_.in * rows.count * columns.count * compute_bytes(dtype)) {
    parallel_for_elements(w_.out, w_.in * 9, [&](int64_t begin, int64_t end) {
      conv_up_weight_kernel(w_, rows, columns, memory_.get(), begin, end);
    });
    const int64_t taps = rows.count * columns.count;
    w_ = {memory_.get(), dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32,
          w_.out,        w_.in,
          rows.count,    columns.count,
          w_.in * taps,  taps,
          columns.count, 1};
  }
  const ConvWeight& get() const { return w_; }

 private:
  ConvWeight w_;
  Scratch memory_;
};

int64_t phase_bytes(const Sizes& n) { return conv_packed_size(n.out, n.in, 4) * compute_bytes(n.dtype); }

void pack_phases(const TensorRef& weight, const Sizes& n, void* packed) {
  for (int i = 0; i < 4; ++i)
    pack_weight(UpWeight(weight, n.dtype, UpTaps(i / 2), UpTaps(i % 2)).get(),
                static_cast<char*>(packed) + i * phase_bytes(n));
}

Tensor up_conv2d_pack(const TensorRef& weight) {
  const Dtype dtype = float_dtype(kOp, "weight", weight);
  GK_CHECK_VALUE(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, kOp,
                 "weight: expected [out, in, 3, 3], got shape ", shape_of(weight));
  const Sizes n{dtype, 0, weight.size(1), 0, 0, weight.size(0)};
  Tensor packed = new_empty(weight, {4 * conv_packed_size(n.out, n.in, 4)}, compute_type(dtype));
  pack_phases(weight, n, packed.mutable_data_ptr());
  return packed;
}

// What forward and the gradient of x have in common.
ConvParams params_of(const Sizes& n) {
  ConvParams p{};
  p.dtype = n.dtype;
  p.weight_dtype = n.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  p.batch = n.batch;
  p.out_height = n.height;
  p.out_width = n.width;
  p.scale = 1;
  return p;
}

Tensor up_conv2d(const TensorRef& x, const TensorRef& weight, const OptionalTensor& packed, const OptionalTensor& bias,
                 bool channels_last) {
  const Sizes n = checked(x, weight);
  ConvParams p = params_of(n);
  p.in = p.x_channels = n.in;
  p.height = n.height;
  p.width = n.width;
  p.out = n.out;
  p.kernel_height = p.kernel_width = 2;
  p.stride = 1;
  p.x = readable_image(kOp, "x", x);
  Parameter b;
  if (bias) {
    GK_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == n.out, kOp, "bias: expected shape [", n.out, "], got ",
                   shape_of(*bias));
    b = {bias->data(), bias->stride(0), float_dtype(kOp, "bias", *bias)};
  }
  const int64_t size = 4 * conv_packed_size(n.out, n.in, 4);
  if (packed)
    GK_CHECK_VALUE(packed->scalar_type() == compute_type(n.dtype) && packed->dim() == 1 && packed->size(0) == size &&
                       packed->is_contiguous(),
                   kOp, "packed: expected what up_conv2d_pack makes of the weight, [", size, "], got ",
                   shape_of(*packed));
  Tensor y = new_conv_image(x, n.batch, n.out, 2 * n.height, 2 * n.width, channels_last);
  const Scratch offset = new_offset(p, b, {});
  p.offset = offset.get();
  std::optional<Scratch> own;
  const char* weights = packed ? packed->data_as<char>() : nullptr;
  if (!packed) {
    own.emplace(4 * phase_bytes(n));
    pack_phases(weight, n, own->get());
    weights = static_cast<const char*>(own->get());
  }
  const ConvImage all = conv_image(y);
  const int64_t bytes = element_size(x.scalar_type());
  for (int i = 0; i < 4; ++i) {
    p.pad_top = i / 2 == 0;
    p.pad_left = i % 2 == 0;
    p.weight = weights + i * phase_bytes(n);
    p.y = {static_cast<char*>(all.data) + (i / 2 * all.row + i % 2 * all.pixel) * bytes, all.batch, all.channel,
           2 * all.row, 2 * all.pixel};
    run_conv(p);
  }
  return y;
}

// (dx, the gradient of the sums of four taps [in, out, 4, 4] in the compute type, that of the bias)
std::tuple<Tensor, Tensor, Tensor> up_conv2d_bwd(const TensorRef& dy, const TensorRef& x, const TensorRef& weight,
                                                 bool x_grad, bool weight_grad, bool bias_grad, bool channels_last) {
  const Sizes n = checked(x, weight);
  check_same_dtype(kOp, "dy", dy, "x", x);
  GK_CHECK_VALUE(dy.dim() == 4 && dy.size(0) == n.batch && dy.size(1) == n.out && dy.size(2) == 2 * n.height &&
                     dy.size(3) == 2 * n.width,
                 kOp, "dy: expected the shape of the result, [", n.batch, ", ", n.out, ", ", 2 * n.height, ", ",
                 2 * n.width, "], got ", shape_of(dy));
  ConvParams p = params_of(n);  // of dx, a convolution of dy
  p.in = p.x_channels = n.out;
  p.height = 2 * n.height;
  p.width = 2 * n.width;
  p.out = n.in;
  p.kernel_height = p.kernel_width = 4;
  p.stride = 2;
  p.pad_top = p.pad_left = 1;
  p.x = readable_image(kOp, "dy", dy);
  const int64_t none = 0;
  Tensor dx = x_grad ? new_conv_image(x, n.batch, n.in, n.height, n.width, channels_last)
                     : new_empty(x, &none, 1, x.scalar_type());
  const int64_t shape[] = {weight_grad ? n.in : 0, n.out, 4, 4};
  Tensor dw = new_empty(x, shape, 4, compute_type(n.dtype));
  Tensor db = new_empty(x, {bias_grad ? n.out : 0}, ScalarType::Double);
  if (x_grad) {
    const UpWeight sums(weight, n.dtype, UpTaps(kFour), UpTaps(kFour));
    ConvWeight w = sums.get();  // [out, in, 4, 4], as it is read from input to output
    std::swap(w.out, w.in);
    std::swap(w.out_stride, w.in_stride);
    const PackedWeight packed(w);
    const Scratch offset = new_offset(p, {}, {});
    p.weight = packed.get();
    p.offset = offset.get();
    p.y = conv_image(dx);
    run_conv(p);
  }
  if (weight_grad) {
    p.y = readable_image(kOp, "x", x);
    run_weight_grad({p, dw.mutable_data_ptr(), true, 16 * n.out, 16, 4, 1});
  }
  if (bias_grad) {
    const Scratch each(n.batch * n.out * int64_t(sizeof(double)));
    sum_pixels(p, p.x, n.out, 1, static_cast<double*>(each.get()), static_cast<double*>(db.mutable_data_ptr()));
  }
  return {dx, dw, db};
}

}  // namespace
}  // namespace genai_kernels

GK_CPU_OP(up_conv2d_pack, genai_kernels::up_conv2d_pack, "(Tensor weight) -> Tensor")
GK_CPU_OP(up_conv2d, genai_kernels::up_conv2d,
          "(Tensor x, Tensor weight, Tensor? packed, Tensor? bias, bool channels_last) -> Tensor")
GK_CPU_OP(up_conv2d_bwd, genai_kernels::up_conv2d_bwd,
          "(Tensor dy, Tensor x, Tensor weight, bool x_grad, bool weight_grad, bool bias_grad, bool channels_last) -> "
          "(Tensor, Tensor, Tensor)")
