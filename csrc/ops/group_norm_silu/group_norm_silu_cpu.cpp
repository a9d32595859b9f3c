// group_norm_silu and group_norm_stats on the CPU, forward; the numbers of each channel are in group_norm_affine.h.
//
// Statistics are taken chunk by chunk: channels first the mean, then the squares around it, while the chunk is in L1;
// channels last in one pass, around the mean of the chunk's first pixel. So a mean far larger than the deviation costs no
// digits in either layout. Chunks are merged in order.
#include "cpu/region_headers.h"
#include "ops/group_norm_silu/group_norm_silu.h"

#define GENAI_KERNELS_ISA_FILE "ops/group_norm_silu/group_norm_silu_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/exp.h"
#include "cpu/activations.h"
#include "cpu/group_activation.h"
#include "cpu/staged_row.h"
#include "cpu/row_sums.h"
#include "ops/group_norm_silu/group_norm_affine.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// ---- statistics ----

template <class T>
GK_INLINE void add_residual(const T* x, const T* residual, T* sum, int64_t n) {
  for_each_register<Compute<T>>(
      n, [&](int64_t i, auto part) { part.store_to(sum + i, part.load_from(x + i) + part.load_from(residual + i)); });
}

// A number near x with few bits: then x - center is exact for nearly all x, where otherwise all elements of a binade would
// be rounded in one direction, and their mean with them.
template <class C>
GK_INLINE C center_near(double x) {
  if constexpr (sizeof(C) == 8) return x;
  return bit_cast<float>(bit_cast<uint32_t>(float(x)) & 0xfffff000);
}

// From the sums of d = x - center, in double since they decide the mean, and of d^2. False where they have lost digits: the elements leave the range of floats,
// or the center lies further from the mean than a few deviations.
template <class C>
GK_INLINE bool moments_around(double count, double center, double sum, double squares, double eps, Moments& to) {
  const double off = sum / count, left = squares - sum * off;
  to = {count, center + off, left < 0 ? 0 : left};
  return rescue_scale<C>(squares, eps) == 1 && sum * off <= 16 * left;
}

// Of a row: its mean in double, then the squares around that mean.
template <class T>
Moments row_moments(const T* x, int64_t n, double eps) {
  using C = Compute<T>;
  const double mean = row_sum(x, n) / double(n);
  if (n <= kShortRow) return {double(n), mean, short_row_squares(x, n, mean)};
  // 16 bits have few values, whose squares round in one direction too; they have no mean beyond 2^11 deviations.
  const C center = sizeof(T) == 2 ? center_near<C>(mean) : C(mean);
  const double rest = mean - center;
  double sum[1];
  const auto sum_squares = [&](C scale) {
    sum_row<C>(n, sum, [&, scale](int64_t i, auto part, Vec<C>* acc) {
      const Vec<C> v = part.or_zero(part.load_from(x + i) - center) * scale;
      acc[0] = fma(v, v, acc[0]);
    });
  };
  sum_squares(1);
  const C scale = rescue_scale<C>(sum[0], eps);
  if (scale != 1) [[unlikely]]
    sum_squares(scale);
  const double squares = sum[0] / (double(scale) * scale) - double(n) * rest * rest;
  return {double(n), mean, squares < 0 ? 0 : squares};
}

// f(c, part, count) for the registers of channels [begin, end), up to four at a time.
template <class C, class F>
GK_INLINE void for_each_channel(int64_t begin, int64_t end, F&& f) {
  constexpr int kStep = kLanesOf<C>;
  int64_t c = begin;
  for (; c + 4 * kStep <= end; c += 4 * kStep) f(c, Whole{}, IntTag<4>{});
  for (; c + kStep <= end; c += kStep) f(c, Whole{}, IntTag<1>{});
  if (c < end) f(c, End{end - c}, IntTag<1>{});
}

// Of a group of channels last, in double; x is its first channel at the first pixel.
template <class T>
Moments moments_in_double(const T* x, int64_t width, int64_t stride, int64_t pixels) {
  Moments moments{double(width * pixels), 0, 0};
  const auto for_each_element = [&](auto&& f) {
    for (int64_t i = 0; i < pixels; ++i)
      for (int64_t c = 0; c < width; ++c) f(double(to_compute(x[i * stride + c])));
  };
  for_each_element([&](double v) { moments.mean += v; });
  moments.mean /= moments.count;
  for_each_element([&](double v) { moments.squares += (v - moments.mean) * (v - moments.mean); });
  return moments;
}

// Of each group of a slab over `pixels` pixels, channels last; x is the first pixel's. `center` has room for a number of
// each channel, `sums` for two doubles.
template <class T>
void chunk_moments(const GroupNormParams& p, const GroupSlab& slab, const T* x, int64_t stride, int64_t pixels,
                   Moments* moments, Compute<T>* center, double* sums) {
  using C = Compute<T>;
  constexpr int kStep = kLanesOf<C>;
  constexpr int64_t kInFloat = 32;  // pixels whose squares meet in floats before they go to doubles
  const int64_t width = p.group_channels(), begin = slab.group_begin * width, end = slab.group_end * width;
  if (p.group_elements() <= kShortRow) {  // the rounding of a single square shows
    for (int64_t g = slab.group_begin; g < slab.group_end; ++g)
      moments[g] = moments_in_double(x + g * width, width, stride, pixels);
    return;
  }
  for (int64_t g = slab.group_begin; g < slab.group_end; ++g) {
    double first = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) first += to_compute(x[c]);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) center[c] = center_near<C>(first / double(width));
  }
  double* squares = sums + p.channels;
  for_each_channel<C>(begin, end, [&](int64_t c, auto part, auto registers) {
    ColumnSums<C> total[registers.value], total_squares[registers.value];
    Vec<C> at[registers.value];
    GK_UNROLL for (int j = 0; j < registers.value; ++j) at[j] = part.load_from(center + c + j * kStep);
    for (int64_t i = 0; i < pixels;) {
      const int64_t last = i + kInFloat < pixels ? i + kInFloat : pixels;
      Vec<C> square[registers.value] = {};
      for (; i < last; ++i) GK_UNROLL for (int j = 0; j < registers.value; ++j) {
          const Vec<C> d = part.load_from(x + i * stride + c + j * kStep) - at[j];
          total[j].add(d);
          square[j] = fma(d, d, square[j]);
        }
      GK_UNROLL for (int j = 0; j < registers.value; ++j) total_squares[j].add(square[j]);
    }
    GK_UNROLL for (int j = 0; j < registers.value; ++j) {
      total[j].put(sums + c + j * kStep, part);
      total_squares[j].put(squares + c + j * kStep, part);
    }
  });
  for (int64_t g = slab.group_begin; g < slab.group_end; ++g) {
    double sum = 0, square = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      sum += sums[c];
      square += squares[c];
    }
    if (!moments_around<C>(double(width * pixels), center[g * width], sum, square, p.eps, moments[g])) [[unlikely]]
      moments[g] = moments_in_double(x + g * width, width, stride, pixels);
  }
}

// Of each group of a slab in one block, to moments[group]; x + residual is written first where there is a residual.
// `chunk` has room for the moments of every group, `center` and `sums` as above. Not inlined: one copy for all activations
// is compiled in a third of the time.
template <class T>
[[gnu::noinline]] void block_moments(const GroupNormParams& p, const GroupSlab& slab, const ReductionBlocks& blocks,
                                     int64_t block, Moments* moments, Moments* chunk, Compute<T>* center,
                                     double* sums) {
  const int64_t width = p.group_channels(), channel = slab.group_begin * width;
  const int64_t channels = (slab.group_end - slab.group_begin) * width;
  const Image& from = p.residual.data ? p.sum : p.x;
  for (int64_t g = slab.group_begin; g < slab.group_end; ++g) moments[g] = {};
  for (int64_t i = blocks.begin(block); i < blocks.end(block); i += blocks.chunk) {
    const int64_t left = blocks.end(block) - i, length = left < blocks.chunk ? left : blocks.chunk;
    if (p.channels_last) {
      for (int64_t j = i; p.residual.data && j < i + length; ++j)
        add_residual(p.x.line<T>(slab.n, j) + channel, p.residual.line<T>(slab.n, j) + channel,
                     p.sum.line<T>(slab.n, j) + channel, channels);
      chunk_moments<T>(p, slab, from.line<T>(slab.n, i), from.line_stride, length, chunk, center, sums);
    } else {
      if (p.residual.data)
        add_residual(p.x.line<T>(slab.n, channel) + i, p.residual.line<T>(slab.n, channel) + i,
                     p.sum.line<T>(slab.n, channel) + i, length);
      chunk[slab.group_begin] = row_moments(from.line<T>(slab.n, channel) + i, length, p.eps);
    }
    for (int64_t g = slab.group_begin; g < slab.group_end; ++g) moments[g].add(chunk[g]);
  }
}

// ---- the result ----

template <class Activation, class T>
void apply_channels(const GroupNormParams& p, const Affine<Compute<T>>& at, int64_t n, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const Image& from = p.residual.data ? p.sum : p.x;
  for (int64_t c = begin; c < end; ++c) {
    const Vec<C> center = broadcast(at.center[c]), alpha = broadcast(at.alpha[c]), beta = broadcast(at.beta[c]);
    const T* x = from.line<T>(n, c);
    T* y = p.y.line<T>(n, c);
    for_each_register<C>(p.pixels, [&](int64_t i, auto part) {
      part.store_to(y + i, Activation::value(fma(part.load_from(x + i) - center, alpha, beta)));
    });
  }
}

template <class Activation, class T>
void apply_pixels(const GroupNormParams& p, const Affine<Compute<T>>& at, const GroupSlab& slab, int64_t begin,
                  int64_t end) {
  using C = Compute<T>;
  const Image& from = p.residual.data ? p.sum : p.x;
  const int64_t width = p.group_channels(), first = slab.group_begin * width, count = slab.group_end * width - first;
  const C *center = at.center + first, *alpha = at.alpha + first, *beta = at.beta + first;
  for (int64_t i = begin; i < end; ++i) {
    const T* x = from.line<T>(slab.n, i) + first;
    T* y = p.y.line<T>(slab.n, i) + first;
    for_each_register<C>(count, [&](int64_t c, auto part) {
      const Vec<C> d = part.load_from(x + c) - part.load_from(center + c);
      part.store_to(y + c, Activation::value(fma(d, part.load_from(alpha + c), part.load_from(beta + c))));
    });
  }
}

template <class Activation, class T>
void forward(const GroupNormParams& p, const GroupSlabs& slabs, int64_t begin, int64_t end, double* scratch) {
  const int64_t n = p.channels, width = p.group_channels();
  const ReductionBlocks blocks(p);
  Affine<Compute<T>> at(p, scratch);
  double* sums = scratch + 12 * n;
  Moments *total = reinterpret_cast<Moments*>(scratch + 14 * n), *block = total + n, *chunk = block + n;
  for (int64_t i = begin; i < end; ++i) {
    const GroupSlab slab = slabs[i];
    for (int64_t g = slab.group_begin; g < slab.group_end; ++g) total[g] = {};
    for (int64_t b = 0; b < blocks.count(); ++b) {
      block_moments<T>(p, slab, blocks, b, block, chunk, at.center, sums);
      for (int64_t g = slab.group_begin; g < slab.group_end; ++g) total[g].add(block[g]);
    }
    for (int64_t g = slab.group_begin; g < slab.group_end; ++g)
      total[g].to_stats(p.eps, p.stats + 2 * (slab.n * p.groups + g));
    at.set(slab);
    if (p.channels_last)
      apply_pixels<Activation, T>(p, at, slab, 0, p.pixels);
    else
      apply_channels<Activation, T>(p, at, slab.n, slab.group_begin * width, slab.group_end * width);
  }
}

template <class Activation, class T>
void apply(const GroupNormParams& p, int64_t begin, int64_t end, double* scratch) {
  const int64_t width = p.group_channels();
  const int64_t pieces = p.channels_last ? (p.pixels + kPixelPiece - 1) / kPixelPiece : p.channels;
  Affine<Compute<T>> at(p, scratch);
  int64_t set_for = -1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / pieces, piece = i % pieces;
    if (p.channels_last) {
      const GroupSlab slab{n, 0, p.groups};
      if (set_for != n) at.set(slab);
      set_for = n;
      const int64_t first = piece * kPixelPiece, last = first + kPixelPiece;
      apply_pixels<Activation, T>(p, at, slab, first, last < p.pixels ? last : p.pixels);
    } else {
      const int64_t g = piece / width;
      if (set_for != n * p.groups + g) at.set({n, g, g + 1});
      set_for = n * p.groups + g;
      apply_channels<Activation, T>(p, at, n, piece, piece + 1);
    }
  }
}

}  // namespace

void group_norm_fwd_kernel(const GroupNormParams& p, const GroupSlabs& slabs, int64_t begin, int64_t end,
                           void* scratch) {
  switch_dtype(p.dtype, [&](auto type) {
    switch_activation(p.activation, [&](auto activation) {
      forward<typename decltype(activation)::type, typename decltype(type)::type>(p, slabs, begin, end,
                                                                                  static_cast<double*>(scratch));
    });
  });
}

void group_norm_moments_kernel(const GroupNormParams& p, const GroupSlabs& slabs, Moments* moments, int64_t begin,
                               int64_t end, void* scratch) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const ReductionBlocks blocks(p);
    double* sums = static_cast<double*>(scratch);
    Moments* chunk = reinterpret_cast<Moments*>(sums + 2 * p.channels);
    auto* center = reinterpret_cast<Compute<T>*>(chunk + p.channels);
    for (int64_t i = begin; i < end; ++i) {
      const GroupSlab slab = slabs[i / blocks.count()];
      const int64_t block = i % blocks.count();
      block_moments<T>(p, slab, blocks, block, moments + (slab.n * blocks.count() + block) * p.groups, chunk, center,
                       sums);
    }
  });
}

void group_norm_apply_kernel(const GroupNormParams& p, int64_t begin, int64_t end, void* scratch) {
  switch_dtype(p.dtype, [&](auto type) {
    switch_activation(p.activation, [&](auto activation) {
      apply<typename decltype(activation)::type, typename decltype(type)::type>(p, begin, end,
                                                                                static_cast<double*>(scratch));
    });
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, group_norm_fwd_kernel,
                           (const GroupNormParams& p, const GroupSlabs& slabs, int64_t begin, int64_t end,
                            void* scratch),
                           (p, slabs, begin, end, scratch))
GENAI_KERNELS_ISA_DISPATCH(void, group_norm_moments_kernel,
                           (const GroupNormParams& p, const GroupSlabs& slabs, Moments* moments, int64_t begin,
                            int64_t end, void* scratch),
                           (p, slabs, moments, begin, end, scratch))
GENAI_KERNELS_ISA_DISPATCH(void, group_norm_apply_kernel,
                           (const GroupNormParams& p, int64_t begin, int64_t end, void* scratch),
                           (p, begin, end, scratch))

#endif
