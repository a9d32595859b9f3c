// RMS norm and layer norm of rows: one text, with or without centering. Included inside an instruction-set region after
// row_sums.h; include core/norm_rows.h before the region.
//
//   x^ = (x - mean) * rstd,   rstd = 1 / sqrt(mean((x - mean)^2) + eps),   y = x^ * w + b      (RMS norm: mean = 0)
//   g = dy * w,   dx = rstd * (g - mean(g) - x^ * mean(g * x^)),   dw = sum of dy * x^,   db = sum of dy over rows
//
// A row stays in L1/L2 between the passes over it. Backward measures it again, which costs less than saving and reading.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// x^ = (x - mean) * rstd + shift. What the roundings of mean and rstd to the compute type lose is kept: with mean/std = 100
// that of the mean alone would cost 50 units in the last place, and that of rstd is the same for a whole row.
template <class C>
struct Moments {
  Vec<C> mean, rstd, rstd_rest, shift;
  template <bool Centered>
  GK_INLINE Vec<C> normed(Vec<C> x) const {
    if constexpr (!Centered) return fma(x, rstd, x * rstd_rest);
    const Vec<C> d = x - mean;
    return fma(d, rstd, fma(d, rstd_rest, shift));
  }
};

template <bool Centered, class S>
Moments<Compute<S>> row_moments(const S* x, int64_t n, double eps) {
  using C = Compute<S>;
  const double mean = Centered ? row_sum(x, n) / n : 0;
  const C center = C(mean);
  const double rest = mean - center;
  double variance;
  if (n <= kShortRow) {
    variance = short_row_squares(x, n, mean) / n;
  } else {
    double sum[1];
    auto sum_squares = [&](C scale) {
      sum_row<C>(n, sum, [&, scale](int64_t i, auto part, Vec<C>* acc) {
        const Vec<C> v =
            Centered ? part.or_zero(part.load_from(x + i) - center) * scale : part.load_from(x + i) * scale;
        acc[0] = fma(v, v, acc[0]);
      });
    };
    sum_squares(1);
    const C scale = rescue_scale<C>(sum[0], eps);
    if (scale != 1) [[unlikely]]
      sum_squares(scale);
    variance = sum[0] / (double(scale) * scale) / n - rest * rest;
  }
  const double rstd = 1 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps);
  const C rounded = C(rstd);
  return {broadcast(center), broadcast(rounded), broadcast(C(rstd - rounded)), broadcast(C(-rest * rstd))};
}

template <bool Centered, class T, class S>
GK_INLINE void normalise_row(const S* x, T* y, int64_t n, const Compute<T>* weight, const Compute<T>* bias,
                             double eps) {
  using C = Compute<T>;
  const Moments<C> moments = row_moments<Centered>(x, n, eps);
  for_each_register<C>(n, [&](int64_t i, auto part) {
    const Vec<C> normed = moments.template normed<Centered>(part.load_from(x + i)), w = part.load_from(weight + i);
    part.store_to(y + i, Centered ? fma(normed, w, part.load_from(bias + i)) : normed * w);
  });
}

// Rows [begin, end); scratch for kNormForwardScratchRows rows of the compute type.
template <bool Centered, class T>
void norm_forward(const NormParams& p, int64_t begin, int64_t end, Compute<T>* scratch) {
  using C = Compute<T>;
  const int64_t n = p.x.length;
  const C* weight = stage_parameter<C>(p.weight, n, 1, scratch);
  const C* bias = Centered ? stage_parameter<C>(p.bias, n, 0, scratch + n) : nullptr;
  C* sum = scratch + 2 * n;
  T *staged_x = reinterpret_cast<T*>(scratch + 3 * n), *staged_residual = reinterpret_cast<T*>(scratch + 4 * n),
    *staged_y = reinterpret_cast<T*>(scratch + 5 * n);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = read_row<T>(p.x, r, staged_x);
    T* y = begin_row<T>(p.y, r, staged_y);
    if (p.residual.data) {
      const T* residual = read_row<T>(p.residual, r, staged_residual);
      T* rounded = begin_row<T>(p.sum, r, staged_x);
      for_each_register<C>(n, [&](int64_t i, auto part) {
        const Vec<C> v = part.load_from(x + i) + part.load_from(residual + i);
        part.store_to(sum + i, v);
        part.store_to(rounded + i, v);
      });
      finish_row<T>(p.sum, r, rounded);
      normalise_row<Centered>(sum, y, n, weight, bias, p.eps);
    } else {
      normalise_row<Centered>(x, y, n, weight, bias, p.eps);
    }
    finish_row<T>(p.y, r, y);
  }
}

// Rows r .. r + Group. Their terms of dw and db meet in registers before they are added to doubles in memory.
template <bool Centered, int Group, class T>
void norm_backward_rows(const NormParams& p, int64_t r, const Compute<T>* weight, double* dw, double* db, T* scratch) {
  using C = Compute<T>;
  const int64_t n = p.x.length;
  const T *x[Group], *dy[Group], *dsum[Group];
  T* dx[Group];
  Moments<C> moments[Group];
  Vec<C> mean_g[Group], pull[Group];
  for (int j = 0; j < Group; ++j) {
    T* staged = scratch + 4 * j * n;
    x[j] = read_row<T>(p.x, r + j, staged);
    dy[j] = read_row<T>(p.dy, r + j, staged + n);
    dx[j] = begin_row<T>(p.dx, r + j, staged + 2 * n);
    dsum[j] = p.dsum.data ? read_row<T>(p.dsum, r + j, staged + 3 * n) : nullptr;
    moments[j] = row_moments<Centered>(x[j], n, p.eps);
    double sums[2];
    sum_row<C>(n, sums, [&](int64_t i, auto part, Vec<C>* acc) {
      const Vec<C> g = part.load_from(dy[j] + i) * part.load_from(weight + i);
      acc[0] = fma(g, moments[j].template normed<Centered>(part.load_from(x[j] + i)), acc[0]);
      if constexpr (Centered) acc[1] = acc[1] + g;
    });
    pull[j] = broadcast(C(-sums[0] / n));
    mean_g[j] = broadcast(C(Centered ? sums[1] / n : 0));
  }
  for_each_register<C>(n, [&](int64_t i, auto part) {
    const Vec<C> w = part.load_from(weight + i);
    ColumnSums<C> sum_dw, sum_db;
    GK_UNROLL for (int j = 0; j < Group; ++j) {
      const Vec<C> normed = moments[j].template normed<Centered>(part.load_from(x[j] + i)),
                   d = part.load_from(dy[j] + i);
      sum_dw.add(d * normed);
      if constexpr (Centered) sum_db.add(d);
      const Vec<C> g = Centered ? d * w - mean_g[j] : d * w;  // not fused: exactly 0 where all g are equal
      const Vec<C> own = fma(normed, pull[j], g) * moments[j].rstd;
      part.store_to(dx[j] + i, dsum[j] ? own + part.load_from(dsum[j] + i) : own);
    }
    if (dw) sum_dw.add_to(dw + i, part);
    if (Centered && db) sum_db.add_to(db + i, part);
  });
  for (int j = 0; j < Group; ++j) finish_row<T>(p.dx, r + j, dx[j]);
}

// Blocks [begin, end); scratch for kNormBackwardScratchRows rows of the compute type.
template <bool Centered, class T>
void norm_backward(const NormParams& p, const RowBlocks& blocks, int64_t begin, int64_t end, Compute<T>* scratch) {
  using C = Compute<T>;
  const int64_t n = p.x.length;
  const C* weight = stage_parameter<C>(p.weight, n, 1, scratch);
  T* staged = reinterpret_cast<T*>(scratch + n);
  for (int64_t block = begin; block < end; ++block) {
    double* dw = p.dw_partial ? static_cast<double*>(p.dw_partial) + block * n : nullptr;
    double* db = p.db_partial ? static_cast<double*>(p.db_partial) + block * n : nullptr;
    for (int64_t i = 0; dw && i < n; ++i) dw[i] = 0;
    for (int64_t i = 0; db && i < n; ++i) db[i] = 0;
    int64_t r = blocks.begin(block);
    for (; r + kRowGroup <= blocks.end(block); r += kRowGroup)
      norm_backward_rows<Centered, kRowGroup, T>(p, r, weight, dw, db, staged);
    for (; r < blocks.end(block); ++r) norm_backward_rows<Centered, 1, T>(p, r, weight, dw, db, staged);
  }
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
