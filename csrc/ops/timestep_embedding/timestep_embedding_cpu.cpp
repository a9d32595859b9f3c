// Sines and cosines of timesteps on the CPU. The angle is made in double and brought into one turn before it is rounded:
// an angle of 1000 in float32 has an error of 3e-5, and so have PyTorch's sines of it.
#include "cpu/region_headers.h"
#include "core/noise.h"
#include "core/rows.h"
#include "ops/timestep_embedding/timestep_embedding.h"

#define GENAI_KERNELS_ISA_FILE "ops/timestep_embedding/timestep_embedding_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/staged_row.h"
#include "cpu/row_sums.h"
#include "cpu/normal.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// Of one register of frequencies. The rest of a quarter of a turn is rounded, not that of a turn: near the zeros of a
// sine its relative error would be large.
template <class C>
GK_INLINE SinCos<Vec<C>> embed(double time, const double* turns) {
  if constexpr (sizeof(C) == 8) {
    VecD rest;
    for (int l = 0; l < kLanesOf<C>; ++l) rest[l] = time * turns[l] - __builtin_rint(time * turns[l]);
    return sincos_of_turns(rest);
  } else {
    float rest[kLanes];
    int32_t quarters[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const double turn = time * turns[l] - __builtin_rint(time * turns[l]), quarter = __builtin_rint(4 * turn);
      rest[l] = float(turn - quarter / 4);
      quarters[l] = int32_t(quarter == quarter ? quarter : 0);  // of a NaN, its rest says so
    }
    VecI q;
    __builtin_memcpy(&q, quarters, sizeof q);
    return sincos_of_quarters(q, load(rest));
  }
}

}  // namespace

void timestep_embedding_fwd_kernel(const TimestepEmbeddingParams& p, int64_t begin, int64_t end) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using C = Compute<T>;
    for (int64_t n = begin; n < end; ++n) {
      T* out = p.out.sample<T>(n);
      T *sines = out + (p.cosines_first ? p.half : 0), *cosines = out + (p.cosines_first ? 0 : p.half);
      const double time = p.timesteps[n * p.timestep_stride];
      for_each_register<C>(p.half, [&](int64_t i, auto part) {
        const auto angle = embed<C>(time, p.turns + i);
        part.store_to(sines + i, angle.sin);
        part.store_to(cosines + i, angle.cos);
      });
      if (2 * p.half < p.dim) out[p.dim - 1] = from_compute<T>(C(0));
    }
  });
}

// d time = sum over frequencies w of w (cos dsin - sin dcos).
void timestep_embedding_bwd_kernel(const TimestepEmbeddingParams& p, int64_t begin, int64_t end) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using C = Compute<T>;
    for (int64_t n = begin; n < end; ++n) {
      const T* dout = p.out.sample<T>(n);
      const T *dsin = dout + (p.cosines_first ? p.half : 0), *dcos = dout + (p.cosines_first ? 0 : p.half);
      const double time = p.timesteps[n * p.timestep_stride];
      double sum[1];
      sum_row<C>(p.half, sum, [&](int64_t i, auto part, Vec<C>* acc) {
        const auto angle = embed<C>(time, p.turns + i);
        Vec<C> frequency;
        for (int l = 0; l < kLanesOf<C>; ++l) frequency[l] = C(6.283185307179586477 * p.turns[i + l]);
        const Vec<C> slope = angle.cos * part.load_from(dsin + i) - angle.sin * part.load_from(dcos + i);
        acc[0] = fma(frequency, part.or_zero(slope), acc[0]);
      });
      p.dtimesteps[n] = sum[0];
    }
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, timestep_embedding_fwd_kernel,
                           (const TimestepEmbeddingParams& p, int64_t begin, int64_t end), (p, begin, end))
GENAI_KERNELS_ISA_DISPATCH(void, timestep_embedding_bwd_kernel,
                           (const TimestepEmbeddingParams& p, int64_t begin, int64_t end), (p, begin, end))

#endif
