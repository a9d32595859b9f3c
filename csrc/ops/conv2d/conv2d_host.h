// What the hosts of conv2d and up_conv2d share: views of tensors, packed weights, the work on all threads.
#pragma once
#include <algorithm>
#include <atomic>

#include "host/alloc.h"
#include "host/check.h"
#include "host/parallel.h"
#include "host/scratch.h"
#include "ops/conv2d/conv2d.h"

namespace genai_kernels {

inline ScalarType compute_type(Dtype dtype) { return dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float; }

inline ConvImage conv_image(const TensorRef& t) {
  return {t.data(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// Channels last with any distances, or channels first with each channel dense: what the kernels read.
inline void check_readable(const char* op, const char* name, const TensorRef& t) {
  const bool last = t.size(1) == 1 || t.stride(1) == 1;
  const bool dense = (t.size(3) == 1 || t.stride(3) == 1) && (t.size(2) == 1 || t.stride(2) == t.size(3));
  GK_CHECK_VALUE(t.numel() == 0 || last || dense, op, name,
                 ": expected channels last, or channels first with each channel contiguous, got other strides");
}
// The channel stride says which of the two it is.
inline ConvImage readable_image(const char* op, const char* name, const TensorRef& t) {
  check_readable(op, name, t);
  ConvImage image = conv_image(t);
  const bool dense = (t.size(3) == 1 || t.stride(3) == 1) && (t.size(2) == 1 || t.stride(2) == t.size(3));
  if (t.size(1) == 1 && !dense) image.channel = 1;
  if (t.size(3) == 1 && image.channel != 1) image.pixel = 1;
  return image;
}

// A new image in one of the two memory formats.
inline Tensor new_conv_image(const TensorRef& like, int64_t n, int64_t channels, int64_t height, int64_t width,
                             bool channels_last) {
  const int64_t sizes[] = {n, channels, height, width};
  if (!channels_last) return new_empty(like, sizes, 4, like.scalar_type());
  const int64_t strides[] = {height * width * channels, 1, width * channels, channels};
  return new_strided(like, sizes, strides, 4, like.scalar_type());
}

inline ConvWeight conv_weight(const TensorRef& w, Dtype dtype) {
  return {w.data(),  dtype,       w.size(0),   w.size(1),   w.size(2),
          w.size(3), w.stride(0), w.stride(1), w.stride(2), w.stride(3)};
}

inline void pack_weight(const ConvWeight& w, void* packed) {
  const int64_t panel = conv_panel(w.out), panels = (w.out + panel - 1) / panel;
  parallel_for_elements(panels, panel * w.in * w.height * w.width,
                        [&](int64_t begin, int64_t end) { conv_pack_weight_kernel(w, packed, begin, end); });
}

inline void pack_winograd(const ConvWeight& w, int64_t side, void* packed) {
  const int64_t panel = conv_panel(w.out), panels = (w.out + panel - 1) / panel;
  parallel_for_elements(panels, panel * w.in * winograd_numbers(side), [&](int64_t begin, int64_t end) {
    winograd_pack_weight_kernel(w, side, static_cast<float*>(packed), begin, end);
  });
}

// Elements of a packed weight, for Winograd's tiles of this side or for none.
inline int64_t packed_size(const ConvWeight& w, int64_t side) {
  return conv_packed_size(w.out, w.in, side ? winograd_numbers(side) : w.height * w.width);
}

// Packs a weight for one call.
class PackedWeight {
 public:
  explicit PackedWeight(const ConvWeight& w, int64_t winograd_side = 0)
      : memory_(packed_size(w, winograd_side) * compute_bytes(w.dtype)) {
    if (winograd_side)
      pack_winograd(w, winograd_side, memory_.get());
    else
      pack_weight(w, memory_.get());
  }
  const void* get() const { return memory_.get(); }

 private:
  Scratch memory_;
};

// The tiles of an output: a cell, of small maps those of several images; with Winograd's algorithm two cells, or four, as
// its weights are read for a quarter or a sixteenth of the pixels. Where there are fewer than threads, the channels are divided too.
struct ConvGrid {
  ConvCells cells;
  ConvItem largest{};
  int64_t images, rows, columns, channels, panels;
  const ConvParams& p;

  explicit ConvGrid(const ConvParams& p) : cells(p.out_height, p.out_width), p(p) {
    const auto parts = [](int64_t n, int64_t most) { return (n + most - 1) / most; };
    const int64_t of = std::max<int64_t>(p.winograd, 1);  // cells
    const int64_t down = std::min(of, cells.down), across = std::min(of / down, cells.across);
    largest.rows = down * cells.rows;
    largest.columns = across * cells.columns;
    columns = parts(p.out_width, largest.columns);
    rows = parts(p.out_height, largest.rows);
    const int64_t most = of * ConvCells::kPixels;
    largest.images =
        rows * columns == 1 ? std::min(p.batch, std::max<int64_t>(most / (p.out_height * p.out_width), 1)) : 1;
    const int64_t wanted = 2 * torch::stable::get_num_threads();
    if (largest.images > 1) largest.images = std::clamp<int64_t>(p.batch / wanted, 1, largest.images);
    images = parts(p.batch, largest.images);
    const int64_t panel = conv_panel(p.out), all = parts(p.out, panel);
    const int64_t cut = std::min(all, parts(wanted, images * rows * columns));
    panels = parts(all, cut);
    channels = parts(all, panels);
    largest.channel_end = panels * panel;
    largest.chunk = conv_chunk(p, largest);
  }
  int64_t count() const { return images * rows * columns * channels; }
  ConvItem item(int64_t i) const {
    const int64_t panel = conv_panel(p.out), column = i % columns, row = i / columns % rows;
    const int64_t channel = i / columns / rows % channels, image = i / columns / rows / channels;
    ConvItem item = largest;
    item.image = image * largest.images;
    item.row = row * largest.rows;
    item.column = column * largest.columns;
    item.channel_begin = channel * panels * panel;
    item.images = std::min(largest.images, p.batch - item.image);
    item.rows = std::min(largest.rows, p.out_height - item.row);
    item.columns = std::min(largest.columns, p.out_width - item.column);
    item.channel_end = std::min((channel + 1) * panels * panel, (p.out + panel - 1) / panel * panel);
    return item;
  }
};

// Runs it; and, if wanted, the moments of what it has written, of each tile while that is in the cache. False if there are
// sums of Winograd's tiles that are not finite.
inline bool run_conv(const ConvParams& p, const ConvMoments* of_y = nullptr) {
  if (p.batch == 0 || p.out == 0 || p.out_height <= 0 || p.out_width <= 0) return true;
  const ConvGrid grid(p);
  int64_t bytes = p.winograd ? winograd_scratch(p, grid.largest) : conv_scratch(p, grid.largest);
  if (of_y) bytes = std::max(bytes, conv_moments_scratch(grid.largest.channel_end));
  std::atomic<bool> finite = true;
  parallel_for_dynamic(
      grid.count(), [&] { return Scratch(bytes); },
      [&](int64_t i, Scratch& scratch) {
        const ConvItem item = grid.item(i);
        if (!p.winograd)
          conv_kernel(p, item, scratch.get());
        else if (!winograd_kernel(p, item, scratch.get()))
          finite.store(false, std::memory_order_relaxed);
        if (!of_y) return;
        const int64_t last = std::min(item.channel_end, p.out);
        for (int64_t n = item.image; n < item.image + item.images; ++n)
          for (int64_t row = item.row; row < item.row + item.rows; row += grid.cells.rows)
            for (int64_t column = item.column; column < item.column + item.columns; column += grid.cells.columns) {
              const int64_t cell = n * grid.cells.count() + grid.cells.index(row, column);
              conv_moments_kernel(*of_y, cell, cell + 1, item.channel_begin, last, scratch.get());
            }
      });
  return finite;
}

inline void run_weight_grad(const ConvWeightGrad& p) {
  const int64_t panel = conv_panel(p.conv.out), panels = (p.conv.out + panel - 1) / panel;
  const int64_t threads = torch::stable::get_num_threads();
  // of 9 taps 300 KiB of sums; fewer where there would be less than four items for a thread
  constexpr int64_t kMostIn = 64, kMostPanels = 4;
  int64_t in = std::min(kMostIn, p.conv.in), wide = std::min(kMostPanels, panels);
  const auto items = [&] { return (p.conv.in + in - 1) / in * ((panels + wide - 1) / wide); };
  while (items() < 4 * threads && wide > 1) --wide;
  while (items() < 2 * threads && in > 16) in = (in / 2 + 3) / 4 * 4;
  const int64_t out = wide * panel, across = (p.conv.out + out - 1) / out;
  const int64_t bytes = conv_weight_grad_scratch(p, {0, in, 0, out});
  parallel_for_dynamic(
      items(), [&] { return Scratch(bytes); },
      [&](int64_t i, Scratch& scratch) {
        const int64_t first = i / across * in, column = i % across * out;
        conv_weight_grad_kernel(p, {first, std::min(first + in, p.conv.in), column, std::min(column + out, p.conv.out)},
                                scratch.get());
      });
}

// ConvParams::offset.
inline Scratch new_offset(const ConvParams& p, const Parameter& bias, const SampleParameter& channel_bias) {
  Scratch offset(p.batch * p.out * compute_bytes(p.dtype));
  parallel_for_elements(p.batch, 4 * p.out, [&](int64_t begin, int64_t end) {
    conv_offset_kernel(p.dtype, p.out, bias, channel_bias, offset.get(), begin, end);
  });
  return offset;
}

inline Scratch new_moments(int64_t batch, int64_t channels, const ConvCells& cells) {
  return Scratch(batch * cells.count() * 2 * channels * int64_t(sizeof(double)));
}

inline void run_moments(const ConvMoments& of, int64_t batch) {
  parallel_for_elements(batch * of.cells.count(), of.cells.rows * of.cells.columns * of.channels,
                        [&](int64_t begin, int64_t end) {
                          const Scratch scratch(conv_moments_scratch(of.channels));
                          conv_moments_kernel(of, begin, end, 0, of.channels, scratch.get());
                        });
}

// Moments of an image of the height and width of p.x.
inline Scratch moments_of(const ConvParams& p, const ConvImage& image, int64_t channels, bool centered = true) {
  const ConvCells cells(p.height, p.width);
  if (channels == 0) return Scratch(0);
  Scratch moments = new_moments(p.batch, channels, cells);
  run_moments({p.dtype, image, channels, cells, centered, static_cast<double*>(moments.get())}, p.batch);
  return moments;
}

// sums[n][c] = scale * the sum over the pixels of an image of the size of p.x, and all[c] = that over the images.
inline void sum_pixels(const ConvParams& p, const ConvImage& image, int64_t channels, double scale, double* sums,
                       double* all) {
  const ConvCells cells(p.height, p.width);
  const Scratch moments = moments_of(p, image, channels, false);
  const double* each = static_cast<const double*>(moments.get());
  std::fill_n(all, channels, 0.0);
  for (int64_t n = 0; n < p.batch; ++n, sums += channels) {
    std::fill_n(sums, channels, 0.0);
    for (int64_t i = 0; i < cells.count(); ++i, each += 2 * channels)
      for (int64_t c = 0; c < channels; ++c) sums[c] += each[c] * double(cells.at(i).pixels());
    for (int64_t c = 0; c < channels; ++c) all[c] += sums[c] *= scale;
  }
}

}  // namespace genai_kernels
