// RMS norm on the CPU; the text is in cpu/norm_rows.h.
#include "cpu/region_headers.h"
#include "ops/rms_norm/rms_norm.h"

#define GENAI_KERNELS_ISA_FILE "ops/rms_norm/rms_norm_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/staged_row.h"
#include "cpu/row_sums.h"
#include "cpu/norm_rows.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {

void rms_norm_fwd_kernel(const NormParams& p, int64_t begin, int64_t end, void* scratch) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    norm_forward<false, T>(p, begin, end, static_cast<Compute<T>*>(scratch));
  });
}

void rms_norm_bwd_kernel(const NormParams& p, const RowBlocks& blocks, int64_t begin, int64_t end, void* scratch) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    norm_backward<false, T>(p, blocks, begin, end, static_cast<Compute<T>*>(scratch));
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, rms_norm_fwd_kernel, (const NormParams& p, int64_t begin, int64_t end, void* scratch),
                           (p, begin, end, scratch))
GENAI_KERNELS_ISA_DISPATCH(void, rms_norm_bwd_kernel,
                           (const NormParams& p, const RowBlocks& blocks, int64_t begin, int64_t end, void* scratch),
                           (p, blocks, begin, end, scratch))

#endif
