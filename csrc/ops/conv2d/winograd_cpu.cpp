// Winograd's F(2 x 2, 3 x 3): the four results of a tile of 2 x 2 pixels from its 4 x 4 pixels of the input with 16
// multiplications in place of 36; and F(4 x 4, 3 x 3), 16 results from 6 x 6 pixels with 36 in place of 144. See conv2d.h
// and the room's README.
//
//   Y = A' ((G g G') * (B' d B)) A
//
// The input is packed as for a direct convolution, and transformed to V[16 or 36][tiles][channels]; the weights are packed
// transformed, U[16 or 36][channels][columns]. As many products follow, M = V U, some panels of columns at a time so that M stays
// in the L2, and from M the result.
#include "ops/conv2d/conv2d.h"

#include "cpu/region_headers.h"
#include "core/rows.h"

#define GENAI_KERNELS_ISA_FILE "ops/conv2d/winograd_cpu.cpp"
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

constexpr int64_t kChunk = 64;      // channels that are packed, and then transformed, at once
constexpr int64_t kMostPanels = 4;  // of M at once: 16 x 128 tiles x 192 columns are 1.5 MiB, 36 x 64 x 192 1.7 MiB

struct WinogradScratch {
  int64_t side, numbers, tile_rows, tile_columns, tiles, chunk, panel, columns, group;  // numbers of a tile: 16 or 36
  int64_t a_stride, v_stride, v_plane, m_stride, m_plane, c_stride;
  float *a, *v, *m, *c;
  int64_t* row;
  char* end;

  WinogradScratch(const ConvParams& p, const ConvItem& item, void* memory) {
    side = p.winograd;
    numbers = winograd_numbers(side);
    tile_rows = (item.rows + side - 1) / side;
    tile_columns = (item.columns + side - 1) / side;
    tiles = item.images * tile_rows * tile_columns;
    chunk = min_of(kChunk, p.in);
    panel = conv_panel(p.out);
    columns = item.channel_end - item.channel_begin;
    group = min_of(kMostPanels * panel, columns);
    a_stride = row_stride<float>(chunk);
    v_stride = row_stride<float>(p.in);
    m_stride = row_stride<float>(group);
    c_stride = columns + kLanes;
    // the numbers of a tile lie in different sets of the L1
    v_plane = round_up(tiles * v_stride, 1024) + 16;
    m_plane = round_up(tiles * m_stride, 1024) + 16;
    Arena arena(memory);
    a = arena.take<float>(item.images * (side * tile_rows + 2) * (side * tile_columns + 2) * a_stride);
    v = arena.take<float>(numbers * v_plane);
    m = arena.take<float>(numbers * m_plane);
    c = arena.take<float>(item.images * item.rows * item.columns * c_stride);
    row = arena.take<int64_t>(tiles);
    end = arena.end();
    if (!memory) return;
    for (int64_t i = 0; i < tiles; ++i) row[i] = i * v_stride;
  }
};

// B' x of the elements of a row or a column of a tile.
GK_INLINE void transform_input(const VecF (&x)[4], VecF (&to)[4]) {
  to[0] = x[0] - x[2];
  to[1] = x[1] + x[2];
  to[2] = x[2] - x[1];
  to[3] = x[1] - x[3];
}
GK_INLINE void transform_input(const VecF (&x)[6], VecF (&to)[6]) {
  const VecF two = broadcast(2.0f), four = broadcast(4.0f), five = broadcast(-5.0f);
  const VecF even = fma(-four, x[2], x[4]), odd = fma(-four, x[1], x[3]);
  const VecF outer = x[4] - x[2], inner = two * (x[3] - x[1]);
  to[0] = fma(five, x[2], fma(four, x[0], x[4]));
  to[1] = even + odd;
  to[2] = even - odd;
  to[3] = outer + inner;
  to[4] = outer - inner;
  to[5] = fma(five, x[3], fma(four, x[1], x[5]));
}
// A' m.
GK_INLINE void transform_output(const VecF (&m)[4], VecF (&to)[2]) {
  to[0] = (m[0] + m[1]) + m[2];
  to[1] = (m[1] - m[2]) - m[3];
}
GK_INLINE void transform_output(const VecF (&m)[6], VecF (&to)[4]) {
  const VecF sum = m[1] + m[2], difference = m[1] - m[2], outer_sum = m[3] + m[4], outer = m[3] - m[4];
  to[0] = (m[0] + sum) + outer_sum;
  to[1] = fma(broadcast(2.0f), outer, difference);
  to[2] = fma(broadcast(4.0f), outer_sum, sum);
  to[3] = fma(broadcast(8.0f), outer, difference) + m[5];
}

// v[..][tile] = the transformed tiles of channels [begin, end), which are packed in scratch.a.
template <int Side>
[[gnu::nothrow]] void transform_tiles(const WinogradScratch& scratch, int64_t begin, int64_t end) {
  constexpr int kSize = Side + 2;
  const int64_t across = (Side * scratch.tile_columns + 2) * scratch.a_stride;
  const int64_t image = (Side * scratch.tile_rows + 2) * across, plane = scratch.v_plane;
  for (int64_t i = 0; i < scratch.tiles; ++i) {
    const int64_t n = i / (scratch.tile_rows * scratch.tile_columns);
    const int64_t r = i / scratch.tile_columns % scratch.tile_rows, column = i % scratch.tile_columns;
    const float* from = scratch.a + n * image + Side * r * across + Side * column * scratch.a_stride;
    float* to = scratch.v + i * scratch.v_stride + begin;
    for (int64_t c = 0; c < end - begin; c += kLanes) {
      VecF half[kSize][kSize];  // [column][row]
      GK_UNROLL for (int j = 0; j < kSize; ++j) {
        VecF x[kSize];
        GK_UNROLL for (int k = 0; k < kSize; ++k) x[k] = load(from + j * scratch.a_stride + k * across + c);
        transform_input(x, half[j]);
      }
      GK_UNROLL for (int k = 0; k < kSize; ++k) {
        VecF x[kSize], v[kSize];
        GK_UNROLL for (int j = 0; j < kSize; ++j) x[j] = half[j][k];
        transform_input(x, v);
        GK_UNROLL for (int l = 0; l < kSize; ++l) store(to + (kSize * k + l) * plane + c, v[l]);
      }
    }
  }
}

// m[..][tile] = v[..][tile] times the weights of channels [channel, end).
[[gnu::nothrow]] void multiply_tiles(const ConvParams& p, const WinogradScratch& scratch, int64_t channel,
                                     int64_t end) {
  const int64_t panel = scratch.panel;
  const ConvBlocks blocks(p.in, 1);
  const TileRows tile{scratch.row, scratch.tiles, scratch.m_stride, panel};
  for (int64_t which = 0; which < scratch.numbers; ++which)
    for (int64_t first = channel; first < end; first += panel) {
      const float* weights =
          static_cast<const float*>(p.weight) + (first / panel * scratch.numbers + which) * p.in * panel;
      float* m = scratch.m + which * scratch.m_plane + (first - channel);
      for (int64_t block = 0; block < blocks.count; ++block) {
        const int64_t from = blocks.begin(block), depth = blocks.end(block) - from, none = 0;
        const float* b = weights + from * panel;
        // in the first piece of the last block the next panel begins as many blocks of weights further on
        const char* next = reinterpret_cast<const char*>(
            block + 1 < blocks.count ? b + depth * panel : weights + scratch.numbers * p.in * panel);
        const bool ask = block + 1 < blocks.count || first + panel < end;
        for_each_column_group<float>(
            min_of(panel, p.out - first), panel, [&](int64_t j, auto vectors) GK_LAMBDA_INLINE {
              multiply_panel<decltype(vectors)::value>(
                  tile, scratch.v + which * scratch.v_plane + from, &none, 1, depth, b + j, next,
                  ask && j == 0 ? depth * panel * int64_t(sizeof(float)) / 64 : 0, m + j, block == 0);
            });
      }
    }
}

// The sums of the pixels of channels [channel, end), from m. True if all are finite, of the channels that there are.
template <int Side>
[[gnu::nothrow]] bool transform_sums(const ConvParams& p, const ConvItem& item, const WinogradScratch& scratch,
                                     int64_t channel, int64_t end) {
  constexpr int kSize = Side + 2;
  VecF zeros[Side] = {};
  const int64_t plane = scratch.m_plane;
  for (int64_t i = 0; i < scratch.tiles; ++i) {
    const int64_t n = i / (scratch.tile_rows * scratch.tile_columns);
    const int64_t r = Side * (i / scratch.tile_columns % scratch.tile_rows), column = Side * (i % scratch.tile_columns);
    const float* m = scratch.m + i * scratch.m_stride;
    float* to =
        scratch.c + ((n * item.rows + r) * item.columns + column) * scratch.c_stride + (channel - item.channel_begin);
    const int64_t rows = item.rows - r, columns = item.columns - column;
    for (int64_t c = 0; c < end - channel; c += kLanes) {
      VecF half[Side][kSize];
      GK_UNROLL for (int l = 0; l < kSize; ++l) {
        VecF of[kSize], sums[Side];
        GK_UNROLL for (int k = 0; k < kSize; ++k) of[k] = load(m + (kSize * k + l) * plane + c);
        transform_output(of, sums);
        GK_UNROLL for (int k = 0; k < Side; ++k) half[k][l] = sums[k];
      }
      GK_UNROLL for (int k = 0; k < Side; ++k) {
        if (k >= rows) break;
        float* y = to + k * item.columns * scratch.c_stride + c;
        VecF sums[Side];
        transform_output(half[k], sums);
        GK_UNROLL for (int l = 0; l < Side; ++l) if (l < columns) store(y + l * scratch.c_stride, sums[l]);
        if (c < p.out - channel) GK_UNROLL for (int l = 0; l < Side; ++l) zeros[l] = fma(sums[l], VecF{}, zeros[l]);
      }
    }
  }
  VecF all = {};
  for (const VecF& zero : zeros) all = all + zero;
  return horizontal_sum<float>(all) == 0;
}

template <int Side, class T>
bool run_item_of(const ConvParams& p, const ConvItem& item, void* memory) {
  const WinogradScratch scratch(p, item, memory);
  const Window window{item.row - p.pad_top, Side * scratch.tile_rows + 2, item.column - p.pad_left,
                      Side * scratch.tile_columns + 2};
  for (int64_t begin = 0; begin < p.in; begin += scratch.chunk) {
    const int64_t end = min_of(p.in, begin + scratch.chunk);
    for (int64_t n = 0; n < item.images; ++n)
      pack_input<T>(p, item.image + n, window, begin, end,
                    scratch.a + n * window.rows * window.columns * scratch.a_stride, scratch.a_stride);
    transform_tiles<Side>(scratch, begin, end);
  }
  bool finite = true;
  for (int64_t channel = item.channel_begin; channel < item.channel_end; channel += scratch.group) {
    const int64_t end = min_of(channel + scratch.group, item.channel_end);
    multiply_tiles(p, scratch, channel, end);
    finite &= transform_sums<Side>(p, item, scratch, channel, end);
  }
  write_item<T>(p, item, scratch.c, scratch.c_stride);
  return finite;
}

template <class T>
bool run_item(const ConvParams& p, const ConvItem& item, void* memory) {
  if constexpr (is_same<T, float>)
    if (p.winograd == 4) return run_item_of<4, T>(p, item, memory);
  if constexpr (sizeof(T) < 8) return run_item_of<2, T>(p, item, memory);
  return true;  // never called
}

}  // namespace

int64_t winograd_scratch(const ConvParams& p, const ConvItem& largest) {
  return WinogradScratch(p, largest, nullptr).end - static_cast<char*>(nullptr);
}

bool winograd_kernel(const ConvParams& p, const ConvItem& item, void* scratch) {
  bool finite = true;
  switch_dtype(p.dtype, [&](auto type) { finite = run_item<typename decltype(type)::type>(p, item, scratch); });
  return finite;
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(int64_t, winograd_scratch, (const ConvParams& p, const ConvItem& largest), (p, largest))
GENAI_KERNELS_ISA_DISPATCH(bool, winograd_kernel, (const ConvParams& p, const ConvItem& item, void* scratch),
                           (p, item, scratch))

#endif
