// A tensor as Samples for the kernels.
#pragma once
#include "core/samples.h"
#include "host/check.h"

namespace genai_kernels {

inline int64_t elements_of_sample(const TensorRef& x) {
  int64_t n = 1;
  for (int64_t d = 1; d < x.dim(); ++d) n *= x.size(d);
  return n;
}

// True if dimensions [first, dim) lie without gaps, in order.
inline bool is_dense_from(const TensorRef& t, int64_t first) {
  int64_t step = 1;
  for (int64_t d = t.dim() - 1; d >= first; --d) {
    if (t.size(d) != 1 && t.stride(d) != step) return false;
    step *= t.size(d);
  }
  return true;
}

// A tensor of the shape of x.
inline Samples samples_of(const char* op, const char* name, const TensorRef& t, const char* like_name,
                          const TensorRef& like) {
  GK_CHECK_VALUE(t.dim() >= 1, op, name, ": expected [batch, ...], got shape []");
  check_same_shape(op, name, t, like_name, like);
  GK_CHECK_VALUE(t.numel() == 0 || is_dense_from(t, 1), op, name,
                 ": expected contiguous samples, got gaps or another order inside them; pass a copy (.contiguous())");
  return {t.data(), t.size(0) == 1 ? 0 : t.stride(0)};
}

// The same of its dtype too, or absent.
inline Samples samples_like(const char* op, const char* name, const OptionalTensor& t, const char* like_name,
                            const TensorRef& like) {
  if (!t) return {};
  check_same_dtype(op, name, *t, like_name, like);
  return samples_of(op, name, *t, like_name, like);
}

// The seeds of the samples.
inline const int64_t* checked_seeds(const char* op, const TensorRef& seeds, int64_t batch) {
  GK_CHECK_TYPE(seeds.scalar_type() == ScalarType::Long, op, "seed: expected int64, got ",
                dtype_name(seeds.scalar_type()));
  GK_CHECK_VALUE(seeds.dim() == 1 && seeds.size(0) == batch, op, "seed: expected [", batch,
                 "], one for each sample, got shape ", shape_of(seeds));
  return seeds.data_as<int64_t>();
}

inline uint32_t checked_offset(const char* op, int64_t offset) {
  GK_CHECK_VALUE(offset >= 0 && offset < (int64_t(1) << 32), op, "offset: expected 0 <= offset < 2^32, got ", offset);
  return uint32_t(offset);
}

}  // namespace genai_kernels
