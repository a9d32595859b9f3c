// What the host of seeded_normal hands to its kernel.
#pragma once
#include "core/dtype.h"
#include "core/noise.h"
#include "core/samples.h"

namespace genai_kernels {

struct SeededNormalParams {
  Dtype dtype;
  SamplePieces pieces;
  const int64_t* seeds;
  int64_t seed_stride;
  uint32_t offset;
  Samples out;
};

void seeded_normal_kernel(const SeededNormalParams& p, int64_t begin, int64_t end);  // pieces [begin, end)

}  // namespace genai_kernels
