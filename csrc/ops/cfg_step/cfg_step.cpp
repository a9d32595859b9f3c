// Host of cfg_step: schema, checks, allocation, the factors of guidance_rescale, the parallel loops.
#include "ops/cfg_step/cfg_step.h"

#include <cmath>
#include <tuple>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/parallel.h"
#include "host/samples.h"
#include "host/scratch.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "cfg_step";

StepMask mask_of(const TensorRef& t, const TensorRef& x) {
  StepMask mask;
  mask.is_bool = t.scalar_type() == ScalarType::Bool;
  GK_CHECK_TYPE(mask.is_bool || t.scalar_type() == x.scalar_type(), kOp, "mask: expected bool or the dtype of x, ",
                dtype_name(x.scalar_type()), ", got ", dtype_name(t.scalar_type()));
  bool fits = t.dim() == x.dim() && (t.numel() == 0 || is_dense_from(t, 2));
  for (int64_t d = 0; fits && d < t.dim(); ++d) fits = t.size(d) == x.size(d) || (d < 2 && t.size(d) == 1);
  GK_CHECK_VALUE(fits, kOp, "mask: expected the shape of x, ", shape_of(x),
                 ", or 1 in place of the batch and the channels, contiguous over the pixels, got ", shape_of(t));
  mask.data = t.data();
  mask.batch_stride = t.size(0) == 1 ? 0 : t.stride(0);
  if (t.dim() > 1 && t.size(1) > 1) mask.channel_stride = t.stride(1);
  for (int64_t d = 2; d < x.dim(); ++d) mask.pixels *= x.size(d);
  return mask;
}

// What guidance_rescale makes of the guided output: r std(c) / std(m) + 1 - r for each sample, deviations with n - 1. The
// sums of the pieces are added in order, around the first element of the sample.
void set_factors(const CfgStepParams& p, double rescale, double* factors) {
  const int64_t pieces = p.pieces.per_sample(), count = p.batch * pieces;
  const Scratch memory(4 * count * int64_t(sizeof(double)));
  double* sums = static_cast<double*>(memory.get());
  parallel_for_elements(count, p.pieces.largest(),
                        [&](int64_t begin, int64_t end) { cfg_step_sums_kernel(p, sums, begin, end); });
  for (int64_t n = 0; n < p.batch; ++n) {
    double total[4] = {};
    for (int64_t i = n * pieces; i < (n + 1) * pieces; ++i)
      for (int s = 0; s < 4; ++s) total[s] += sums[4 * i + s];
    const double size = double(p.pieces.elements);
    const auto squares = [&](int s) { return std::fmax(total[s + 1] - total[s] * total[s] / size, 0.0); };
    // fmax would turn a NaN into 0
    const bool is_nan = std::isnan(total[1] + total[3]);
    factors[n] =
        is_nan ? NAN : rescale * std::sqrt((squares(0) / (size - 1)) / (squares(2) / (size - 1))) + 1 - rescale;
  }
}

std::tuple<Tensor, Tensor> cfg_step(const TensorRef& x, const TensorRef& model_output, const OptionalTensor& uncond,
                                    const OptionalTensor& previous_x0, const OptionalTensor& noise,
                                    const OptionalTensor& seeds, const OptionalTensor& known,
                                    const OptionalTensor& mask, const OptionalTensor& known_noise, int64_t offset,
                                    double guidance, double rescale, double x0_from_x, double x0_from_model,
                                    double clip, double of_x, double of_model, double of_x0, double of_previous,
                                    double of_noise, double of_known, double of_known_noise, bool return_x0) {
  CfgStepParams p{};
  p.numbers = {x0_from_x, x0_from_model, clip, of_x, of_model, of_x0, of_previous, of_noise, of_known, of_known_noise};
  p.dtype = float_dtype(kOp, "x", x);
  p.model_dtype = float_dtype(kOp, "model_output", model_output);
  const bool narrower = p.dtype == Dtype::f32 && p.model_dtype != Dtype::f64;
  GK_CHECK_TYPE(p.model_dtype == p.dtype || narrower, kOp, "model_output: expected the dtype of x, ",
                dtype_name(x.scalar_type()), ", or a narrower one beside float32, got ",
                dtype_name(model_output.scalar_type()));
  p.x = samples_of(kOp, "x", x, "x", x);
  p.batch = x.size(0);
  p.pieces = {elements_of_sample(x)};
  p.model = samples_of(kOp, "model_output", model_output, "x", x);
  if (uncond) {
    check_same_dtype(kOp, "uncond", *uncond, "model_output", model_output);
    p.uncond = samples_of(kOp, "uncond", *uncond, "x", x);
  }
  GK_CHECK_VALUE(uncond || (guidance == 1 && rescale == 0), kOp,
                 "uncond: expected the output without the condition beside a guidance_scale or guidance_rescale, "
                 "got None");
  p.previous_x0 = samples_like(kOp, "previous_x0", previous_x0, "x", x);
  GK_CHECK_VALUE(previous_x0 || of_previous == 0, kOp,
                 "previous_x0: expected x0 of the step before, which this step needs, got None");
  p.noise = samples_like(kOp, "noise", noise, "x", x);
  p.known = samples_like(kOp, "known", known, "x", x);
  p.known_noise = samples_like(kOp, "known_noise", known_noise, "x", x);
  GK_CHECK_VALUE(known.has_value() == mask.has_value(), kOp, "mask: expected it together with known");
  GK_CHECK_VALUE(known || !known_noise, kOp, "known_noise: expected known beside it, got None");
  if (mask) p.mask = mask_of(*mask, x);
  const bool draws = (of_noise != 0 && !noise) || (known && of_known_noise != 0 && !known_noise);
  GK_CHECK_VALUE(!draws || seeds, kOp, "seed: expected one for each sample, or noise, for this step, got None");
  if (seeds) {
    p.seeds = checked_seeds(kOp, *seeds, p.batch);
    p.seed_stride = seeds->stride(0);
  }
  p.offset = checked_offset(kOp, offset);
  p.guidance = guidance;

  Tensor next = new_like(x), x0 = return_x0 ? new_like(x) : new_empty(x, {0}, x.scalar_type());
  p.next = samples_of(kOp, "out", next, "x", x);
  if (return_x0) p.x0 = samples_of(kOp, "x0", x0, "x", x);
  if (next.numel() == 0) return {next, x0};
  const Scratch factors(rescale != 0 ? p.batch * int64_t(sizeof(double)) : 0);
  if (rescale != 0) {
    set_factors(p, rescale, static_cast<double*>(factors.get()));
    p.factors = static_cast<const double*>(factors.get());
  }
  parallel_for_elements(p.batch * p.pieces.per_sample(), p.pieces.largest(),
                        [&](int64_t begin, int64_t end) { cfg_step_kernel(p, begin, end); });
  return {next, x0};
}

}  // namespace
}  // namespace genai_kernels

GK_CPU_OP(cfg_step, genai_kernels::cfg_step,
          "(Tensor x, Tensor model_output, Tensor? uncond, Tensor? previous_x0, Tensor? noise, Tensor? seed, "
          "Tensor? known, Tensor? mask, Tensor? known_noise, int offset, float guidance_scale, float guidance_rescale, "
          "float x0_from_x, float x0_from_model, float clip, float of_x, float of_model, float of_x0, "
          "float of_previous_x0, float of_noise, float of_known, float of_known_noise, bool return_x0) "
          "-> (Tensor, Tensor)")
