// What the direct convolution and Winograd's share: a panel of columns times all rows of a tile, and the result's end.
// Included inside an instruction-set region after conv2d_band.h.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// The rows of a tile: where each begins in the packed input, and how far apart their sums are.
struct TileRows {
  const int64_t* at;
  int64_t rows, c_stride, panel;
};

// What one panel of columns adds to the sums of all pixels: c += or = A B over a piece.
template <int Vectors, class C>
[[gnu::nothrow]] void multiply_panel(const TileRows& tile, const C* a, const int64_t* run, int64_t runs, int64_t depth,
                                     const C* b, const char* next, int64_t next_lines, C* c, bool first) {
  int64_t asked = 0;
  for_each_tile<Vectors>(tile.rows, [&](int64_t i, auto size) GK_LAMBDA_INLINE {
    constexpr int kRows = decltype(size)::value;
    for (const int64_t to = next_lines * (i + kRows) / tile.rows; asked < to; ++asked)
      __builtin_prefetch(next + asked * 64, 0, 2);
    const C* rows[kRows];
    C* sums = c + i * tile.c_stride;
    GK_UNROLL for (int r = 0; r < kRows; ++r) rows[r] = a + tile.at[i + r];
    Vec<C> sum[kRows][Vectors];
    multiply_runs(sum, rows, run, runs, depth, 1, b, tile.panel);
    GK_UNROLL for (int r = 0; r < kRows; ++r) GK_UNROLL for (int j = 0; j < Vectors; ++j) {
      C* to = sums + r * tile.c_stride + j * kLanesOf<C>;
      store(to, first ? sum[r][j] : load(to) + sum[r][j]);
    }
  });
}

// ---- the result ----

template <class T>
GK_INLINE void store_strided(T* p, int64_t stride, Vec<Compute<T>> x, int64_t count) {
  using C = Compute<T>;
  if (stride == 1) {
    if (count >= kLanesOf<C>)
      store(p, x);
    else
      store_first(p, x, count);
    return;
  }
  T lanes[kLanesOf<C>];
  store(lanes, x);
  for (int64_t i = 0; i < kLanesOf<C> && i < count; ++i) p[i * stride] = lanes[i];
}

// A row of pixels whose channels lie side by side.
template <class T>
void write_pixels(const ConvParams& p, const ConvItem& item, int64_t n, int64_t row, const Compute<T>* c,
                  int64_t c_stride) {
  using C = Compute<T>;
  const int64_t first = item.channel_begin, count = min_of(item.channel_end, p.out) - first;
  const C* offset = static_cast<const C*>(p.offset) + n * p.out + first;
  const Vec<C> scale = broadcast(C(p.scale));
  for (int64_t i = 0; i < item.columns; ++i, c += c_stride) {
    T* y = p.y.at<T>(n, first, row, item.column + i);
    const T* residual = p.residual.data ? p.residual.at<const T>(n, first, row, item.column + i) : nullptr;
    for_each_register<C>(count, [&](int64_t j, auto part) GK_LAMBDA_INLINE {
      Vec<C> x = load(c + j) + part.load_from(offset + j);
      if (residual) x = x + part.load_from(residual + j);
      part.store_to(y + j, x * scale);
    });
  }
}

// The same where the pixels of a channel do, or nothing does.
template <class T>
void write_channels(const ConvParams& p, const ConvItem& item, int64_t n, int64_t row, const Compute<T>* c,
                    int64_t c_stride) {
  using C = Compute<T>;
  constexpr int kStep = kLanesOf<C>;
  const int64_t last = min_of(item.channel_end, p.out);
  const C* offset = static_cast<const C*>(p.offset) + n * p.out;
  const Vec<C> scale = broadcast(C(p.scale));
  for (int64_t i = 0; i < item.columns; i += kStep) {
    const int64_t pixels = min_of<int64_t>(kStep, item.columns - i);
    for (int64_t channel = item.channel_begin; channel < last; channel += kStep) {
      Vec<C> x[kStep] = {};
      for (int64_t l = 0; l < pixels; ++l) x[l] = load(c + (i + l) * c_stride + (channel - item.channel_begin));
      transpose(x);
      for (int64_t l = 0; l < kStep && channel + l < last; ++l) {
        Vec<C> v = x[l] + broadcast(offset[channel + l]);
        if (p.residual.data)
          v = v + load_strided(p.residual.at<const T>(n, channel + l, row, item.column + i), p.residual.pixel, pixels);
        store_strided(p.y.at<T>(n, channel + l, row, item.column + i), p.y.pixel, v * scale, pixels);
      }
    }
  }
}

template <class T>
void write_item(const ConvParams& p, const ConvItem& item, const Compute<T>* c, int64_t c_stride) {
  const bool last = p.y.channel == 1 && (!p.residual.data || p.residual.channel == 1);
  for (int64_t n = 0; n < item.images; ++n)
    for (int64_t r = 0; r < item.rows; ++r, c += item.columns * c_stride)
      if (last)
        write_pixels<T>(p, item, item.image + n, item.row + r, c, c_stride);
      else
        write_channels<T>(p, item, item.image + n, item.row + r, c, c_stride);
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
