// RMS norm and layer norm of rows, forward: one text, with or without centering, with or without a residual.
//
//   x^ = (x - mean) * rstd,   rstd = 1 / sqrt(mean((x - mean)^2) + eps),   y = x^ * w + b      (RMS norm: mean = 0)
//
// A row is read once, held in the registers of its threads as it was stored, and written once. Terms are added in float
// within a vector of 16 bytes, vectors and threads in double. cuda/norm_rows_bwd.cuh has the gradients.
#pragma once
#include "core/norm_rows.h"
#include "cuda/launch.cuh"
#include "cuda/norm_row_blocks.h"
#include "cuda/reduce.cuh"
#include "cuda/vectors.cuh"

namespace genai_kernels {

// A weight or bias: contiguous, readable to the next multiple of 8 elements, of the row's type or float32 (host/
// norm_rows.h sees to it).
template <class T>
GK_DEVICE void load_parameter(const Parameter& p, int64_t vector, float (&w)[Vector<T>::kCount]) {
  constexpr int kPer = Vector<T>::kCount;
  if (sizeof(T) == 4 || p.dtype == Dtype::f32) {
#pragma unroll
    for (int h = 0; h < kPer / 4; ++h) {
      const auto v = Vector<float>::of(load_constant_16(static_cast<const float*>(p.data) + vector * kPer + 4 * h));
#pragma unroll
      for (int i = 0; i < 4; ++i) w[4 * h + i] = v[i];
    }
  } else {
    const auto v = Vector<T>::of(load_constant_16(static_cast<const T*>(p.data) + vector * kPer));
#pragma unroll
    for (int i = 0; i < kPer; ++i) w[i] = v[i];
  }
}

// One thread's part of a parameter: fetched before the row's sums are known where registers allow, so that it is there
// when they are.
template <class T, int kVectors>
struct HeldParameter {
  static constexpr int kPer = Vector<T>::kCount;
  static constexpr int kHeld = kVectors <= 4 ? kVectors : 0;
  Vector<T> v[kHeld + 1];
  bool held;

  template <class Index>
  GK_DEVICE HeldParameter(const Parameter& p, Index first, Index step, Index length)
      : held(kHeld && p.data && (sizeof(T) == 4 || p.dtype != Dtype::f32)) {
    if (held)
#pragma unroll
      for (int j = 0; j < kHeld; ++j)
        if ((first + j * step) * kPer < length)
          v[j] = Vector<T>::of(load_constant_16(static_cast<const T*>(p.data) + (first + j * step) * kPer));
  }
  GK_DEVICE void get(const Parameter& p, int j, int64_t vector, float if_absent, float (&w)[kPer]) const {
    if (!p.data) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) w[i] = if_absent;
    } else if (kHeld && held) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) w[i] = v[kHeld ? j : 0][i];
    } else {
      load_parameter<T>(p, vector, w);
    }
  }
};

// x^ = (x - mean) * rstd + shift. What the roundings of mean and rstd to float lose is kept: with mean/std = 100 that of
// the mean alone would cost 50 units in the last place, and that of rstd is the same for a whole row.
struct Moments {
  float mean, rstd, rstd_rest, shift;
  template <bool kCentered>
  GK_DEVICE float normed(float x) const {
    if constexpr (!kCentered) return __fmaf_rn(x, rstd, __fmul_rn(x, rstd_rest));
    const float d = __fadd_rn(x, -mean);
    return __fmaf_rn(d, rstd, __fmaf_rn(d, rstd_rest, shift));
  }
  GK_DEVICE static Moments of(double mean, double exact_rstd) {
    const float center = float(mean), rounded = float(exact_rstd);
    return {center, rounded, float(exact_rstd - rounded), float((center - mean) * exact_rstd)};
  }
};

// 1 / sqrt(x) for x >= 0, nearly to double's precision: float's reciprocal root and one step. The library's root and
// quotient are calls, around which registers are saved.
GK_DEVICE double reciprocal_root(double x) {
  const bool tiny = x < 0x1p-100, huge = x > 0x1p100;
  x *= tiny ? 0x1p200 : huge ? 0x1p-200 : 1;
  const double r = rsqrtf(float(x)), e = 1 - x * r * r, y = r + r * e * (0.5 + 0.375 * e);
  return (r > 0 && r < double(INFINITY) ? y : r) * (tiny ? 0x1p100 : huge ? 0x1p-100 : 1);
}

// sum / n, exact where the quotient is a double.
GK_DEVICE double mean_of(double sum, const RowLaunch& rows) {
  const double q = sum * rows.inverse_length;
  const double rest = fma(-q, rows.length, sum);
  return rest == rest ? fma(rest, rows.inverse_length, q) : q;
}

// Squares leave float's range long before the numbers do: |x| ~ 1e30 overflows, and with eps ~ 0 |x| ~ 1e-25 vanishes.
// Where a sum of squares shows it, its row is summed again with every element times this power of two; otherwise 1.
GK_DEVICE float rescue_scale(double sum_of_squares, double eps) {
  if (sum_of_squares < 0x1p-60) return eps < 0x1p-40 ? 0x1p96f : 1.0f;
  return sum_of_squares < 0x1p126 ? 1.0f : 0x1p-96f;
}

// float32 rows so short that the rounding of a single square shows are squared in double.
template <class T, int kVectors>
inline constexpr bool kExact = sizeof(T) == 4 && kVectors == 1;

// One thread's part of a row.
template <class T, int kVectors>
struct RowTile {
  static constexpr int kPer = Vector<T>::kCount;
  Vector<T> v[kVectors];
  GK_DEVICE float operator()(int j, int i) const { return v[j][i]; }
  GK_DEVICE void forget() { forget_floats(v); }
  GK_DEVICE void rotate() { rotate_vectors(v); }
};
// The same of a sum of two, not rounded: where that needs no more registers as a sum, otherwise as its terms.
template <class T, int kVectors>
struct SumTile {
  static constexpr int kPer = Vector<T>::kCount;
  Vector<T> v[kVectors], w[sizeof(T) == 4 ? 1 : kVectors];
  template <class View, class Index>
  GK_DEVICE void load(const View& x, const View& residual, Index first, Index step) {
    x.load(v, first, step);
    if constexpr (sizeof(T) == 4) {
      constexpr int kPart = kVectors < 2 ? kVectors : 2;  // at a time beside the row itself
#pragma unroll
      for (int part = 0; part < kVectors; part += kPart) {
        Vector<T> r[kPart];
        residual.load(r, first + part * step, step);
#pragma unroll
        for (int j = 0; j < kPart; ++j)
#pragma unroll
          for (int i = 0; i < kPer; ++i) {
            v[part + j].word[i] = __float_as_uint(v[part + j][i] + r[j][i]);
            genai_kernels::forget(v[part + j].word[i]);
          }
      }
    } else {
      residual.load(w, first, step);
    }
  }
  GK_DEVICE void forget() {
    forget_floats(v);
    forget_floats(w);
  }
  GK_DEVICE void rotate() {
    rotate_vectors(v);
    rotate_vectors(w);
  }
  GK_DEVICE float operator()(int j, int i) const {
    if constexpr (sizeof(T) == 4) return v[j][i];
    return v[j][i] + w[sizeof(T) == 4 ? 0 : j][i];
  }
};

// f(j, k) for every vector j of a tile, which lies at place k of it. With kRolled a loop that passes the vectors on from
// place to place: unrolled, the addresses and parameters of 8 vectors would not fit into 64 registers.
template <bool kRolled, int kVectors, class Tile, class F>
GK_DEVICE void for_each_vector(Tile& tile, F&& f) {
  if constexpr (kRolled) {
#pragma unroll 1
    for (int j = 0; j < kVectors; ++j) {
      f(j, 0);
      tile.rotate();
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) f(j, j);
  }
}

// sum += the elements of a tile, zeros beyond the row. Exact enough for a mean that the elements nearly cancel.
template <class T, int kVectors, class Tile>
GK_DEVICE void add_elements(const Tile& x, double& sum) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < Vector<T>::kCount; ++i) sum += double(x(j, i));
    } else {  // few bits each: their sum is exact or nearly so
      float part = 0;
#pragma unroll
      for (int i = 0; i < Vector<T>::kCount; ++i) part += x(j, i);
      sum += double(part);
    }
  }
}

template <class T, bool kCentered, bool kResidual, int kVectors, bool kHeld>
GK_DEVICE void normalise_rows(const NormParams& p, const RowLaunch& launch) {
  constexpr int kPer = Vector<T>::kCount;
  using Index = std::conditional_t<kHeld, int, int64_t>;
  using View = RowView<T, Index>;
  constexpr bool kRolled = kVectors > 4;
  GK_SHARED(shared);
  RowGroup group(launch.group, shared);
  const int64_t row = int64_t(blockIdx.x) * group.count() + group.number(), n = p.x.length;
  const Index first = group.rank(), step = group.size;
  const Index length = row < p.x.count ? Index(n) : 0;  // the last block's idle threads take part with rows of nothing
  const auto view = [&](const Rows& rows) { return View(rows, length ? row : 0, launch.wide, length); };
  const View x = view(p.x), residual = kResidual ? view(p.residual) : x;
  std::conditional_t<kResidual, SumTile<T, kVectors>, RowTile<T, kVectors>> tile;
  const auto load = [&](Index at) {
    if constexpr (kResidual)
      tile.load(x, residual, at, step);
    else
      x.load(tile.v, at, step);
  };
  // f(first) with every part of the row that a thread holds at a time in `tile`
  const auto each_tile = [&](auto&& f) {
    if constexpr (kHeld) {
      f(first);
    } else {
      for (Index at = first; at * kPer < length; at += kVectors * step) {
        load(at);
        f(at);
      }
    }
  };
  if (kHeld) load(first);
  const HeldParameter<T, kHeld ? kVectors : 8> weight(p.weight, first, step, length);
  const HeldParameter<T, kHeld ? kVectors : 8> bias(kCentered ? p.bias : Parameter{}, first, step, length);

  double mean = 0;
  if constexpr (kCentered) {
    double sum[1] = {0};
    each_tile([&](Index) { add_elements<T, kVectors>(tile, sum[0]); });
    group.sum(sum);
    tile.forget();
    mean = mean_of(sum[0], launch);
  }
  double squares[1], variance;
  const float center = float(mean);
  const auto sum_squares = [&](float scale) {
    squares[0] = 0;
    each_tile([&](Index at) {
      for_each_vector<kRolled, kVectors>(tile, [&](int j, int k) {
        const Index left = length - (at + j * step) * kPer;  // of the row, from this vector on
        float part = 0;
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          if constexpr (kExact<T, kVectors>) {
            const double d = !kCentered || i < left ? double(tile(k, i)) - mean : 0;
            squares[0] += d * d;
          } else {
            const float d = !kCentered ? tile(k, i) * scale : i < left ? (tile(k, i) - center) * scale : 0;
            part = __fmaf_rn(d, d, part);
          }
        }
        squares[0] += double(part);
      });
    });
    group.sum(squares);
    tile.forget();
  };
  sum_squares(1);
  if constexpr (kExact<T, kVectors>) {
    variance = mean_of(squares[0], launch);
  } else {
    const float scale = rescue_scale(squares[0], p.eps);
    if (group.any(scale != 1)) sum_squares(scale);
    const double rest = mean - double(center);
    const double unscale = scale == 1 ? 1 : scale > 1 ? 0x1p-96 : 0x1p96;
    variance = mean_of(squares[0] * unscale * unscale, launch) - rest * rest;
  }
  const Moments moments = Moments::of(mean, reciprocal_root((variance < 0 ? 0 : variance) + p.eps));

  const View y = view(p.y), sum = kResidual ? view(p.sum) : y;
  each_tile([&](Index at) {
    for_each_vector<kRolled, kVectors>(tile, [&](int j, int k) {
      const Index vector = at + j * step;
      if (vector * kPer >= length) return;
      float w[kPer], b[kPer], out[kPer], in[kPer];
      weight.get(p.weight, j, vector, 1, w);
      if (kCentered) bias.get(p.bias, j, vector, 0, b);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        in[i] = tile(k, i);
        const float normed = moments.normed<kCentered>(in[i]);
        out[i] = kCentered ? __fmaf_rn(normed, w[i], b[i]) : __fmul_rn(normed, w[i]);
      }
      if (kResidual) sum.store(vector, rounded<T>(in));
      y.store(vector, rounded<T>(out));
    });
  });
}

// `kernel(type, vectors, held)` gives the op's kernel for a type and a tile. most_threads_with_8: of its block where each
// thread holds 8 vectors.
template <class Kernel>
cudaError_t launch_norm_forward(const NormParams& p, cudaStream_t stream, const Kernel& kernel) {
  cudaError_t error = cudaSuccess;
  for (const Rows* t : {&p.x, &p.y, &p.residual, &p.sum})
    if (!few_rows(*t)) return cudaErrorInvalidValue;
  switch_gpu_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kSize = int(sizeof(T));
    const bool wide = is_wide(p.x, kSize) && is_wide(p.y, kSize) && is_wide(p.residual, kSize) && is_wide(p.sum, kSize);
    // two tensors of 16-bit elements, held as their terms, leave registers for half the threads
    const int most = p.residual.data && kSize == 2 ? 512 : 1024;
    RowLaunch rows = row_launch(p.x.length, kSize, most);
    rows.wide = wide;
    const int64_t rows_of_block = rows.threads / rows.group;
    const dim3 grid(unsigned((p.x.count + rows_of_block - 1) / rows_of_block));
    const int shared = rows.group > kWarpThreads ? int(sizeof(RowGroup::Shared)) : 0;
    const auto run = [&](auto vectors, auto held) {
      error = launch(kernel(type, vectors, held), grid, rows.threads, shared, stream, p, rows);
    };
    if (rows.vectors == 1) run(std::integral_constant<int, 1>{}, BoolTag<true>{});
    if (rows.vectors == 4) run(std::integral_constant<int, 4>{}, BoolTag<true>{});
    if (rows.vectors == 8) run(std::integral_constant<int, 8>{}, BoolTag<true>{});
    if (rows.vectors == 0) run(std::integral_constant<int, 4>{}, BoolTag<false>{});
  });
  return error;
}

// The most threads of a block of such a kernel: what the compiler divides the registers by.
template <class T, bool kResidual, int kVectors, bool kHeld>
inline constexpr int kNormThreads = !kHeld                        ? kLongRowThreads
                                    : kVectors == 1               ? kShortRowThreads
                                    : kVectors == 4               ? kTileThreads
                                    : kResidual && sizeof(T) == 2 ? 512
                                                                  : 1024;

}  // namespace genai_kernels
