// What a convolution is given beside its images: packed weights, and the numbers of each channel. See conv2d.h.
#include "ops/conv2d/conv2d.h"

#include "cpu/region_headers.h"
#include "core/rows.h"

#define GENAI_KERNELS_ISA_FILE "ops/conv2d/conv2d_numbers_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/staged_row.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

constexpr int64_t kPixelChunk = 32;  // of which a register of channels is read before the next: they stay in the L1

double number_of(const Parameter& p, int64_t i, double if_absent) {
  if (!p.data) return if_absent;
  double x = 0;
  switch_dtype(p.dtype, [&](auto type) {
    x = double(to_compute(static_cast<const typename decltype(type)::type*>(p.data)[i * p.stride]));
  });
  return x;
}
double number_of(const SampleParameter& p, int64_t n, int64_t i, double if_absent) {
  if (!p.row.data) return if_absent;
  Parameter row = p.row;
  row.data = static_cast<const char*>(row.data) + n * p.batch_stride *
                                                      (row.dtype == Dtype::f64   ? 8
                                                       : row.dtype == Dtype::f32 ? 4
                                                                                 : 2);
  return number_of(row, i, if_absent);
}

// The weights of a panel's channels for one tap side by side, written in order; the rows that they are read from go along
// together, and stay in the L1.
template <class T>
void pack_panels(const ConvWeight& w, T* packed, int64_t begin, int64_t end) {
  const int64_t panel = conv_panel(w.out), taps = w.height * w.width;
  const ConvBlocks blocks(w.in, taps);
  for (int64_t which = begin; which < end; ++which) {
    T* to = packed + which * panel * w.in * taps;
    const T* data = static_cast<const T*>(w.data) + which * panel * w.out_stride;
    const int64_t left = w.out - which * panel, there = left < panel ? left : panel;
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t first = blocks.begin(block), depth = blocks.end(block) - first;
      for (int64_t i = 0; i < depth; ++i)
        for (int64_t r = 0; r < w.height; ++r)
          for (int64_t c = 0; c < w.width; ++c) {
            const T* from = data + (first + i) * w.in_stride + r * w.row_stride + c * w.column_stride;
            T* row = to + ((r * w.width + c) * depth + i) * panel;
            for (int64_t o = 0; o < there; ++o) row[o] = from[o * w.out_stride];
            for (int64_t o = there; o < panel; ++o) row[o] = T{};
          }
      to += taps * depth * panel;
    }
  }
}

// G g of a row or a column of three taps, of several channels.
GK_INLINE void transform_taps(const VecD (&g)[3], VecD (&to)[4]) {
  const VecD outer = g[0] + g[2];
  to[0] = g[0];
  to[1] = 0.5 * (outer + g[1]);
  to[2] = 0.5 * (outer - g[1]);
  to[3] = g[2];
}
GK_INLINE void transform_taps(const VecD (&g)[3], VecD (&to)[6]) {
  const VecD outer = g[0] + g[2], far = g[0] + 4.0 * g[2];
  to[0] = g[0] / 4.0;
  to[1] = (outer + g[1]) / -6.0;
  to[2] = (outer - g[1]) / -6.0;
  to[3] = (far + 2.0 * g[1]) / 24.0;
  to[4] = (far - 2.0 * g[1]) / 24.0;
  to[5] = g[2];
}

// U = G g G' of one input channel, its columns side by side.
template <int Size, class T>
void transform_weights(const ConvWeight& w, int64_t first, int64_t channel, int64_t panel, float* to, int64_t plane) {
  constexpr int kStep = kLanesOf<double>;
  typedef float Half __attribute__((vector_size(kRegisterBytes / 2)));
  for (int64_t o = 0; o < panel; o += kStep) {
    double taps[3][3][kStep] = {};  // [column][row]
    const int64_t left = w.out - first - o, there = left < kStep ? left : kStep;
    for (int64_t l = 0; l < there; ++l) {
      const T* from = static_cast<const T*>(w.data) + (first + o + l) * w.out_stride + channel * w.in_stride;
      for (int k = 0; k < 3; ++k)
        for (int t = 0; t < 3; ++t) taps[k][t][l] = double(to_compute(from[t * w.row_stride + k * w.column_stride]));
    }
    VecD half[Size][3], all[Size];
    GK_UNROLL for (int k = 0; k < 3; ++k) {
      VecD g[3];
      __builtin_memcpy(g, taps[k], sizeof g);
      transform_taps(g, all);
      GK_UNROLL for (int r = 0; r < Size; ++r) half[r][k] = all[r];
    }
    GK_UNROLL for (int r = 0; r < Size; ++r) {
      transform_taps(half[r], all);
      GK_UNROLL for (int c = 0; c < Size; ++c) {
        const Half sum = __builtin_convertvector(all[c], Half);
        __builtin_memcpy(to + (Size * r + c) * plane + o, &sum, sizeof sum);
      }
    }
  }
}

template <class T>
void add_taps(const ConvWeight& w, const UpTaps& rows, const UpTaps& columns, Compute<T>* sums, int64_t begin,
              int64_t end) {
  for (int64_t o = begin; o < end; ++o)
    for (int64_t i = 0; i < w.in; ++i) {
      const T* from = static_cast<const T*>(w.data) + o * w.out_stride + i * w.in_stride;
      double taps[3][3];
      for (int r = 0; r < 3; ++r)
        for (int c = 0; c < 3; ++c) taps[r][c] = double(to_compute(from[r * w.row_stride + c * w.column_stride]));
      Compute<T>* to = sums + (o * w.in + i) * rows.count * columns.count;
      for (int a = 0; a < rows.count; ++a)
        for (int b = 0; b < columns.count; ++b, ++to) {
          double sum = 0;
          for (int r = rows.begin(a); r < rows.end(a); ++r)
            for (int c = columns.begin(b); c < columns.end(b); ++c) sum += taps[r][c];
          *to = Compute<T>(sum);
        }
    }
}

// mean and squares [channels] += those of `count` elements more, where there were `before`.
GK_INLINE void merge(double& mean, double& squares, double before, double count, double more_mean,
                     double more_squares) {
  const double share = count / (before + count), delta = more_mean - mean;
  mean += delta * share;
  squares += more_squares + delta * delta * before * share;
}

// A register in double.
template <class V>
constexpr int kDoubles = sizeof(V) / sizeof(V{}[0]) / (kRegisterBytes / 8);
GK_INLINE void widen(VecD x, VecD (&to)[1]) { to[0] = x; }
GK_INLINE void widen(VecF x, VecD (&to)[2]) {
  typedef float Half __attribute__((vector_size(kRegisterBytes / 2)));
  Half half[2];
  __builtin_memcpy(half, &x, sizeof half);
  for (int i = 0; i < 2; ++i) to[i] = __builtin_convertvector(half[i], VecD);
}

// The lanes of a register added up, and their squares, around a center: one of the elements, so that the sums are of the
// size of the deviations.
template <class C>
struct LaneSums {
  static constexpr int kCount = kDoubles<Vec<C>>;
  VecD center[kCount] = {}, sum[kCount] = {}, squares[kCount] = {};

  GK_INLINE void add(Vec<C> x) {
    VecD wide[kCount];
    widen(x, wide);
    GK_UNROLL for (int i = 0; i < kCount; ++i) {
      const VecD d = wide[i] - center[i];
      sum[i] = sum[i] + d;
      squares[i] = fma(d, d, squares[i]);
    }
  }
};

// Channels side by side: [first, last) of a cell. `sums` has room for 2 numbers of each channel and a register.
template <class T>
void moments_of_pixels(const ConvMoments& p, int64_t n, const ConvCells::Cell& cell, int64_t first, int64_t last,
                       double* mean, double* squares, double* sums) {
  using C = Compute<T>;
  using Lanes = LaneSums<C>;
  const int64_t pixels = cell.pixels();
  const T* center = p.image.at<const T>(n, first, cell.row, cell.column);
  for (int64_t begin = 0; begin < pixels; begin += kPixelChunk) {
    const int64_t end = begin + kPixelChunk < pixels ? begin + kPixelChunk : pixels;
    for_each_register<C>(last - first, [&](int64_t c, auto part) GK_LAMBDA_INLINE {
      Lanes lanes;
      if (p.centered) widen(part.load_from(center + c), lanes.center);
      double* kept = sums + 2 * c;
      if (begin > 0) {
        __builtin_memcpy(lanes.sum, kept, sizeof lanes.sum);
        __builtin_memcpy(lanes.squares, kept + kLanesOf<C>, sizeof lanes.squares);
      }
      for (int64_t i = begin, row = i / cell.columns, column = i % cell.columns; i < end; ++i) {
        lanes.add(part.load_from(center + c + row * p.image.row + column * p.image.pixel));
        if (++column == cell.columns) column = 0, ++row;
      }
      __builtin_memcpy(kept, lanes.sum, sizeof lanes.sum);
      __builtin_memcpy(kept + kLanesOf<C>, lanes.squares, sizeof lanes.squares);
    });
  }
  const double count = double(pixels);
  for (int64_t c = 0; c < last - first; ++c) {
    const double* kept = sums + 2 * (c / kLanesOf<C> * kLanesOf<C>)+c % kLanesOf<C>;
    const double rest = kept[0] / count, own = kept[kLanesOf<C>] - kept[0] * rest;
    mean[c] = (p.centered ? double(to_compute(center[c])) : 0) + rest;
    squares[c] = own < 0 ? 0 : own;
  }
}

// The pixels of a row of a channel side by side; x is the first of a cell.
template <class T>
void moments_of_channel(const T* x, const ConvCells::Cell& cell, int64_t row_stride, bool centered, double& mean,
                        double& squares) {
  using C = Compute<T>;
  const double count = double(cell.pixels()), center = centered ? double(to_compute(x[0])) : 0;
  LaneSums<C> lanes;
  GK_UNROLL for (VecD& at : lanes.center) at = broadcast(center);
  const bool dense = row_stride == cell.columns;  // one row then
  for (int64_t row = 0; row < (dense ? 1 : cell.rows); ++row)
    for_each_register<C>(dense ? cell.pixels() : cell.columns, [&](int64_t i, auto part) {
      Vec<C> at = part.load_from(x + row * row_stride + i);
      if constexpr (is_end<decltype(part)>)
        for (int lane = 0; lane < kLanesOf<C>; ++lane)
          if (lane >= part.count) at[lane] = C(center);  // which adds nothing
      lanes.add(at);
    });
  double sum = 0, own = 0;
  for (int i = 0; i < LaneSums<C>::kCount; ++i) {
    sum += horizontal_sum<double>(lanes.sum[i]);
    own += horizontal_sum<double>(lanes.squares[i]);
  }
  const double rest = sum / count;
  own -= sum * rest;
  mean = center + rest;
  squares = own < 0 ? 0 : own;
}

// The moments of the first cell become those of all.
void merge_cells(double* moments, int64_t channels, const ConvCells& cells) {
  double before = double(cells.at(0).pixels());
  for (int64_t cell = 1; cell < cells.count(); ++cell) {
    const double* __restrict more = moments + cell * 2 * channels;
    const double count = double(cells.at(cell).pixels()), share = count / (before + count), both = before * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = more[c] - moments[c];
      moments[c] += delta * share;
      moments[channels + c] += more[channels + c] + delta * delta * both;
    }
    before += count;
  }
}

template <class C>
void norm_sample(const ConvNorm& p, int64_t n) {
  const int64_t width = p.channels / p.groups, skip_channels = p.channels - p.x_channels;
  const int64_t size = 2 * p.cells.count();
  const double pixels = double(p.cells.height * p.cells.width);
  double *of_x = nullptr, *of_skip = nullptr;
  if (p.from_moments && pixels > 0) {
    merge_cells(of_x = p.x + n * size * p.x_channels, p.x_channels, p.cells);
    merge_cells(of_skip = p.skip + n * size * skip_channels, skip_channels, p.cells);
  }
  for (int64_t g = 0; g < p.groups; ++g) {
    double* stats = p.stats + 2 * (n * p.groups + g);
    if (p.from_moments) {
      double squares = 0;
      stats[0] = 0;
      for (int64_t i = 0; i < width && pixels > 0; ++i) {
        const int64_t c = g * width + i;
        const double* own = c < p.x_channels ? of_x + c : of_skip + (c - p.x_channels);
        merge(stats[0], squares, double(i) * pixels, pixels, own[0],
              own[c < p.x_channels ? p.x_channels : skip_channels]);
      }
      stats[1] = 1 / __builtin_sqrt((pixels > 0 ? squares / (double(width) * pixels) : 0) + p.eps);
    }
    if (!p.affine) continue;
    C* center = static_cast<C*>(p.affine) + n * 3 * p.channels;
    const double mean = stats[0], rstd = stats[1];
    // what rounding the mean loses goes into the shift
    const C rounded = C(mean);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const double scale = 1 + number_of(p.scale, n, c, 0);
      const double a = rstd * number_of(p.weight, c, 1) * scale;
      const double b = number_of(p.bias, c, 0) * scale + number_of(p.shift, n, c, 0);
      center[c] = rounded;
      center[c + p.channels] = C(a);
      center[c + 2 * p.channels] = C(b - (mean - double(rounded)) * a);
    }
  }
}

}  // namespace

void conv_pack_weight_kernel(const ConvWeight& w, void* packed, int64_t begin, int64_t end) {
  switch_dtype(w.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    pack_panels<T>(w, static_cast<T*>(packed), begin, end);
  });
}

void winograd_pack_weight_kernel(const ConvWeight& w, int64_t side, float* packed, int64_t begin, int64_t end) {
  const int64_t panel = conv_panel(w.out), numbers = winograd_numbers(side);
  switch_dtype(w.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t which = begin; which < end; ++which)
      for (int64_t i = 0; i < w.in; ++i) {
        float* to = packed + (which * numbers * w.in + i) * panel;
        if (side == 2)
          transform_weights<4, T>(w, which * panel, i, panel, to, w.in * panel);
        else if constexpr (is_same<T, float>)
          transform_weights<6, T>(w, which * panel, i, panel, to, w.in * panel);
      }
  });
}

void conv_up_weight_kernel(const ConvWeight& w, const UpTaps& rows, const UpTaps& columns, void* sums, int64_t begin,
                           int64_t end) {
  switch_dtype(w.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    add_taps<T>(w, rows, columns, static_cast<Compute<T>*>(sums), begin, end);
  });
}

void conv_moments_kernel(const ConvMoments& p, int64_t begin, int64_t end, int64_t first, int64_t last, void* scratch) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / p.cells.count();
      const ConvCells::Cell cell = p.cells.at(item % p.cells.count());
      double *mean = p.moments + item * 2 * p.channels, *squares = mean + p.channels;
      if (p.image.channel == 1)
        moments_of_pixels<T>(p, n, cell, first, last, mean + first, squares + first, static_cast<double*>(scratch));
      else
        for (int64_t c = first; c < last; ++c)
          moments_of_channel(p.image.at<const T>(n, c, cell.row, cell.column), cell, p.image.row, p.centered, mean[c],
                             squares[c]);
    }
  });
}

void conv_norm_kernel(const ConvNorm& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n)
    if (p.dtype == Dtype::f64)
      norm_sample<double>(p, n);
    else
      norm_sample<float>(p, n);
}

void conv_offset_kernel(Dtype dtype, int64_t out, const Parameter& bias, const SampleParameter& channel_bias,
                        void* offset, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n)
    for (int64_t c = 0; c < out; ++c) {
      const double x = number_of(bias, c, 0) + number_of(channel_bias, n, c, 0);
      if (dtype == Dtype::f64)
        static_cast<double*>(offset)[n * out + c] = x;
      else
        static_cast<float*>(offset)[n * out + c] = float(x);
    }
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, conv_pack_weight_kernel,
                           (const ConvWeight& w, void* packed, int64_t begin, int64_t end), (w, packed, begin, end))
GENAI_KERNELS_ISA_DISPATCH(void, winograd_pack_weight_kernel,
                           (const ConvWeight& w, int64_t side, float* packed, int64_t begin, int64_t end),
                           (w, side, packed, begin, end))
GENAI_KERNELS_ISA_DISPATCH(void, conv_up_weight_kernel,
                           (const ConvWeight& w, const UpTaps& rows, const UpTaps& columns, void* sums, int64_t begin,
                            int64_t end),
                           (w, rows, columns, sums, begin, end))
GENAI_KERNELS_ISA_DISPATCH(void, conv_moments_kernel,
                           (const ConvMoments& p, int64_t begin, int64_t end, int64_t first, int64_t last,
                            void* scratch),
                           (p, begin, end, first, last, scratch))
GENAI_KERNELS_ISA_DISPATCH(void, conv_norm_kernel, (const ConvNorm& p, int64_t begin, int64_t end), (p, begin, end))
GENAI_KERNELS_ISA_DISPATCH(void, conv_offset_kernel,
                           (Dtype dtype, int64_t out, const Parameter& bias, const SampleParameter& channel_bias,
                            void* offset, int64_t begin, int64_t end),
                           (dtype, out, bias, channel_bias, offset, begin, end))

#endif
