// group_norm_silu on the CPU, backward. With z = x^ A + B, y = act(z), dz = dy act'(z) and g = dz A, over a group:
//
//   dx = rstd (g - mean(g) - x^ mean(g x^)),   and with s1 = sum of dz and s2 = sum of dz x^ over a channel's pixels:
//   dweight = sum of s2 (1 + scale),  dbias = sum of s1 (1 + scale) over samples,  dscale = s2 w + s1 b,  dshift = s1
//
// A slab that stays in cache has its dz kept there between the sums and dx; of others it is computed twice. dx is the only
// thing written at full size.
#include "cpu/region_headers.h"
#include "ops/group_norm_silu/group_norm_silu.h"

#define GENAI_KERNELS_ISA_FILE "ops/group_norm_silu/group_norm_silu_bwd_cpu.cpp"
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

// s1 and s2 of a channel from the sums of dz and of dz (x - center) rstd, where center and rstd are rounded.
GK_INLINE void finish_sums(const GroupNormParams& p, int64_t n, int64_t c, double& s1, double& s2, double rounded) {
  const double* stats = p.stats + 2 * (n * p.groups + c / p.group_channels());
  const double lost = p.dtype == Dtype::f64 ? 0 : stats[0] - float(stats[0]);
  s2 = s2 * (stats[1] / rounded) - lost * stats[1] * s1;
}

// Channels first: of channels [begin, end). `kept`, if given, gets their dz, pixel by pixel of one channel after the other.
template <class Activation, class T>
void channel_sums(const GroupNormParams& p, const Affine<Compute<T>>& at, int64_t n, int64_t begin, int64_t end,
                  double* s1, double* s2, Compute<T>* kept) {
  using C = Compute<T>;
  for (int64_t c = begin; c < end; ++c) {
    const Vec<C> center = broadcast(at.center[c]), alpha = broadcast(at.alpha[c]), beta = broadcast(at.beta[c]);
    const Vec<C> rstd = broadcast(at.rstd[c]);
    const T *x = p.x.line<T>(n, c), *dy = p.dy.line<T>(n, c);
    C* dz_line = kept ? kept + (c - begin) * p.pixels : nullptr;
    double sums[2];
    sum_row<C>(p.pixels, sums, [&](int64_t i, auto part, Vec<C>* acc) {
      const Vec<C> d = part.load_from(x + i) - center;
      const Vec<C> dz = part.or_zero(part.load_from(dy + i) * Activation::slope(fma(d, alpha, beta)));
      if (dz_line) part.store_to(dz_line + i, dz);
      acc[0] = acc[0] + dz;
      acc[1] = fma(dz, part.or_zero(d * rstd), acc[1]);
    });
    s1[c] = sums[0];
    s2[c] = sums[1];
    finish_sums(p, n, c, s1[c], s2[c], at.rstd[c]);
  }
}

// Channels last: added to the sums of the slab's channels, over pixels [begin, end), as yet unfinished. `kept`, if given,
// gets their dz, channel by channel of one pixel after the other, from pixel 0 on.
template <class Activation, class T>
void pixel_sums(const GroupNormParams& p, const Affine<Compute<T>>& at, const GroupSlab& slab, int64_t begin,
                int64_t end, double* s1, double* s2, Compute<T>* kept) {
  using C = Compute<T>;
  const int64_t width = p.group_channels(), first = slab.group_begin * width, count = slab.group_end * width - first;
  constexpr int64_t kInFloat = 4;  // pixels whose terms meet in floats before they go to doubles
  for (int64_t i = begin; i < end; i += kPixelPiece) {
    const int64_t last = i + kPixelPiece < end ? i + kPixelPiece : end;
    // A register's pixels lie too far apart for the hardware to see that the next piece will be needed.
    for (int64_t pixel = last; pixel < last + kPixelPiece && pixel < end; ++pixel)
      for (int64_t c = 0; c < count; c += 64 / int64_t(sizeof(T))) {
        __builtin_prefetch(p.x.line<T>(slab.n, pixel) + first + c, 0, 2);
        __builtin_prefetch(p.dy.line<T>(slab.n, pixel) + first + c, 0, 2);
      }
    for_each_register<C>(count, [&](int64_t j, auto part) {
      const int64_t c = first + j;
      const Vec<C> center = part.load_from(at.center + c), alpha = part.load_from(at.alpha + c);
      const Vec<C> beta = part.load_from(at.beta + c), rstd = part.load_from(at.rstd + c);
      ColumnSums<C> sums, products;
      for (int64_t pixel = i; pixel < last;) {
        const int64_t few = pixel + kInFloat < last ? pixel + kInFloat : last;
        Vec<C> sum = {}, product = {};
        for (; pixel < few; ++pixel) {
          const Vec<C> d = part.load_from(p.x.line<T>(slab.n, pixel) + c) - center;
          const Vec<C> dz = part.load_from(p.dy.line<T>(slab.n, pixel) + c) * Activation::slope(fma(d, alpha, beta));
          if (kept) part.store_to(kept + pixel * count + j, dz);
          sum = sum + dz;
          product = fma(dz, d * rstd, product);
        }
        sums.add(sum);
        products.add(product);
      }
      sums.add_to(s1 + c, part);
      products.add_to(s2 + c, part);
    });
  }
}

// mean_g and pull of the slab's groups, from its finished sums.
template <class C>
void set_pulls(const GroupNormParams& p, const GroupSlab& slab, Affine<C>& at, const double* s1, const double* s2) {
  const int64_t width = p.group_channels();
  for (int64_t g = slab.group_begin; g < slab.group_end; ++g) {
    double sum = 0, product = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      sum += double(at.factor[c]) * s1[c];  // the rounded factor: where all g are equal, dx is exactly 0
      product += double(at.factor[c]) * s2[c];
    }
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      at.mean_g[c] = C(sum / double(p.group_elements()));
      at.pull[c] = C(-product / double(p.group_elements()));
    }
  }
}

template <class V>
GK_INLINE V gradient(V d, V dz, V factor, V rstd, V rest, V mean_g, V pull) {
  const V g = dz * factor - mean_g;  // not fused: see set_pulls
  return fma(fma(d, rstd, rest), pull, g) * rstd;
}

template <class Activation, class T>
void dx_channels(const GroupNormParams& p, const Affine<Compute<T>>& at, int64_t n, int64_t begin, int64_t end,
                 const Compute<T>* kept) {
  using C = Compute<T>;
  for (int64_t c = begin; c < end; ++c) {
    const Vec<C> center = broadcast(at.center[c]), alpha = broadcast(at.alpha[c]), beta = broadcast(at.beta[c]),
                 factor = broadcast(at.factor[c]), rstd = broadcast(at.rstd[c]), rest = broadcast(at.rest[c]),
                 mean_g = broadcast(at.mean_g[c]), pull = broadcast(at.pull[c]);
    const T *x = p.x.line<T>(n, c), *dy = p.dy.line<T>(n, c);
    const T* dsum = p.dsum.data ? p.dsum.line<T>(n, c) : nullptr;
    T* dx = p.dx.line<T>(n, c);
    const C* dz_line = kept ? kept + (c - begin) * p.pixels : nullptr;
    for_each_register<C>(p.pixels, [&](int64_t i, auto part) {
      const Vec<C> d = part.load_from(x + i) - center;
      const Vec<C> dz =
          dz_line ? part.load_from(dz_line + i) : part.load_from(dy + i) * Activation::slope(fma(d, alpha, beta));
      const Vec<C> own = gradient(d, dz, factor, rstd, rest, mean_g, pull);
      part.store_to(dx + i, dsum ? own + part.load_from(dsum + i) : own);
    });
  }
}

template <class Activation, class T>
void dx_pixels(const GroupNormParams& p, const Affine<Compute<T>>& at, const GroupSlab& slab, int64_t begin,
               int64_t end, const Compute<T>* kept) {
  using C = Compute<T>;
  const int64_t width = p.group_channels(), first = slab.group_begin * width, count = slab.group_end * width - first;
  for (int64_t i = begin; i < end; ++i) {
    const T *x = p.x.line<T>(slab.n, i), *dy = p.dy.line<T>(slab.n, i);
    const T* dsum = p.dsum.data ? p.dsum.line<T>(slab.n, i) : nullptr;
    T* dx = p.dx.line<T>(slab.n, i);
    for_each_register<C>(count, [&](int64_t j, auto part) {
      const int64_t c = first + j;
      const auto of = [&](const C* numbers) { return part.load_from(numbers + c); };
      const Vec<C> d = part.load_from(x + c) - of(at.center);
      const Vec<C> dz = kept ? part.load_from(kept + i * count + j)
                             : part.load_from(dy + c) * Activation::slope(fma(d, of(at.alpha), of(at.beta)));
      const Vec<C> own = gradient(d, dz, of(at.factor), of(at.rstd), of(at.rest), of(at.mean_g), of(at.pull));
      part.store_to(dx + c, dsum ? own + part.load_from(dsum + c) : own);
    });
  }
}

template <class Activation, class T>
void backward(const GroupNormParams& p, const GroupSlabs& slabs, double* sums, int64_t begin, int64_t end,
              double* scratch) {
  const int64_t channels = p.channels, width = p.group_channels();
  const ReductionBlocks blocks(p);
  Affine<Compute<T>> at(p, scratch);
  double *block1 = scratch + 12 * channels, *block2 = block1 + channels;
  Compute<T>* kept = reinterpret_cast<Compute<T>*>(scratch + kGroupNormScratch * channels);
  for (int64_t i = begin; i < end; ++i) {
    const GroupSlab slab = slabs[i];
    const int64_t first = slab.group_begin * width, last = slab.group_end * width;
    double *s1 = sums + 2 * slab.n * channels, *s2 = s1 + channels;
    at.set(slab);
    if (p.channels_last) {
      for (int64_t c = first; c < last; ++c) s1[c] = s2[c] = 0;
      for (int64_t b = 0; b < blocks.count(); ++b) {
        for (int64_t c = first; c < last; ++c) block1[c] = block2[c] = 0;
        pixel_sums<Activation, T>(p, at, slab, blocks.begin(b), blocks.end(b), block1, block2, kept);
        for (int64_t c = first; c < last; ++c) {
          s1[c] += block1[c];
          s2[c] += block2[c];
        }
      }
      for (int64_t c = first; c < last; ++c) finish_sums(p, slab.n, c, s1[c], s2[c], at.rstd[c]);
      set_pulls(p, slab, at, s1, s2);
      dx_pixels<Activation, T>(p, at, slab, 0, p.pixels, kept);
    } else {
      channel_sums<Activation, T>(p, at, slab.n, first, last, s1, s2, kept);
      set_pulls(p, slab, at, s1, s2);
      dx_channels<Activation, T>(p, at, slab.n, first, last, kept);
    }
  }
}

template <class Activation, class T>
void sums_of(const GroupNormParams& p, double* sums, int64_t begin, int64_t end, double* scratch) {
  const int64_t channels = p.channels, width = p.group_channels();
  const ReductionBlocks blocks(p);
  Affine<Compute<T>> at(p, scratch);
  for (int64_t i = begin; i < end; ++i) {
    if (p.channels_last) {
      const GroupSlab slab{i / blocks.count(), 0, p.groups};
      const int64_t block = i % blocks.count();
      at.set(slab);
      double* s1 = sums + 2 * i * channels;
      for (int64_t c = 0; c < 2 * channels; ++c) s1[c] = 0;
      pixel_sums<Activation, T>(p, at, slab, blocks.begin(block), blocks.end(block), s1, s1 + channels, nullptr);
    } else {
      const int64_t n = i / channels, c = i % channels, g = c / width;
      at.set({n, g, g + 1});
      double* s1 = sums + 2 * n * channels;
      channel_sums<Activation, T>(p, at, n, c, c + 1, s1, s1 + channels, nullptr);
    }
  }
}

template <class Activation, class T>
void dx_of(const GroupNormParams& p, const double* sums, int64_t begin, int64_t end, double* scratch) {
  const int64_t channels = p.channels, width = p.group_channels();
  const int64_t pieces = p.channels_last ? (p.pixels + kPixelPiece - 1) / kPixelPiece : channels;
  Affine<Compute<T>> at(p, scratch);
  int64_t set_for = -1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / pieces, piece = i % pieces, g = piece / width;
    const GroupSlab slab = p.channels_last ? GroupSlab{n, 0, p.groups} : GroupSlab{n, g, g + 1};
    const int64_t which = p.channels_last ? n : n * p.groups + g;
    if (set_for != which) {
      at.set(slab);
      set_pulls(p, slab, at, sums + 2 * n * channels, sums + (2 * n + 1) * channels);
      set_for = which;
    }
    if (p.channels_last) {
      const int64_t first = piece * kPixelPiece, last = first + kPixelPiece;
      dx_pixels<Activation, T>(p, at, slab, first, last < p.pixels ? last : p.pixels, nullptr);
    } else {
      dx_channels<Activation, T>(p, at, n, piece, piece + 1, nullptr);
    }
  }
}

template <class F>
GK_INLINE void switch_types(const GroupNormParams& p, F&& f) {
  switch_dtype(p.dtype, [&](auto type) { switch_activation(p.activation, [&](auto act) { f(act, type); }); });
}

// Element `i` of a parameter's gradient.
GK_INLINE void put(const Parameter& to, int64_t i, double value) {
  switch_dtype(to.dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    static_cast<W*>(const_cast<void*>(to.data))[i * to.stride] = from_compute<W>(Compute<W>(value));
  });
}

}  // namespace

void group_norm_bwd_kernel(const GroupNormParams& p, const GroupSlabs& slabs, double* sums, int64_t begin, int64_t end,
                           void* scratch) {
  switch_types(p, [&](auto act, auto type) {
    backward<typename decltype(act)::type, typename decltype(type)::type>(p, slabs, sums, begin, end,
                                                                          static_cast<double*>(scratch));
  });
}

void group_norm_sums_kernel(const GroupNormParams& p, double* sums, int64_t begin, int64_t end, void* scratch) {
  switch_types(p, [&](auto act, auto type) {
    sums_of<typename decltype(act)::type, typename decltype(type)::type>(p, sums, begin, end,
                                                                         static_cast<double*>(scratch));
  });
}

void group_norm_finish_kernel(const GroupNormParams& p, const double* partial, double* sums, int64_t begin,
                              int64_t end) {
  const int64_t blocks = ReductionBlocks(p).count(), channels = p.channels;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / channels, c = i % channels;
    double s1 = 0, s2 = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      s1 += partial[2 * (n * blocks + b) * channels + c];
      s2 += partial[(2 * (n * blocks + b) + 1) * channels + c];
    }
    const double rstd = p.stats[2 * (n * p.groups + c / p.group_channels()) + 1];
    finish_sums(p, n, c, s1, s2, p.dtype == Dtype::f64 ? rstd : double(float(rstd)));
    sums[2 * n * channels + c] = s1;
    sums[(2 * n + 1) * channels + c] = s2;
  }
}

void group_norm_dx_kernel(const GroupNormParams& p, const double* sums, int64_t begin, int64_t end, void* scratch) {
  switch_types(p, [&](auto act, auto type) {
    dx_of<typename decltype(act)::type, typename decltype(type)::type>(p, sums, begin, end,
                                                                       static_cast<double*>(scratch));
  });
}

void group_norm_parameters_kernel(const GroupNormParams& p, const double* sums, const GroupNormParameterGrads& grads,
                                  int64_t begin, int64_t end, void* scratch) {
  const int64_t count = end - begin;
  double* staged = static_cast<double*>(scratch);
  const auto part_of = [&](Parameter whole, double if_absent, double* to) {
    return stage_parameter<double>(whole.data ? at_sample({whole, 0}, 0, begin) : whole, count, if_absent, to);
  };
  const double *weight = part_of(p.weight, 1, staged), *bias = part_of(p.bias, 0, staged + count);
  for (int64_t n = 0; n < p.batch; ++n) {
    const double *s1 = sums + 2 * n * p.channels + begin, *s2 = s1 + p.channels;
    const double* scale = part_of(p.scale.row.data ? at_sample(p.scale, n, 0) : Parameter{}, 0, staged + 2 * count);
    for (int64_t c = 0; c < count; ++c) {
      if (grads.dw) grads.dw[begin + c] += s2[c] * (1 + scale[c]);
      if (grads.db) grads.db[begin + c] += s1[c] * (1 + scale[c]);
      if (grads.dscale.row.data) put(at_sample(grads.dscale, n, begin), c, s2[c] * weight[c] + s1[c] * bias[c]);
      if (grads.dshift.row.data) put(at_sample(grads.dshift, n, begin), c, s1[c]);
    }
  }
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, group_norm_bwd_kernel,
                           (const GroupNormParams& p, const GroupSlabs& slabs, double* sums, int64_t begin, int64_t end,
                            void* scratch),
                           (p, slabs, sums, begin, end, scratch))
GENAI_KERNELS_ISA_DISPATCH(void, group_norm_sums_kernel,
                           (const GroupNormParams& p, double* sums, int64_t begin, int64_t end, void* scratch),
                           (p, sums, begin, end, scratch))
GENAI_KERNELS_ISA_DISPATCH(void, group_norm_finish_kernel,
                           (const GroupNormParams& p, const double* partial, double* sums, int64_t begin, int64_t end),
                           (p, partial, sums, begin, end))
GENAI_KERNELS_ISA_DISPATCH(void, group_norm_dx_kernel,
                           (const GroupNormParams& p, const double* sums, int64_t begin, int64_t end, void* scratch),
                           (p, sums, begin, end, scratch))
GENAI_KERNELS_ISA_DISPATCH(void, group_norm_parameters_kernel,
                           (const GroupNormParams& p, const double* sums, const GroupNormParameterGrads& grads,
                            int64_t begin, int64_t end, void* scratch),
                           (p, sums, grads, begin, end, scratch))

#endif
