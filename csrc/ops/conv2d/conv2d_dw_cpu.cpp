// The gradient of a convolution's weight: for each tap a product of the packed input, transposed, with dy. See conv2d.h.
//
// A band of rows of both is packed at a time; the sums of an item's channels, of all taps, stay in the L2 from the first
// image to the last. So an element's order of additions depends on the images alone, and threads share nothing.
#include "ops/conv2d/conv2d.h"

#include "cpu/region_headers.h"
#include "core/rows.h"

#define GENAI_KERNELS_ISA_FILE "ops/conv2d/conv2d_dw_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/exp.h"
#include "cpu/activations.h"
#include "cpu/group_activation.h"
#include "cpu/staged_row.h"
#include "cpu/tile_gemm.h"
#include "cpu/transpose.h"
#include "cpu/attention_pack.h"
#include "ops/conv2d/conv2d_band.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

constexpr int64_t kPiecePixels = 64, kPiecesOfBand = 4;

template <class C>
struct WeightScratch {
  int64_t in, out, piece_rows, piece_columns, window_columns;
  int64_t a_stride, b_stride, c_stride;
  C *a, *b, *c;
  int64_t* run;
  char* end;

  WeightScratch(const ConvParams& p, const ConvWeightItem& item, void* memory) {
    in = item.in_end - item.in_begin;
    out = item.out_end - item.out_begin;
    const int64_t most = max_of<int64_t>(kPiecePixels / max_of<int64_t>(p.out_width, 1), 1);
    const int64_t pieces = max_of<int64_t>((p.out_height + most - 1) / most, 1);
    piece_rows = (p.out_height + pieces - 1) / pieces;
    const int64_t across = max_of<int64_t>((p.out_width + kPiecePixels - 1) / kPiecePixels, 1);
    piece_columns = (p.out_width + across - 1) / across;
    window_columns = (p.out_width - 1) * p.stride + p.kernel_width;
    const int64_t rows = piece_rows * kPiecesOfBand;
    a_stride = row_stride<C>(in);
    b_stride = row_stride<C>(out);
    c_stride = round_up(out, kLanesOf<C>);
    Arena arena(memory);
    a = arena.take<C>(((rows - 1) * p.stride + p.kernel_height) * window_columns * a_stride);
    b = arena.take<C>(rows * p.out_width * b_stride);
    c = arena.take<C>(p.taps() * in * c_stride);
    run = arena.take<int64_t>(piece_rows);
    end = arena.end();
    if (!memory) return;
    for (int64_t r = 0; r < piece_rows; ++r) run[r] = r * p.stride * window_columns * a_stride;
  }
};

// c[channel in][channel out] += the sum over `rows` rows of `columns` pixels.
template <class C>
[[gnu::nothrow]] void add_piece(const ConvParams& p, int64_t rows, int64_t columns, const C* a, const C* b, C* c,
                                const WeightScratch<C>& scratch) {
  const int64_t step = p.stride * scratch.a_stride;
  for_each_column_group<C>(scratch.out, conv_panel(p.out), [&](int64_t j, auto vectors) GK_LAMBDA_INLINE {
    constexpr int kVectors = decltype(vectors)::value;
    for_each_tile<kVectors>(scratch.in, [&](int64_t i, auto size) GK_LAMBDA_INLINE {
      constexpr int kRows = decltype(size)::value;
      const C* row[kRows];
      GK_UNROLL for (int l = 0; l < kRows; ++l) row[l] = a + i + l;
      Vec<C> sum[kRows][kVectors];
      multiply_runs(sum, row, scratch.run, rows, columns, step, b + j, scratch.b_stride);
      GK_UNROLL for (int l = 0; l < kRows; ++l) GK_UNROLL for (int v = 0; v < kVectors; ++v) {
        C* to = c + (i + l) * scratch.c_stride + j + v * kLanesOf<C>;
        store(to, load(to) + sum[l][v]);
      }
    });
  });
}

template <class T>
[[gnu::nothrow]] void add_band(const ConvParams& p, const ConvWeightItem& item, int64_t n, int64_t first, int64_t last,
                               const WeightScratch<Compute<T>>& scratch) {
  const Window window{first * p.stride - p.pad_top, (last - first - 1) * p.stride + p.kernel_height, -p.pad_left,
                      scratch.window_columns};
  pack_input<T>(p, n, window, item.in_begin, item.in_end, scratch.a, scratch.a_stride);
  for (int64_t r = first; r < last; ++r)
    pack_pixels<NoNorm>(p.y.at<const T>(n, item.out_begin, r, 0), p.y.channel, p.y.pixel, scratch.out, 0, p.out_width,
                        {}, scratch.b + (r - first) * p.out_width * scratch.b_stride, scratch.b_stride);
  // a piece is some rows, or a part of one
  for (int64_t r = first; r < last; r += scratch.piece_rows)
    for (int64_t column = 0; column < p.out_width; column += scratch.piece_columns)
      for (int64_t t = 0; t < p.taps(); ++t) {
        const int64_t row = (r - first) * p.stride + t / p.kernel_width;
        const int64_t at = row * scratch.window_columns + column * p.stride + t % p.kernel_width;
        add_piece(p, min_of(scratch.piece_rows, last - r), min_of(scratch.piece_columns, p.out_width - column),
                  scratch.a + at * scratch.a_stride,
                  scratch.b + ((r - first) * p.out_width + column) * scratch.b_stride,
                  scratch.c + t * scratch.in * scratch.c_stride, scratch);
      }
}

template <class To, class C>
void write_grad(const ConvWeightGrad& p, const ConvWeightItem& item, const WeightScratch<C>& scratch) {
  const int64_t width = p.conv.kernel_width;
  for (int64_t o = 0; o < scratch.out; ++o)
    for (int64_t i = 0; i < scratch.in; ++i)
      for (int64_t t = 0; t < p.conv.taps(); ++t)
        static_cast<To*>(p.dw)[(item.out_begin + o) * p.out_stride + (item.in_begin + i) * p.in_stride +
                               t / width * p.row_stride + t % width * p.column_stride] =
            from_compute<To>(scratch.c[(t * scratch.in + i) * scratch.c_stride + o] * C(p.conv.scale));
}

template <class T>
void run_item(const ConvWeightGrad& p, const ConvWeightItem& item, void* memory) {
  using C = Compute<T>;
  const ConvParams& conv = p.conv;
  const WeightScratch<C> scratch(conv, item, memory);
  __builtin_memset(scratch.c, 0, conv.taps() * scratch.in * scratch.c_stride * sizeof(C));
  // columns of a register beyond the last channel are multiplied, and not used
  __builtin_memset(scratch.b, 0, scratch.piece_rows * kPiecesOfBand * conv.out_width * scratch.b_stride * sizeof(C));
  const int64_t band = scratch.piece_rows * kPiecesOfBand;
  for (int64_t n = 0; n < conv.batch; ++n)
    for (int64_t r = 0; r < conv.out_height; r += band)
      add_band<T>(conv, item, n, r, min_of(r + band, conv.out_height), scratch);
  if (p.in_compute)
    write_grad<C>(p, item, scratch);
  else
    write_grad<T>(p, item, scratch);
}

}  // namespace

int64_t conv_weight_grad_scratch(const ConvWeightGrad& p, const ConvWeightItem& largest) {
  const char* end = p.conv.dtype == Dtype::f64 ? WeightScratch<double>(p.conv, largest, nullptr).end
                                               : WeightScratch<float>(p.conv, largest, nullptr).end;
  return end - static_cast<char*>(nullptr);
}

void conv_weight_grad_kernel(const ConvWeightGrad& p, const ConvWeightItem& item, void* scratch) {
  switch_dtype(p.conv.dtype, [&](auto type) { run_item<typename decltype(type)::type>(p, item, scratch); });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(int64_t, conv_weight_grad_scratch, (const ConvWeightGrad& p, const ConvWeightItem& largest),
                           (p, largest))
GENAI_KERNELS_ISA_DISPATCH(void, conv_weight_grad_kernel,
                           (const ConvWeightGrad& p, const ConvWeightItem& item, void* scratch), (p, item, scratch))

#endif
