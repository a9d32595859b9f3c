// RMS norm on the CPU: y = x * rstd * w, rstd = 1 / sqrt(mean(x^2) + eps), one row at a time, which stays in L1/L2
// between the two passes over it. Backward recomputes rstd (a pass over a row in cache) instead of saving it:
//
//   g = dy * w,   dx = rstd * (g - x * rstd^2 * mean(g * x)),   dw = sum over rows of dy * x * rstd
//
// dw is summed within blocks of kRowsPerBlock rows, then over the blocks in order: same bits for every thread count.
#include "cpu/region_headers.h"
#include "ops/rms_norm/rms_norm.h"

#define GENAI_KERNELS_ISA_FILE "ops/rms_norm/rms_norm_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/staged_row.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// Sum over a row in a fixed order: four accumulators, then halves.
template <class C, class F>
GK_INLINE C sum_row(int64_t n, F&& term) {
  constexpr int kStep = kLanesOf<C>;
  Vec<C> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kStep <= n; i += 4 * kStep)
    GK_UNROLL for (int j = 0; j < 4; ++j) sum[j] = term(i + j * kStep, sum[j]);
  for (; i < n; i += kStep) sum[0] = term(i, sum[0]);
  return horizontal_sum<C>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class C>
GK_INLINE C reciprocal_rms(C sum_of_squares, int64_t n, double eps) {
  if constexpr (sizeof(C) == 8)
    return 1 / __builtin_sqrt(sum_of_squares / n + eps);
  else
    return 1 / __builtin_sqrtf(sum_of_squares / n + float(eps));
}

template <class T, bool Weighted>
void forward_rows(const RmsNormParams& p, int64_t begin, int64_t end, T* scratch) {
  using C = Compute<T>;
  const int64_t n = p.x.length;
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = read_row<T>(p.x, r, scratch);
    const C sum = sum_row<C>(n, [&](int64_t i, Vec<C> acc) {
      const Vec<C> v = load_at(x, i, n);
      return fma(v, v, acc);
    });
    const Vec<C> rstd = broadcast(reciprocal_rms(sum, n, p.eps));
    T* y = begin_row<T>(p.y, r, scratch);
    for (int64_t i = 0; i < n; i += kLanesOf<C>) {
      Vec<C> v = load_at(x, i, n) * rstd;
      if constexpr (Weighted) v = v * load_at(weight, i, n);
      store_at(y, i, n, v);
    }
    finish_row<T>(p.y, r, y);
  }
}

template <class T, bool Weighted>
void backward_block(const RmsNormParams& p, int64_t block, T* scratch) {
  using C = Compute<T>;
  const int64_t n = p.x.length;
  const int64_t begin = block * kRmsNormRowsPerBlock;
  const int64_t end = begin + kRmsNormRowsPerBlock < p.x.count ? begin + kRmsNormRowsPerBlock : p.x.count;
  const T* weight = static_cast<const T*>(p.weight);
  C* dw = Weighted ? static_cast<C*>(p.dw_partial) + block * n : nullptr;
  if (Weighted)
    for (int64_t i = 0; i < n; ++i) dw[i] = 0;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = read_row<T>(p.x, r, scratch);
    const T* dy = read_row<T>(p.dy, r, scratch + n);
    auto g_at = [&](int64_t i) {
      const Vec<C> v = load_at(dy, i, n);
      if constexpr (Weighted) return v * load_at(weight, i, n);
      return v;
    };
    const C sum = sum_row<C>(n, [&](int64_t i, Vec<C> acc) {
      const Vec<C> v = load_at(x, i, n);
      return fma(v, v, acc);
    });
    const C dot = sum_row<C>(n, [&](int64_t i, Vec<C> acc) { return fma(g_at(i), load_at(x, i, n), acc); });
    const C rstd = reciprocal_rms(sum, n, p.eps);
    const Vec<C> scale = broadcast(rstd), pull = broadcast(-rstd * rstd * (dot / n));
    T* dx = begin_row<T>(p.dx, r, scratch + 2 * n);
    for (int64_t i = 0; i < n; i += kLanesOf<C>) {
      const Vec<C> v = load_at(x, i, n);
      if constexpr (Weighted) store_at(dw, i, n, fma(load_at(dy, i, n), v * scale, load_at(dw, i, n)));
      store_at(dx, i, n, fma(v, pull, g_at(i)) * scale);
    }
    finish_row<T>(p.dx, r, dx);
  }
}

}  // namespace

void rms_norm_fwd_kernel(const RmsNormParams& p, int64_t begin, int64_t end, void* scratch) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    switch_bool(p.weight, [&](auto weighted) {
      forward_rows<T, decltype(weighted)::value>(p, begin, end, static_cast<T*>(scratch));
    });
  });
}

void rms_norm_bwd_kernel(const RmsNormParams& p, int64_t begin, int64_t end, void* scratch) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    switch_bool(p.weight, [&](auto weighted) {
      for (int64_t block = begin; block < end; ++block)
        backward_block<T, decltype(weighted)::value>(p, block, static_cast<T*>(scratch));
    });
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, rms_norm_fwd_kernel,
                           (const RmsNormParams& p, int64_t begin, int64_t end, void* scratch),
                           (p, begin, end, scratch))
GENAI_KERNELS_ISA_DISPATCH(void, rms_norm_bwd_kernel,
                           (const RmsNormParams& p, int64_t begin, int64_t end, void* scratch),
                           (p, begin, end, scratch))

#endif
