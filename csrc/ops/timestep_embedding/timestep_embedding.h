// What the host of timestep_embedding hands to its kernels.
#pragma once
#include "core/dtype.h"
#include "core/samples.h"

namespace genai_kernels {

struct TimestepEmbeddingParams {
  Dtype dtype;              // of the embedding
  const double* timesteps;  // at this distance
  int64_t timestep_stride;
  int64_t dim, half;  // of a row, and of its sines: dim / 2
  bool cosines_first;
  const double* turns;  // [half]: turns a unit of time, in whole registers
  Samples out;          // forward: what is written; backward: its gradient
  double* dtimesteps;   // backward
};

void timestep_embedding_fwd_kernel(const TimestepEmbeddingParams& p, int64_t begin, int64_t end);  // rows
void timestep_embedding_bwd_kernel(const TimestepEmbeddingParams& p, int64_t begin, int64_t end);

}  // namespace genai_kernels
