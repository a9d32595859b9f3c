// What the host of gaussian_sample_kl hands to its kernels.
#pragma once
#include "core/dtype.h"
#include "core/noise.h"
#include "core/samples.h"

namespace genai_kernels {

struct GaussianSampleParams {
  Dtype dtype;
  SamplePieces pieces;
  Samples mean, logvar;
  Samples noise;         // or null, and then
  const int64_t* seeds;  // of the samples
  int64_t seed_stride;
  uint32_t offset;
  double least, most;  // of logvar
  Samples z;           // forward
  // backward
  Samples dz;       // or null
  const void* dkl;  // [batch], float32 or float64 for float64; or null
  int64_t dkl_stride;
  Samples dmean, dlogvar, dnoise;  // dnoise only where it is wanted
};

// Over pieces [begin, end): z, and of each piece the sum of its terms of the divergence.
void gaussian_sample_kl_fwd_kernel(const GaussianSampleParams& p, double* kl, int64_t begin, int64_t end);
void gaussian_sample_kl_bwd_kernel(const GaussianSampleParams& p, int64_t begin, int64_t end);

}  // namespace genai_kernels
