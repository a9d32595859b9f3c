// RMS norm on the CPU: y = x * rstd * w, rstd = 1 / sqrt(mean(x^2) + eps), one row at a time, which stays in L1/L2
// between the two passes over it. Backward recomputes rstd (a pass over a row in cache) instead of saving it:
//
//   x^ = x * rstd,   g = dy * w,   dx = rstd * (g - x^ * mean(g * x^)),   dw = sum over rows of dy * x^
//
// dw: four rows are multiplied and added in registers, then added to doubles; see core/row_blocks.h.
#include "cpu/region_headers.h"
#include "ops/rms_norm/rms_norm.h"

#define GENAI_KERNELS_ISA_FILE "ops/rms_norm/rms_norm_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/staged_row.h"
#include "cpu/row_sums.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

template <class T>
Compute<T> row_rstd(const T* x, int64_t n, double eps) {
  using C = Compute<T>;
  double sum[1];
  sum_row<C>(n, sum, [&](int64_t i, auto part, Vec<C>* acc) {
    const Vec<C> v = part.load_from(x + i);
    acc[0] = fma(v, v, acc[0]);
  });
  if (const C scale = rescue_scale<C>(sum[0], eps); scale != 1) [[unlikely]] {
    sum_row<C>(n, sum, [&](int64_t i, auto part, Vec<C>* acc) {
      const Vec<C> v = part.load_from(x + i) * scale;
      acc[0] = fma(v, v, acc[0]);
    });
    sum[0] /= double(scale) * scale;
  }
  return reciprocal_root<C>(sum[0] / n, eps);
}

template <class T>
void forward_rows(const RmsNormParams& p, int64_t begin, int64_t end, Compute<T>* scratch) {
  using C = Compute<T>;
  const int64_t n = p.x.length;
  const C* weight = stage_parameter<C>(p.weight, n, 1, scratch);
  T* staged = reinterpret_cast<T*>(scratch + n);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = read_row<T>(p.x, r, staged);
    const Vec<C> rstd = broadcast(row_rstd(x, n, p.eps));
    T* y = begin_row<T>(p.y, r, staged);
    for_each_register<C>(n, [&](int64_t i, auto part) {
      part.store_to(y + i, part.load_from(x + i) * rstd * part.load_from(weight + i));
    });
    finish_row<T>(p.y, r, y);
  }
}

// Rows r .. r + Group.
template <int Group, class T>
void backward_rows(const RmsNormParams& p, int64_t r, const Compute<T>* weight, double* dw, T* scratch) {
  using C = Compute<T>;
  const int64_t n = p.x.length;
  const T *x[Group], *dy[Group];
  T* dx[Group];
  Vec<C> rstd[Group], pull[Group];
  for (int j = 0; j < Group; ++j) {
    x[j] = read_row<T>(p.x, r + j, scratch + 3 * j * n);
    dy[j] = read_row<T>(p.dy, r + j, scratch + (3 * j + 1) * n);
    dx[j] = begin_row<T>(p.dx, r + j, scratch + (3 * j + 2) * n);
    double sums[2];
    auto add = [&](C scale) {
      sum_row<C>(n, sums, [&, scale](int64_t i, auto part, Vec<C>* acc) {
        const Vec<C> v = part.load_from(x[j] + i) * scale;
        acc[0] = fma(v, v, acc[0]);
        acc[1] = fma(part.load_from(dy[j] + i) * part.load_from(weight + i), v, acc[1]);
      });
    };
    add(1);
    const C scale = rescue_scale<C>(sums[0], p.eps);
    if (scale != 1) [[unlikely]] add(scale);
    const C s = reciprocal_root<C>(sums[0] / (double(scale) * scale) / n, p.eps);
    rstd[j] = broadcast(s);
    pull[j] = broadcast(C(-sums[1] / scale / n * s));
  }
  for_each_register<C>(n, [&](int64_t i, auto part) {
    const Vec<C> w = part.load_from(weight + i);
    Vec<C> sum = {};
    GK_UNROLL for (int j = 0; j < Group; ++j) {
      const Vec<C> normed = part.load_from(x[j] + i) * rstd[j], d = part.load_from(dy[j] + i);
      sum = fma(d, normed, sum);
      part.store_to(dx[j] + i, fma(normed, pull[j], d * w) * rstd[j]);
    }
    if (dw) add_to(dw + i, sum, part);
  });
  for (int j = 0; j < Group; ++j) finish_row<T>(p.dx, r + j, dx[j]);
}

}  // namespace

void rms_norm_fwd_kernel(const RmsNormParams& p, int64_t begin, int64_t end, void* scratch) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    forward_rows<T>(p, begin, end, static_cast<Compute<T>*>(scratch));
  });
}

void rms_norm_bwd_kernel(const RmsNormParams& p, const RowBlocks& blocks, int64_t begin, int64_t end, void* scratch) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using C = Compute<T>;
    const int64_t n = p.x.length;
    const C* weight = stage_parameter<C>(p.weight, n, 1, static_cast<C*>(scratch));
    T* staged = reinterpret_cast<T*>(static_cast<C*>(scratch) + n);
    for (int64_t block = begin; block < end; ++block) {
      double* dw = p.dw_partial ? p.dw_partial + block * n : nullptr;
      for (int64_t i = 0; dw && i < n; ++i) dw[i] = 0;
      int64_t r = blocks.begin(block);
      for (; r + kRowGroup <= blocks.end(block); r += kRowGroup) backward_rows<kRowGroup, T>(p, r, weight, dw, staged);
      for (; r < blocks.end(block); ++r) backward_rows<1, T>(p, r, weight, dw, staged);
    }
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, rms_norm_fwd_kernel,
                           (const RmsNormParams& p, int64_t begin, int64_t end, void* scratch),
                           (p, begin, end, scratch))
GENAI_KERNELS_ISA_DISPATCH(void, rms_norm_bwd_kernel,
                           (const RmsNormParams& p, const RowBlocks& blocks, int64_t begin, int64_t end, void* scratch),
                           (p, blocks, begin, end, scratch))

#endif
