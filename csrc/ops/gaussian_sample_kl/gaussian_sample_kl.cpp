// Host of gaussian_sample_kl: schemas, checks, allocation, the parallel loops, the sums of the divergence.
#include "ops/gaussian_sample_kl/gaussian_sample_kl.h"

#include <tuple>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/parallel.h"
#include "host/samples.h"
#include "host/scratch.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "gaussian_sample_kl";

ScalarType kl_type(Dtype dtype) { return dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float; }

GaussianSampleParams checked_params(const TensorRef& mean, const TensorRef& logvar, const OptionalTensor& noise,
                                    const OptionalTensor& seed, int64_t offset, double least, double most) {
  GaussianSampleParams p{};
  p.dtype = float_dtype(kOp, "mean", mean);
  p.mean = samples_of(kOp, "mean", mean, "mean", mean);
  check_same_dtype(kOp, "logvar", logvar, "mean", mean);
  p.logvar = samples_of(kOp, "logvar", logvar, "mean", mean);
  p.noise = samples_like(kOp, "noise", noise, "mean", mean);
  GK_CHECK_VALUE(noise.has_value() != seed.has_value(), kOp, "seed: expected either it or noise, got ",
                 seed ? "both" : "neither");
  if (seed) {
    p.seeds = checked_seeds(kOp, *seed, mean.size(0));
    p.seed_stride = seed->stride(0);
  }
  p.offset = checked_offset(kOp, offset);
  GK_CHECK_VALUE(least <= most, kOp, "logvar_range: expected the smaller number first, got (", least, ", ", most, ")");
  p.least = least;
  p.most = most;
  p.pieces = {elements_of_sample(mean)};
  return p;
}

std::tuple<Tensor, Tensor> gaussian_sample_kl(const TensorRef& mean, const TensorRef& logvar,
                                              const OptionalTensor& noise, const OptionalTensor& seed, int64_t offset,
                                              double least, double most) {
  GaussianSampleParams p = checked_params(mean, logvar, noise, seed, offset, least, most);
  const int64_t batch = mean.size(0), pieces = p.pieces.per_sample();
  Tensor z = new_like(mean), kl = new_empty(mean, {batch}, kl_type(p.dtype));
  p.z = samples_of(kOp, "z", z, "mean", mean);
  const Scratch parts(batch * pieces * int64_t(sizeof(double)));
  double* part = static_cast<double*>(parts.get());
  if (z.numel() > 0)
    parallel_for_elements(batch * pieces, p.pieces.largest(),
                          [&](int64_t begin, int64_t end) { gaussian_sample_kl_fwd_kernel(p, part, begin, end); });
  void* to = kl.mutable_data_ptr();
  for (int64_t n = 0; n < batch; ++n) {
    double sum = 0;
    for (int64_t i = n * pieces; i < (n + 1) * pieces; ++i) sum += part[i];
    if (p.dtype == Dtype::f64)
      static_cast<double*>(to)[n] = sum;
    else
      static_cast<float*>(to)[n] = float(sum);
  }
  return {z, kl};
}

std::tuple<Tensor, Tensor, Tensor> gaussian_sample_kl_bwd(const TensorRef& mean, const TensorRef& logvar,
                                                          const OptionalTensor& dz, const OptionalTensor& dkl,
                                                          const OptionalTensor& noise, const OptionalTensor& seed,
                                                          int64_t offset, double least, double most, bool noise_grad) {
  GaussianSampleParams p = checked_params(mean, logvar, noise, seed, offset, least, most);
  p.dz = samples_like(kOp, "dz", dz, "mean", mean);
  if (dkl) {
    GK_CHECK_TYPE(dkl->scalar_type() == kl_type(p.dtype), kOp, "dkl: expected ", dtype_name(kl_type(p.dtype)), ", got ",
                  dtype_name(dkl->scalar_type()));
    GK_CHECK_VALUE(dkl->dim() == 1 && dkl->size(0) == mean.size(0), kOp, "dkl: expected [", mean.size(0),
                   "], got shape ", shape_of(*dkl));
    p.dkl = dkl->data();
    p.dkl_stride = dkl->stride(0);
  }
  const bool wants_noise = noise && noise_grad;
  Tensor dmean = new_like(mean), dlogvar = new_like(mean),
         dnoise = wants_noise ? new_like(mean) : new_empty(mean, {0}, mean.scalar_type());
  if (dmean.numel() == 0) return {dmean, dlogvar, dnoise};
  p.dmean = samples_of(kOp, "dmean", dmean, "mean", mean);
  p.dlogvar = samples_of(kOp, "dlogvar", dlogvar, "mean", mean);
  if (wants_noise) p.dnoise = samples_of(kOp, "dnoise", dnoise, "mean", mean);
  parallel_for_elements(mean.size(0) * p.pieces.per_sample(), p.pieces.largest(),
                        [&](int64_t begin, int64_t end) { gaussian_sample_kl_bwd_kernel(p, begin, end); });
  return {dmean, dlogvar, dnoise};
}

}  // namespace
}  // namespace genai_kernels

GK_CPU_OP(gaussian_sample_kl, genai_kernels::gaussian_sample_kl,
          "(Tensor mean, Tensor logvar, Tensor? noise, Tensor? seed, int offset, float least, float most) "
          "-> (Tensor, Tensor)")
GK_CPU_OP(gaussian_sample_kl_bwd, genai_kernels::gaussian_sample_kl_bwd,
          "(Tensor mean, Tensor logvar, Tensor? dz, Tensor? dkl, Tensor? noise, Tensor? seed, int offset, float least, "
          "float most, bool noise_grad) -> (Tensor, Tensor, Tensor)")
