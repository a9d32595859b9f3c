#include "cpu/sum_blocks.h"

#include "cpu/region_headers.h"

#define GENAI_KERNELS_ISA_FILE "cpu/sum_blocks.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {

void sum_blocks_kernel(Dtype dtype, const void* partial, int64_t blocks, int64_t n, void* out, int64_t begin,
                       int64_t end) {
  switch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using C = Compute<T>;
    constexpr int kStep = kLanesOf<C>;
    for (int64_t j = begin; j < end; j += kStep) {
      const int64_t count = end - j < kStep ? end - j : kStep;
      const C* column = static_cast<const C*>(partial) + j;
      Vec<C> sum = {};
      for (int64_t b = 0; b < blocks; ++b, column += n)
        sum = sum + (count == kStep ? load(column) : load_first(column, count));
      store_first(static_cast<T*>(out) + j, sum, count);
    }
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, sum_blocks_kernel,
                           (Dtype dtype, const void* partial, int64_t blocks, int64_t n, void* out, int64_t begin,
                            int64_t end),
                           (dtype, partial, blocks, n, out, begin, end))

#endif
