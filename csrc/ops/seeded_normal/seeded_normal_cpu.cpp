// Normal numbers of seeds on the CPU.
#include "cpu/region_headers.h"
#include "core/rows.h"
#include "ops/seeded_normal/seeded_normal.h"

#define GENAI_KERNELS_ISA_FILE "ops/seeded_normal/seeded_normal_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/staged_row.h"
#include "cpu/normal.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {

void seeded_normal_kernel(const SeededNormalParams& p, int64_t begin, int64_t end) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using C = Compute<T>;
    alignas(64) C z[kNormalBlock];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = p.pieces.sample(item), last = p.pieces.end(item);
      for (int64_t at = p.pieces.begin(item); at < last; at += kNormalBlock) {
        normal_block<C>(uint64_t(p.seeds[n * p.seed_stride]), p.offset, NoiseStream::plain, at / kNormalBlock, z);
        for_each_register<C>(last - at < kNormalBlock ? last - at : kNormalBlock,
                             [&](int64_t i, auto part) { part.store_to(p.out.sample<T>(n) + at + i, load(z + i)); });
      }
    }
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, seeded_normal_kernel, (const SeededNormalParams& p, int64_t begin, int64_t end),
                           (p, begin, end))

#endif
