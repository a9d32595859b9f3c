// What forward and backward share: the numbers of each channel. Included inside an instruction-set region after
// group_activation.h and staged_row.h.
//
//   x^ = (x - mean) rstd,   z = x^ A + B,   A = weight (1 + scale),   B = bias (1 + scale) + shift,   y = act(z)

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

GK_INLINE Parameter at_sample(const SampleParameter& p, int64_t n, int64_t channel) {
  Parameter row = p.row;
  const int64_t bytes = row.dtype == Dtype::f64 ? 8 : row.dtype == Dtype::f32 ? 4 : 2;
  row.data = static_cast<const char*>(row.data) + (n * p.batch_stride + channel * row.stride) * bytes;
  return row;
}

// One number for each channel, in the compute type. What rounding the mean loses is kept: with mean/std = 100 it would
// cost 50 units in the last place of x^.
template <class C>
class Affine {
 public:
  C *center, *rstd, *rest;  // x^ = (x - center) rstd + rest
  C *alpha, *beta;          // z = (x - center) alpha + beta
  C* factor;                // A
  C *mean_g, *pull;         // backward: dx = ((dz A - mean_g) + x^ pull) rstd

  // kGroupNormScratch doubles for each channel; the first half of them is used here.
  Affine(const GroupNormParams& p, double* scratch) : p_(p) {
    const int64_t n = p.channels;
    weight_ = stage_parameter<double>(p.weight, n, 1, scratch);
    bias_ = stage_parameter<double>(p.bias, n, 0, scratch + n);
    own_scale_ = scratch + 2 * n;
    own_shift_ = scratch + 3 * n;
    C* numbers = reinterpret_cast<C*>(scratch + 4 * n);
    C** const mine[] = {&center, &rstd, &rest, &alpha, &beta, &factor, &mean_g, &pull};
    for (int i = 0; i < 8; ++i) *mine[i] = numbers + i * n;
  }

  // The numbers of the slab's channels, from stats.
  void set(const GroupSlab& slab) {
    const int64_t width = p_.group_channels(), begin = slab.group_begin * width, end = slab.group_end * width;
    const double* scale = own_parameter(p_.scale, slab.n, begin, end, own_scale_);
    const double* shift = own_parameter(p_.shift, slab.n, begin, end, own_shift_);
    for (int64_t g = slab.group_begin; g < slab.group_end; ++g) {
      const double* stats = p_.stats + 2 * (slab.n * p_.groups + g);
      const C rounded = C(stats[0]);
      const double lost = stats[0] - rounded;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const double a = scale ? weight_[c] * (1 + scale[c - begin]) : weight_[c];
        const double b = (scale ? bias_[c] * (1 + scale[c - begin]) : bias_[c]) + (shift ? shift[c - begin] : 0);
        center[c] = rounded;
        rstd[c] = C(stats[1]);
        rest[c] = C(-lost * stats[1]);
        alpha[c] = C(stats[1] * a);
        beta[c] = C(b - lost * stats[1] * a);
        factor[c] = C(a);
      }
    }
  }

 private:
  const GroupNormParams& p_;
  const double *weight_, *bias_;
  double *own_scale_, *own_shift_;

  static const double* own_parameter(const SampleParameter& from, int64_t n, int64_t begin, int64_t end,
                                     double* staged) {
    if (!from.row.data) return nullptr;
    return stage_parameter<double>(at_sample(from, n, begin), end - begin, 0, staged);
  }
};

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
