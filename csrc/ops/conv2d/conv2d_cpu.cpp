// A tile of the output of a convolution: the input packed a chunk of channels at a time, multiplied by one panel of output
// channels after the other. See conv2d.h.
//
// The packed chunk and the sums of a tile of 256 pixels stay in the L2. A piece of the weights is 24 KiB and stays in the
// L1 while all pixels are multiplied with it; the next one is asked for meanwhile.
#include "ops/conv2d/conv2d.h"

#include "cpu/region_headers.h"
#include "core/rows.h"

#define GENAI_KERNELS_ISA_FILE "ops/conv2d/conv2d_cpu.cpp"
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
#include "ops/conv2d/conv2d_tile.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

template <class C>
struct ConvScratch {
  int64_t window_rows, window_columns, pixels, panel, columns, chunk;
  int64_t a_stride, c_stride;
  C *a, *b, *c;
  int64_t *pixel, *run;
  char* end;

  ConvScratch(const ConvParams& p, const ConvItem& item, void* memory) {
    window_rows = (item.rows - 1) * p.stride + p.kernel_height;
    window_columns = (item.columns - 1) * p.stride + p.kernel_width;
    pixels = item.images * item.rows * item.columns;
    panel = conv_panel(p.out);
    columns = round_up(item.channel_end - item.channel_begin, panel);
    chunk = item.chunk;
    a_stride = row_stride<C>(chunk);
    c_stride = columns + kLanesOf<C>;
    Arena arena(memory);
    a = arena.take<C>(item.images * window_rows * window_columns * a_stride);
    b = arena.take<C>(kConvDepth * panel);
    c = arena.take<C>(pixels * c_stride);
    pixel = arena.take<int64_t>(pixels);
    run = arena.take<int64_t>(p.taps());
    end = arena.end();
    if (!memory) return;
    // where each pixel of the tile, and each tap of a pixel, begins in the packed input
    int64_t* next = pixel;
    for (int64_t n = 0; n < item.images; ++n)
      for (int64_t r = 0; r < item.rows; ++r)
        for (int64_t i = 0; i < item.columns; ++i)
          *next++ = ((n * window_rows + r * p.stride) * window_columns + i * p.stride) * a_stride;
    for (int64_t t = 0; t < p.taps(); ++t)
      run[t] = (t / p.kernel_width * window_columns + t % p.kernel_width) * a_stride;
  }
};

// The weights of a piece in the compute type: where they lie, or converted.
template <class W, class C>
GK_INLINE const C* piece_of(const W* packed, int64_t count, C* to) {
  if constexpr (is_same<W, C>) {
    return packed;
  } else {
    for (int64_t i = 0; i < count; i += kLanesOf<C>) store(to + i, load(packed + i));
    return to;
  }
}

template <class T, class W>
[[gnu::nothrow]] void multiply_item(const ConvParams& p, const ConvItem& item, const ConvScratch<Compute<T>>& scratch) {
  using C = Compute<T>;
  const ConvBlocks blocks(p.in, p.taps());
  if (p.taps() == 0 || p.in == 0) __builtin_memset(scratch.c, 0, scratch.pixels * scratch.c_stride * sizeof(C));
  if (p.taps() == 0) return;
  const int64_t panel = scratch.panel, a_panel = p.in * p.taps() * panel;
  const TileRows tile{scratch.pixel, scratch.pixels, scratch.c_stride, panel};
  for (int64_t begin = 0; begin < p.in; begin += scratch.chunk) {
    const int64_t end = min_of(p.in, begin + scratch.chunk);
    const Window window{item.row * p.stride - p.pad_top, scratch.window_rows, item.column * p.stride - p.pad_left,
                        scratch.window_columns};
    for (int64_t n = 0; n < item.images; ++n)
      pack_input<T>(p, item.image + n, window, begin, end,
                    scratch.a + n * window.rows * window.columns * scratch.a_stride, scratch.a_stride);
    for (int64_t channel = item.channel_begin; channel < item.channel_end; channel += panel) {
      const W* weights = static_cast<const W*>(p.weight) + channel / panel * a_panel;
      const int64_t columns = min_of(panel, p.out - channel);
      C* c = scratch.c + (channel - item.channel_begin);
      for (int64_t block = begin / blocks.size; blocks.begin(block) < end && block < blocks.count; ++block) {
        const int64_t from = blocks.begin(block), depth = blocks.end(block) - from;
        for (int64_t tap = 0; tap < p.taps(); tap += blocks.piece_taps) {
          const int64_t taps = min_of(blocks.piece_taps, p.taps() - tap), count = taps * depth * panel;
          const W* piece = weights + (from * p.taps() + tap * depth) * panel;
          const C* b = piece_of(piece, count, scratch.b);
          const char* next = reinterpret_cast<const char*>(piece + count);
          const int64_t next_lines = count * int64_t(sizeof(W)) / 64;
          for_each_column_group<C>(columns, panel, [&](int64_t j, auto vectors) GK_LAMBDA_INLINE {
            multiply_panel<decltype(vectors)::value>(tile, scratch.a + (from - begin), scratch.run + tap, taps, depth,
                                                     b + j, next, j ? 0 : next_lines, c + j, from == 0 && tap == 0);
          });
        }
      }
    }
  }
}

template <class T>
void run_item(const ConvParams& p, const ConvItem& item, void* memory) {
  using C = Compute<T>;
  const ConvScratch<C> scratch(p, item, memory);
  constexpr Dtype kCompute = sizeof(C) == 8 ? Dtype::f64 : Dtype::f32;
  if (p.weight_dtype == kCompute)
    multiply_item<T, C>(p, item, scratch);
  else
    multiply_item<T, T>(p, item, scratch);
  write_item<T>(p, item, scratch.c, scratch.c_stride);
}

}  // namespace

int64_t conv_scratch(const ConvParams& p, const ConvItem& largest) {
  const char* end = p.dtype == Dtype::f64 ? ConvScratch<double>(p, largest, nullptr).end
                                          : ConvScratch<float>(p, largest, nullptr).end;
  return end - static_cast<char*>(nullptr);
}

void conv_kernel(const ConvParams& p, const ConvItem& item, void* scratch) {
  switch_dtype(p.dtype, [&](auto type) { run_item<typename decltype(type)::type>(p, item, scratch); });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(int64_t, conv_scratch, (const ConvParams& p, const ConvItem& largest), (p, largest))
GENAI_KERNELS_ISA_DISPATCH(void, conv_kernel, (const ConvParams& p, const ConvItem& item, void* scratch),
                           (p, item, scratch))

#endif
