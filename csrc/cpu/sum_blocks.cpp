#include "cpu/sum_blocks.h"

#include "cpu/region_headers.h"

#define GENAI_KERNELS_ISA_FILE "cpu/sum_blocks.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

template <class P, class T>
GK_INLINE void sum_columns(const P* partial, int64_t blocks, int64_t n, T* out, int64_t begin, int64_t end) {
  constexpr int kColumns = 32;  // summed together: a few registers of doubles
  for (int64_t j = begin; j < end; j += kColumns) {
    const int count = end - j < kColumns ? int(end - j) : kColumns;
    double sums[kColumns] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      const P* row = partial + b * n + j;
      if (count == kColumns)
        for (int c = 0; c < kColumns; ++c) sums[c] += row[c];
      else
        for (int c = 0; c < count; ++c) sums[c] += row[c];
    }
    for (int c = 0; c < count; ++c) out[j + c] = from_compute<T>(Compute<T>(sums[c]));
  }
}

}  // namespace

void sum_blocks_kernel(bool in_double, const void* partial, int64_t blocks, int64_t n, Dtype dtype, void* out,
                       int64_t begin, int64_t end) {
  switch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (in_double)
      sum_columns(static_cast<const double*>(partial), blocks, n, static_cast<T*>(out), begin, end);
    else
      sum_columns(static_cast<const float*>(partial), blocks, n, static_cast<T*>(out), begin, end);
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, sum_blocks_kernel,
                           (bool in_double, const void* partial, int64_t blocks, int64_t n, Dtype dtype, void* out,
                            int64_t begin, int64_t end),
                           (in_double, partial, blocks, n, dtype, out, begin, end))

#endif
