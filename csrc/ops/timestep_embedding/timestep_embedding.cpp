// Host of timestep_embedding: schemas, checks, the frequencies, the parallel loop over timesteps.
#include "ops/timestep_embedding/timestep_embedding.h"

#include <cmath>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/parallel.h"
#include "host/samples.h"
#include "host/scratch.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "timestep_embedding";
constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16,
                                 ScalarType::Half};  // in the order of Dtype
constexpr int64_t kWidest = 16;                      // lanes of any register

struct Frequencies {
  double shift, scale, max_period;
};

TimestepEmbeddingParams checked_params(const TensorRef& timesteps, int64_t dim, bool cosines_first,
                                       const Frequencies& f) {
  GK_CHECK_TYPE(timesteps.scalar_type() == ScalarType::Double, kOp, "timesteps: expected float64, got ",
                dtype_name(timesteps.scalar_type()));
  GK_CHECK_VALUE(timesteps.dim() == 1, kOp, "timesteps: expected [batch], got shape ", shape_of(timesteps));
  GK_CHECK_VALUE(dim >= 1, kOp, "dim: expected at least 1, got ", dim);
  GK_CHECK_VALUE(f.max_period > 0, kOp, "max_period: expected more than 0, got ", f.max_period);
  TimestepEmbeddingParams p{};
  p.timesteps = timesteps.data_as<double>();
  p.timestep_stride = timesteps.stride(0);
  p.dim = dim;
  p.half = dim / 2;
  p.cosines_first = cosines_first;
  GK_CHECK_VALUE(p.half == 0 || double(p.half) != f.shift, kOp, "downscale_freq_shift: expected another number than ",
                 p.half, ", the half of dim, which it is taken from, got ", f.shift);
  return p;
}

// In whole registers: what a kernel reads past the last is not stored.
int64_t turns_bytes(const TimestepEmbeddingParams& p) {
  return (p.half + kWidest - 1) / kWidest * kWidest * int64_t(sizeof(double));
}
void set_turns(TimestepEmbeddingParams& p, const Frequencies& f, const Scratch& scratch) {
  double* turns = static_cast<double*>(scratch.get());
  const int64_t padded = turns_bytes(p) / int64_t(sizeof(double));
  for (int64_t i = 0; i < padded; ++i)
    turns[i] = i < p.half ? f.scale * std::exp(-std::log(f.max_period) * double(i) / (double(p.half) - f.shift)) *
                                0.15915494309189533577
                          : 0;
  p.turns = turns;
}

constexpr int64_t kCost = 8;  // of a sine and a cosine, in elements that are copied

Tensor timestep_embedding(const TensorRef& timesteps, int64_t dim, bool cosines_first, double shift, double scale,
                          double max_period, int64_t dtype) {
  const Frequencies frequencies{shift, scale, max_period};
  TimestepEmbeddingParams p = checked_params(timesteps, dim, cosines_first, frequencies);
  GK_CHECK_TYPE(dtype >= 0 && dtype < 4, kOp, "dtype: expected float32, float64, bfloat16 or float16");
  p.dtype = Dtype(dtype);
  Tensor out = new_empty(timesteps, {timesteps.size(0), dim}, kTypes[dtype]);
  if (out.numel() == 0) return out;
  p.out = samples_of(kOp, "out", out, "out", out);
  const Scratch scratch(turns_bytes(p));
  set_turns(p, frequencies, scratch);
  parallel_for_elements(timesteps.size(0), kCost * dim,
                        [&](int64_t begin, int64_t end) { timestep_embedding_fwd_kernel(p, begin, end); });
  return out;
}

Tensor timestep_embedding_bwd(const TensorRef& dout, const TensorRef& timesteps, bool cosines_first, double shift,
                              double scale, double max_period) {
  const Frequencies frequencies{shift, scale, max_period};
  GK_CHECK_VALUE(dout.dim() == 2 && timesteps.dim() == 1 && dout.size(0) == timesteps.size(0) && dout.is_contiguous(),
                 kOp, "dout: expected a contiguous [batch, dim], got shape ", shape_of(dout));
  TimestepEmbeddingParams p = checked_params(timesteps, dout.size(1), cosines_first, frequencies);
  p.dtype = float_dtype(kOp, "dout", dout);
  Tensor dtimesteps = new_like(timesteps);
  if (timesteps.numel() == 0) return dtimesteps;
  p.out = samples_of(kOp, "dout", dout, "dout", dout);
  p.dtimesteps = static_cast<double*>(dtimesteps.mutable_data_ptr());
  const Scratch scratch(turns_bytes(p));
  set_turns(p, frequencies, scratch);
  parallel_for_elements(timesteps.size(0), kCost * p.dim,
                        [&](int64_t begin, int64_t end) { timestep_embedding_bwd_kernel(p, begin, end); });
  return dtimesteps;
}

}  // namespace
}  // namespace genai_kernels

GK_CPU_OP(
    timestep_embedding, genai_kernels::timestep_embedding,
    "(Tensor timesteps, int dim, bool flip_sin_to_cos, float downscale_freq_shift, float scale, float max_period, "
    "int dtype) -> Tensor")
GK_CPU_OP(timestep_embedding_bwd, genai_kernels::timestep_embedding_bwd,
          "(Tensor dout, Tensor timesteps, bool flip_sin_to_cos, float downscale_freq_shift, float scale, "
          "float max_period) -> Tensor")
