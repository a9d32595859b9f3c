// A VAE's latents on the CPU. With l = clamp(logvar) and e the noise,
//
//   z = mean + exp(l / 2) e,   kl = sum of (mean^2 + exp(l) - 1 - l) / 2
//   dmean = dz + dkl mean,     dlogvar = dz e exp(l / 2) / 2 + dkl (exp(l) - 1) / 2 where l was not clamped
//
// in one pass each; noise from a seed is made again in the backward, not kept.
#include "cpu/region_headers.h"
#include "core/rows.h"
#include "ops/gaussian_sample_kl/gaussian_sample_kl.h"

#define GENAI_KERNELS_ISA_FILE "ops/gaussian_sample_kl/gaussian_sample_kl_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/exp.h"
#include "cpu/staged_row.h"
#include "cpu/row_sums.h"
#include "cpu/normal.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// f(at, part, noise) for every register of a piece; `at` counts in the sample.
template <class T, class F>
GK_INLINE void for_each_with_noise(const GaussianSampleParams& p, int64_t item, F&& f) {
  using C = Compute<T>;
  const int64_t n = p.pieces.sample(item), end = p.pieces.end(item);
  const T* noise = p.noise ? p.noise.sample<T>(n) : nullptr;
  const uint64_t seed = p.seeds ? uint64_t(p.seeds[n * p.seed_stride]) : 0;
  alignas(64) C z[kNormalBlock];
  for (int64_t at = p.pieces.begin(item); at < end; at += kNormalBlock) {
    if (!noise) normal_block<C>(seed, p.offset, NoiseStream::latent, at / kNormalBlock, z);
    for_each_register<C>(end - at < kNormalBlock ? end - at : kNormalBlock, [&](int64_t i, auto part) {
      f(at + i, part, noise ? part.load_from(noise + at + i) : load(z + i));
    });
  }
}

template <class C>
GK_INLINE Vec<C> clamped(const GaussianSampleParams& p, Vec<C> logvar) {
  return min(broadcast(C(p.most)), max(broadcast(C(p.least)), logvar));  // a NaN stays
}

template <class T>
void forward(const GaussianSampleParams& p, double* kl, int64_t begin, int64_t end) {
  using C = Compute<T>;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = p.pieces.sample(item);
    const T *mean = p.mean.sample<T>(n), *logvar = p.logvar.sample<T>(n);
    T* z = p.z.sample<T>(n);
    VecD sum[2] = {};  // in double: a term may be far from the others
    for_each_with_noise<T>(p, item, [&](int64_t at, auto part, Vec<C> noise) {
      const Vec<C> m = part.load_from(mean + at), l = clamped<C>(p, part.load_from(logvar + at));
      part.store_to(z + at, fma(exp(l * C(0.5)), noise, m));
      const Vec<C> term = part.or_zero(fma(m, m, exp(l) - C(1) - l));
      if constexpr (sizeof(C) == 4) {
        const Doubles d = to_doubles(term);
        sum[0] = sum[0] + d.low;
        sum[1] = sum[1] + d.high;
      } else {
        sum[0] = sum[0] + term;
      }
    });
    kl[item] = 0.5 * horizontal_sum<double>(sum[0] + sum[1]);
  }
}

template <class T>
void backward(const GaussianSampleParams& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  using V = Vec<C>;
  const V least = broadcast(C(p.least)), most = broadcast(C(p.most));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = p.pieces.sample(item);
    const T *mean = p.mean.sample<T>(n), *logvar = p.logvar.sample<T>(n);
    const T* dz = p.dz ? p.dz.sample<T>(n) : nullptr;
    T *dmean = p.dmean.sample<T>(n), *dlogvar = p.dlogvar.sample<T>(n);
    T* dnoise = p.dnoise ? p.dnoise.sample<T>(n) : nullptr;
    const V dkl = broadcast(p.dkl ? static_cast<const C*>(p.dkl)[n * p.dkl_stride] : C(0));
    for_each_with_noise<T>(p, item, [&](int64_t at, auto part, V noise) {
      const V m = part.load_from(mean + at), given = part.load_from(logvar + at), l = clamped<C>(p, given);
      const V d = dz ? part.load_from(dz + at) : V{}, deviation = exp(l * C(0.5));
      part.store_to(dmean + at, fma(dkl, m, d));
      const V slope = fma(d * noise, deviation, dkl * (exp(l) - C(1))) * C(0.5);
      part.store_to(dlogvar + at, (given < least) | (given > most) ? V{} : slope);
      if (dnoise) part.store_to(dnoise + at, d * deviation);
    });
  }
}

}  // namespace

void gaussian_sample_kl_fwd_kernel(const GaussianSampleParams& p, double* kl, int64_t begin, int64_t end) {
  switch_dtype(p.dtype, [&](auto type) { forward<typename decltype(type)::type>(p, kl, begin, end); });
}

void gaussian_sample_kl_bwd_kernel(const GaussianSampleParams& p, int64_t begin, int64_t end) {
  switch_dtype(p.dtype, [&](auto type) { backward<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, gaussian_sample_kl_fwd_kernel,
                           (const GaussianSampleParams& p, double* kl, int64_t begin, int64_t end), (p, kl, begin, end))
GENAI_KERNELS_ISA_DISPATCH(void, gaussian_sample_kl_bwd_kernel,
                           (const GaussianSampleParams& p, int64_t begin, int64_t end), (p, begin, end))

#endif
