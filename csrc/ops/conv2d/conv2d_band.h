// What forward and the weight's gradient share: packing a part of the input, and the product of a tile of registers.
// Included inside an instruction-set region after group_activation.h, staged_row.h, transpose.h and attention_pack.h.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// A part of an image: rows and pixels that may lie outside of it, where there are zeros.
struct Window {
  int64_t row, rows, column, columns;
};

// One channel's numbers of the norm, from channel c on; all null where there is none.
template <class C>
struct ChannelNumbers {
  const C *center, *alpha, *beta;
};

struct NoNorm {
  template <class Part, class C>
  GK_INLINE static Vec<C> apply(Part, Vec<C> x, const ChannelNumbers<C>&, int64_t) {
    return x;
  }
};
template <class Activation>
struct Normed {
  template <class Part, class C>
  GK_INLINE static Vec<C> apply(Part part, Vec<C> x, const ChannelNumbers<C>& at, int64_t c) {
    const Vec<C> d = x - part.load_from(at.center + c);
    return Activation::value(fma(d, part.load_from(at.alpha + c), part.load_from(at.beta + c)));
  }
};

// One register's worth of elements from p, `stride` apart; zeros past `count`.
template <class T>
GK_INLINE Vec<Compute<T>> load_strided(const T* p, int64_t stride, int64_t count) {
  using C = Compute<T>;
  if (stride == 1) return count >= kLanesOf<C> ? load(p) : load_first(p, count);
  T lanes[kLanesOf<C>] = {};
  for (int64_t i = 0; i < kLanesOf<C> && i < count; ++i) lanes[i] = p[i * stride];
  return load(lanes);
}

// to[pixel][stride] = `count` channels of pixels [begin, end) of a row of an image that begins at `from`.
template <class Norm, class T>
[[gnu::nothrow]] void pack_pixels(const T* from, int64_t channel_stride, int64_t pixel_stride, int64_t count,
                                  int64_t begin, int64_t end, const ChannelNumbers<Compute<T>>& at, Compute<T>* to,
                                  int64_t stride) {
  using C = Compute<T>;
  if (channel_stride == 1 || count == 1) {
    for (int64_t i = begin; i < end; ++i, to += stride) {
      const T* pixel = from + i * pixel_stride;
      for_each_register<C>(count, [&](int64_t c, auto part) GK_LAMBDA_INLINE {
        part.store_to(to + c, Norm::template apply<decltype(part), C>(part, part.load_from(pixel + c), at, c));
      });
    }
    return;
  }
  constexpr int kStep = kLanesOf<C>;
  for (int64_t i = begin; i < end; i += kStep) {
    const int64_t pixels = min_of<int64_t>(kStep, end - i);
    for_each_register<C>(count, [&](int64_t c, auto part) {
      Vec<C> x[kStep];
      for (int l = 0; l < kStep; ++l)
        x[l] = c + l < count ? load_strided(from + (c + l) * channel_stride + i * pixel_stride, pixel_stride, pixels)
                             : Vec<C>{};
      transpose(x);
      for (int64_t l = 0; l < pixels; ++l)
        part.store_to(to + (i - begin + l) * stride + c, Norm::template apply<decltype(part), C>(part, x[l], at, c));
    });
  }
}

// to[row][column][stride] = channels [begin, end) of the window of image n.
template <class Norm, class T>
[[gnu::nothrow]] void pack_window(const ConvParams& p, int64_t n, const Window& window, int64_t begin, int64_t end,
                                  Compute<T>* to, int64_t stride) {
  using C = Compute<T>;
  const int64_t left = max_of<int64_t>(window.column, 0);
  const int64_t right = max_of(min_of(window.column + window.columns, p.width), left);
  const auto zero = [&](C* at, int64_t pixels) { __builtin_memset(at, 0, pixels * stride * sizeof(C)); };
  for (int64_t r = 0; r < window.rows; ++r, to += window.columns * stride) {
    const int64_t row = window.row + r;
    if (row < 0 || row >= p.height || right == left) {
      zero(to, window.columns);
      continue;
    }
    zero(to, left - window.column);
    zero(to + (right - window.column) * stride, window.column + window.columns - right);
    for (int source = 0; source < 2; ++source) {
      const ConvImage& image = source ? p.skip : p.x;
      const int64_t first = source ? p.x_channels : 0, last = source ? p.in : p.x_channels;
      const int64_t from = max_of(begin, first), until = min_of(end, last);
      if (from >= until) continue;
      ChannelNumbers<C> at{};
      if (p.affine) {
        const C* numbers = static_cast<const C*>(p.affine) + n * 3 * p.in + from;
        at = {numbers, numbers + p.in, numbers + 2 * p.in};
      }
      pack_pixels<Norm>(image.at<const T>(n, from - first, row, 0), image.channel, image.pixel, until - from, left,
                        right, at, to + (left - window.column) * stride + (from - begin), stride);
    }
  }
}
template <class T>
void pack_input(const ConvParams& p, int64_t n, const Window& window, int64_t begin, int64_t end, Compute<T>* to,
                int64_t stride) {
  if (!p.affine) return pack_window<NoNorm, T>(p, n, window, begin, end, to, stride);
  switch_activation(p.activation, [&](auto activation) {
    pack_window<Normed<typename decltype(activation)::type>, T>(p, n, window, begin, end, to, stride);
  });
}

// c = the sum over `runs` runs of `depth` products each: element k of run t of row i of A is
// a[i][run[t] + k * step], the rows of B follow each other. Two chains for each element, as in tile_gemm.h.
template <class C, int Rows, int Vectors>
GK_INLINE void multiply_runs(Vec<C> (&c)[Rows][Vectors], const C* const (&a)[Rows], const int64_t* run, int64_t runs,
                             int64_t depth, int64_t step, const C* b, int64_t b_stride) {
  Vec<C> sum[2][Rows][Vectors] = {};
  for (int64_t t = 0; t < runs; ++t) {
    const C* row[Rows];
    GK_UNROLL for (int i = 0; i < Rows; ++i) row[i] = a[i] + run[t];
    const auto add = [&](int chain, int64_t at, const C* b_k) GK_LAMBDA_INLINE {
      Vec<C> column[Vectors];
      GK_UNROLL for (int j = 0; j < Vectors; ++j) column[j] = load(b_k + j * kLanesOf<C>);
      GK_UNROLL for (int i = 0; i < Rows; ++i) {
        const Vec<C> x = broadcast(row[i][at]);
        GK_UNROLL for (int j = 0; j < Vectors; ++j) sum[chain][i][j] = fma(x, column[j], sum[chain][i][j]);
      }
    };
    int64_t k = 0;
    for (; k + 2 <= depth; k += 2, b += 2 * b_stride) {
      add(0, k * step, b);
      add(1, (k + 1) * step, b + b_stride);
    }
    if (k < depth) {
      add(0, k * step, b);
      b += b_stride;
    }
  }
  GK_UNROLL for (int i = 0; i < Rows; ++i) GK_UNROLL for (int j = 0; j < Vectors; ++j) c[i][j] =
      sum[0][i][j] + sum[1][i][j];
}

// Rows of the largest tile: with two chains and a row of B 27 or 28 of AVX-512's 32 registers, 15 or 16 of 16.
template <int Vectors>
constexpr int kConvRows = GENAI_KERNELS_ISA_LANES == 16 ? (Vectors == 3   ? 4
                                                           : Vectors == 2 ? 6
                                                                          : 8)
                                                        : (Vectors == 3   ? 2
                                                           : Vectors == 2 ? 3
                                                                          : 4);

// f(first row, tag of their number) for the tiles of `rows` rows.
template <int Vectors, class F>
GK_INLINE void for_each_tile(int64_t rows, F&& f) {
  int64_t i = 0;
  constexpr int kMost = kConvRows<Vectors>;
  for (; i + kMost <= rows; i += kMost) f(i, IntTag<kMost>{});
  if constexpr (kMost > 4)
    for (; i + 4 <= rows; i += 4) f(i, IntTag<4>{});
  if constexpr (kMost > 2)
    for (; i + 2 <= rows; i += 2) f(i, IntTag<2>{});
  if constexpr (kMost > 1)
    for (; i < rows; ++i) f(i, IntTag<1>{});
}

// f(first column, tag of its registers) for `columns` columns of a panel: whole groups first.
template <class C, class F>
GK_INLINE void for_each_column_group(int64_t columns, int64_t panel, F&& f) {
  const int64_t most = panel == 48 ? 3 : 2;
  for (int64_t j = 0; j < columns;) {
    const int64_t vectors = min_of(most, (columns - j + kLanesOf<C> - 1) / kLanesOf<C>);
    if (vectors == 3)
      f(j, IntTag<3>{});
    else if (vectors == 2)
      f(j, IntTag<2>{});
    else
      f(j, IntTag<1>{});
    j += vectors * kLanesOf<C>;
  }
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
