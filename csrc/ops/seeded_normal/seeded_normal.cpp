// Host of seeded_normal: schema, checks, allocation, the parallel loop.
#include "ops/seeded_normal/seeded_normal.h"

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/parallel.h"
#include "host/samples.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "seeded_normal";
constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16,
                                 ScalarType::Half};  // in the order of Dtype

Tensor seeded_normal(const TensorRef& seed, int64_t count, int64_t offset, int64_t dtype) {
  GK_CHECK_VALUE(seed.dim() == 1, kOp, "seed: expected [samples], got shape ", shape_of(seed));
  GK_CHECK_VALUE(count >= 0, kOp, "shape: expected sizes of at least 0, got ", count, " elements");
  GK_CHECK_TYPE(dtype >= 0 && dtype < 4, kOp, "dtype: expected float32, float64, bfloat16 or float16");
  SeededNormalParams p{};
  p.dtype = Dtype(dtype);
  p.seeds = checked_seeds(kOp, seed, seed.size(0));
  p.seed_stride = seed.stride(0);
  p.offset = checked_offset(kOp, offset);
  p.pieces = {count};
  Tensor out = new_empty(seed, {seed.size(0), count}, kTypes[dtype]);
  p.out = samples_of(kOp, "out", out, "out", out);
  if (out.numel() == 0) return out;
  parallel_for_elements(seed.size(0) * p.pieces.per_sample(), p.pieces.largest(),
                        [&](int64_t begin, int64_t end) { seeded_normal_kernel(p, begin, end); });
  return out;
}

}  // namespace
}  // namespace genai_kernels

GK_CPU_OP(seeded_normal, genai_kernels::seeded_normal, "(Tensor seed, int count, int offset, int dtype) -> Tensor")
