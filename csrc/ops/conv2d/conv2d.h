// What the hosts of conv2d and up_conv2d hand to their kernels, and how the work is cut.
//
// A convolution is computed on tiles of pixels of the output. What a tile sees of the input is packed first, a chunk of
// channels at a time: joined from x and skip, normalised, activated, converted to the compute type, padded with zeros.
// Then panels of output channels are multiplied with it, their weights packed so that a product reads them in order.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/group_activation.h"

namespace genai_kernels {

// [batch, channels, rows, pixels of a row]; strides in elements.
struct ConvImage {
  void* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0, pixel = 0;

  template <class T>
  T* at(int64_t n, int64_t c, int64_t r, int64_t i) const {
    return static_cast<T*>(data) + n * batch + c * channel + r * row + i * pixel;
  }
};

// Multiplications of a piece: with 48 columns 24 KiB of weights, half of an L1.
inline constexpr int64_t kConvDepth = 128;

// How the sum of an element is cut, by the shape of the weight alone: blocks of input channels, of at most kConvDepth, and
// in each of them pieces of some taps. A piece is two chains of multiply-adds; pieces are added in order.
struct ConvBlocks {
  int64_t in, taps, size, count, piece_taps;

  ConvBlocks(int64_t in, int64_t taps) : in(in), taps(taps) {
    const int64_t blocks = (in + kConvDepth - 1) / kConvDepth;
    size = blocks > 1 ? ((in + blocks - 1) / blocks + 15) / 16 * 16 : in;
    count = size ? (in + size - 1) / size : 0;
    // three pieces or more where there are few channels: shorter chains
    const int64_t fit = size && kConvDepth / size > 1 ? kConvDepth / size : 1, part = (taps + 3) / 4;
    const int64_t most = fit < part ? fit : part, pieces = most ? (taps + most - 1) / most : 0;
    piece_taps = pieces ? (taps + pieces - 1) / pieces : 1;
  }
  int64_t begin(int64_t block) const { return block * size; }
  int64_t end(int64_t block) const { return begin(block) + size < in ? begin(block) + size : in; }
};

// Output channels of a panel of packed weights: three registers of AVX-512, or two where three would leave more unused.
// Panels follow each other; in one, [block][tap][channel of the block][column], zeros in the columns that are not there.
inline int64_t conv_panel(int64_t out) { return out % 48 == 0 || out % 48 > 32 ? 48 : 32; }
inline int64_t conv_packed_size(int64_t out, int64_t in, int64_t taps) {
  const int64_t panel = conv_panel(out);
  return (out + panel - 1) / panel * panel * in * taps;
}

// How the pixels of a map are cut: into cells of some 256, as square as rows of at least 32 pixels allow, so that few
// pixels are packed twice. A tile of an output is whole cells, so that the moments of what has just been written are those
// of a pass over the map, bit for bit. Multiples of four, of which Winograd's tiles are 2 x 2 and 4 x 4.
struct ConvCells {
  static constexpr int64_t kColumns = 32, kPixels = 256;
  int64_t height = 0, width = 0, rows = 0, columns = 0, down = 0, across = 0;

  struct Cell {
    int64_t row, rows, column, columns;
    int64_t pixels() const { return rows * columns; }
  };

  ConvCells() = default;
  ConvCells(int64_t height, int64_t width) : height(height), width(width) {
    if (height <= 0 || width <= 0) return;
    columns = part(width, kPixels / height < kColumns ? kColumns : kPixels / height);
    rows = part(height, kPixels / columns);
    across = (width + columns - 1) / columns;
    down = (height + rows - 1) / rows;
  }
  int64_t count() const { return down * across; }
  int64_t index(int64_t row, int64_t column) const { return row / rows * across + column / columns; }
  Cell at(int64_t i) const {
    const int64_t row = i / across * rows, column = i % across * columns;
    return {row, row + rows < height ? rows : height - row, column,
            column + columns < width ? columns : width - column};
  }

 private:
  static int64_t part(int64_t n, int64_t most) {
    const int64_t parts = most > 1 ? (n + most - 1) / most : n;
    return ((n + parts - 1) / parts + 3) / 4 * 4;
  }
};

// A weight [out, in, height, width] as it is packed; strides in elements, negative ones too.
struct ConvWeight {
  const void* data;
  Dtype dtype;
  int64_t out, in, height, width;
  int64_t out_stride, in_stride, row_stride, column_stride;
};
// Panels [begin, end), to `packed`, of the same dtype.
void conv_pack_weight_kernel(const ConvWeight& w, void* packed, int64_t begin, int64_t end);

// ---- Winograd's F(2 x 2, 3 x 3) and F(4 x 4, 3 x 3) ----

enum class ConvAlgorithm : int32_t { automatic, direct, winograd, winograd_f4 };

// The side of the tiles of a weight's results, or 0 for a direct sum: by the weight alone, so that neither image nor batch
// changes the order of a sum. With fewer channels the transforms cost what the products save. The larger tiles are taken
// where they are asked for alone: they lose a digit.
inline constexpr int64_t kWinogradChannels = 32;
inline bool can_winograd(ConvAlgorithm algorithm, Dtype dtype, int64_t height, int64_t width, int64_t stride) {
  const bool fits = algorithm == ConvAlgorithm::winograd_f4 ? dtype == Dtype::f32 : dtype != Dtype::f64;
  return fits && height == 3 && width == 3 && stride == 1;
}
inline int64_t winograd_side(ConvAlgorithm algorithm, Dtype dtype, int64_t out, int64_t in, int64_t height,
                             int64_t width, int64_t stride) {
  if (algorithm == ConvAlgorithm::direct || !can_winograd(algorithm, dtype, height, width, stride)) return 0;
  if (algorithm == ConvAlgorithm::winograd_f4) return 4;
  return algorithm == ConvAlgorithm::winograd || (out >= kWinogradChannels && in >= kWinogradChannels) ? 2 : 0;
}
// Of a tile: its products, and the numbers of a transformed weight.
inline int64_t winograd_numbers(int64_t side) { return (side + 2) * (side + 2); }
// Panels [begin, end) of a weight of 3 x 3, transformed, to float32; in a panel [16 or 36][in][column].
void winograd_pack_weight_kernel(const ConvWeight& w, int64_t side, float* packed, int64_t begin, int64_t end);

// What the taps of a kernel of three come to where each pixel stands twice. Forward, the pixels of either phase of the
// larger map see two pixels of the smaller one: {w0, w1 + w2} and {w0 + w1, w2}. Backward, a pixel of the smaller one sees
// four of the larger: {w2, w1 + w2, w0 + w1, w0}. `way` says which of these, for rows or columns.
struct UpTaps {
  int way, count;
  explicit UpTaps(int way) : way(way), count(way < 2 ? 2 : 4) {}
  int begin(int i) const { return way == 0 ? i : way == 1 ? 2 * i : i < 2 ? 2 - i : 0; }
  int end(int i) const { return way == 0 ? 1 + 2 * i : way == 1 ? 2 + i : i < 2 ? 3 : 4 - i; }
};
// sums[out][in][row][column], of the compute type, of a weight of 3 x 3; outputs [begin, end).
void conv_up_weight_kernel(const ConvWeight& w, const UpTaps& rows, const UpTaps& columns, void* sums, int64_t begin,
                           int64_t end);

struct ConvParams {
  Dtype dtype, weight_dtype;
  int64_t batch, in, x_channels, height, width;  // `in` channels: those of x, then those of skip
  int64_t out, out_height, out_width;
  int64_t kernel_height, kernel_width, stride, pad_top, pad_left;
  ConvImage x, skip, y, residual;  // residual: added to the sum; or null
  // of the compute type:
  const void* affine;  // [batch][3][in]: input = activation((x - [0]) [1] + [2]); or null
  const void* offset;  // [batch][out], added to the sum
  GroupActivation activation;
  double scale;        // of the result
  int64_t winograd;    // winograd_side: how it is computed, and the weight is packed
  const void* weight;  // packed, of weight_dtype: that of x, or the compute type

  int64_t taps() const { return kernel_height * kernel_width; }
};

// A part of the output: of images [image, image + images) the same pixels and channels.
struct ConvItem {
  int64_t image, images, row, rows, column, columns, channel_begin, channel_end;  // channels: whole panels
  int64_t chunk;  // channels of the input that are packed at once, conv_chunk of the largest item
};

// Of the largest item, so that what fits in its scratch fits for every item: a smaller one must not take more channels.
inline int64_t conv_chunk(const ConvParams& p, const ConvItem& largest) {
  constexpr int64_t kBytes = 576 << 10;  // of packed input
  const int64_t rows = (largest.rows - 1) * p.stride + p.kernel_height;
  const int64_t columns = (largest.columns - 1) * p.stride + p.kernel_width;
  const int64_t pixel = largest.images * rows * columns * (p.dtype == Dtype::f64 ? 8 : 4);
  const int64_t block = ConvBlocks(p.in, p.taps()).size, one = pixel * block;
  const int64_t blocks = one > 0 && kBytes > one ? kBytes / one : 1;
  return blocks * block < p.in ? blocks * block : p.in;
}

int64_t conv_scratch(const ConvParams& p, const ConvItem& largest);
void conv_kernel(const ConvParams& p, const ConvItem& item, void* scratch);
// The same in Winograd's tiles, of which an item is whole ones but for the map's end. True if its sums are finite: what is
// not, in one pixel of the input, makes all results of the tiles that see it so.
int64_t winograd_scratch(const ConvParams& p, const ConvItem& largest);
bool winograd_kernel(const ConvParams& p, const ConvItem& item, void* scratch);

// ---- the numbers of each channel ----

// Mean and summed squares around it of the pixels of each channel of each cell.
struct ConvMoments {
  Dtype dtype;
  ConvImage image;
  int64_t channels;
  ConvCells cells;
  bool centered;    // false where only the means count: sums of the elements themselves, exact for few of them
  double* moments;  // [n][cell][2][channels]
};
// Of channels [first, last) of (n, cell) pairs [begin, end).
void conv_moments_kernel(const ConvMoments& p, int64_t begin, int64_t end, int64_t first, int64_t last, void* scratch);
inline int64_t conv_moments_scratch(int64_t channels) { return 2 * (channels + 16) * int64_t(sizeof(double)); }

// What a group norm makes of the moments of x and of skip, of samples [begin, end).
struct ConvNorm {
  Dtype dtype;  // of x
  int64_t channels, x_channels, groups;
  ConvCells cells;
  double eps;
  bool from_moments;  // or the stats are there already
  double *x, *skip;   // moments, of which those of the first cell become the map's
  Parameter weight, bias;
  SampleParameter scale, shift;
  double* stats;  // [n][groups][2]: mean and 1 / sqrt(variance + eps)
  void* affine;   // ConvParams::affine; or null
};
void conv_norm_kernel(const ConvNorm& p, int64_t begin, int64_t end);

// ConvParams::offset of samples [begin, end).
void conv_offset_kernel(Dtype dtype, int64_t out, const Parameter& bias, const SampleParameter& channel_bias,
                        void* offset, int64_t begin, int64_t end);

// ---- the gradient of the weight ----

// dW[o][i][tap] = scale * sum over images and pixels of dy[o] * input[i] at the tap: added up along the rows of an image
// in pieces of at most 64 pixels, and these in order, image after image.
struct ConvWeightGrad {
  ConvParams conv;  // of the forward: x, skip, affine; y is dy here, with the scale
  void* dw;
  bool in_compute;  // dw is of the compute type, not of that of x
  int64_t out_stride, in_stride, row_stride, column_stride;
};
// Input channels [in_begin, in_end), output channels [out_begin, out_end).
struct ConvWeightItem {
  int64_t in_begin, in_end, out_begin, out_end;
};
int64_t conv_weight_grad_scratch(const ConvWeightGrad& p, const ConvWeightItem& largest);
void conv_weight_grad_kernel(const ConvWeightGrad& p, const ConvWeightItem& item, void* scratch);

}  // namespace genai_kernels
