// What the host of cfg_step hands to its kernels.
#pragma once
#include "core/dtype.h"
#include "core/noise.h"
#include "core/samples.h"

namespace genai_kernels {

// 1 where a pixel is the sampler's, 0 where it is known. Strides are 0 where it is the same for all.
struct StepMask {
  void* data = nullptr;
  int64_t batch_stride = 0, channel_stride = 0, pixels = 1;
  bool is_bool = false;  // else the dtype of x
};

// The numbers of a step; genai_kernels/ops/cfg_step/coefficients.py says what they mean.
struct StepNumbers {
  double x0_from_x, x0_from_model, clip;
  double x, model, x0, previous_x0, noise, known, known_noise;
};

struct CfgStepParams {
  Dtype dtype, model_dtype;  // of x and everything like it; of model and uncond
  int64_t batch;
  SamplePieces pieces;  // what the work is handed out in
  Samples x, model, uncond, previous_x0, noise, known, known_noise;
  StepMask mask;
  Samples next, x0;
  const int64_t* seeds;  // of the samples, or null
  int64_t seed_stride;
  uint32_t offset;
  double guidance;
  const double* factors;  // of the guided model output of each sample, or null
  StepNumbers numbers;
};

// Over pieces [begin, end): sums[piece][4] of a, a^2, b, b^2, a the conditional and b the guided output less their
// first elements in the sample.
void cfg_step_sums_kernel(const CfgStepParams& p, double* sums, int64_t begin, int64_t end);
void cfg_step_kernel(const CfgStepParams& p, int64_t begin, int64_t end);

}  // namespace genai_kernels
