// Tiles of 16-bit elements in shared memory and their products by mma.sync, for the sm_80 kernels.
//
// A tile is [rows][kDim], kDim the head dim rounded up to one of a few sizes: the padding is zeros in shared memory, no
// padded tensor exists. 16-byte chunks are swizzled so that the 8 rows an ldmatrix reads lie in 8 different groups of
// banks. Two products serve forward and backward alike, for one warp and kTiles x 16 rows of it:
//
//     multiply_rows     C[i][j] += sum_d A[i][d] B[j][d]     A, B in shared memory:  S = Q K^T, dP = dO V^T
//     multiply_columns  C[i][d] += sum_j A[i][j] B[j][d]     A in registers, a result of the other:  P V, dS K
#pragma once
#include "core/switch.h"
#include "ops/flash_attention/simt.cuh"

namespace genai_kernels::sm80 {

// Rows of 128 bytes and multiples of it repeat the banks every row, rows of 64 and 192 every second row.
GK_DEVICE int swizzle(int dim, int row) { return dim % 64 == 0 ? row & 7 : row >> 1 & 3; }

template <class T, int kDim>
struct TileMemory {
  static constexpr int kChunks = kDim / 8;
  T* data;

  GK_DEVICE T* chunk(int row, int c) const { return data + row * kDim + ((c ^ swizzle(kDim, row)) << 3); }
};

// True if every 16 bytes of a token's row may be copied at once.
template <class T>
GK_DEVICE bool is_aligned(const HeadsView& view, int64_t dims) {
  return view.dim == 1 && ((view.batch | view.token | view.head | dims) & 7) == 0 &&
         (reinterpret_cast<uintptr_t>(view.data) & 15) == 0;
}

// load_tile for memory of any strides: element by element, at once.
template <class T>
GK_DEVICE_COLD void load_tile_by_elements(T* to, int rows, int dim, int threads, const T* from, int64_t token_stride,
                                          int64_t dim_stride, int count, int dims) {
  for (int i = threadIdx.x; i < rows * dim / 8; i += threads) {
    const int row = i / (dim / 8), c = i % (dim / 8);
    T* chunk = to + row * dim + ((c ^ swizzle(dim, row)) << 3);
    for (int d = 0; d < 8; ++d)
      chunk[d] = row < count && 8 * c + d < dims ? from[row * token_stride + (8 * c + d) * dim_stride] : T{0};
  }
}

// Starts to load tokens [token, token + count) of a head into a tile of kRows; zeros in all other places. Asynchronous
// where the memory is aligned. kUnrolled: copies whose addresses are in registers at once.
template <int kRows, int kThreads, int kUnrolled, class T, int kDim>
GK_DEVICE void load_tile(TileMemory<T, kDim> to, const HeadsView& view, int64_t batch, int64_t token, int head,
                         int count, int dims) {
  constexpr int kChunks = TileMemory<T, kDim>::kChunks;
  const T* from = token_at<T>(view, batch, token, head);
  if (!is_aligned<T>(view, dims))
    return load_tile_by_elements<T>(to.data, kRows, kDim, kThreads, from, view.token, view.dim, count, dims);
#pragma unroll kUnrolled
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, c = i % kChunks;
    const bool valid = row < count && 8 * c < dims;
    copy_async_16(to.chunk(row, c), valid ? from + row * view.token + 8 * c : from, valid);
  }
}

// Zeros in the place of NaN and infinities: see score.cuh.
template <int kRows, int kThreads, class T, int kDim>
GK_DEVICE void make_finite(TileMemory<T, kDim> tile) {
  const uint16_t exponent = is_same<T, bf16> ? 0x7f80 : 0x7c00;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kDim; i += kThreads)
    if ((tile.data[i].bits & exponent) == exponent) tile.data[i].bits = 0;
}

// c[kTiles][kColumns / 8] += A B^T: rows [row, row + 16 kTiles) of a, the kColumns rows of b from `column`. kUnrolled: of
// the sum's steps of 16 dims; all of a long sum want registers for their addresses.
template <int kTiles, int kColumns, int kUnrolled, class T, int kDim>
GK_DEVICE void multiply_rows(float (&c)[kTiles][kColumns / 8][4], TileMemory<T, kDim> a, int row, TileMemory<T, kDim> b,
                             int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll kUnrolled
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t left[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) load_matrices(left[i], a.chunk(row + 16 * i + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      uint32_t right[4];
      load_matrices(right, b.chunk(column + 16 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        mma_16x8x16<T>(c[i][2 * j], left[i], right[0], right[1]);
        mma_16x8x16<T>(c[i][2 * j + 1], left[i], right[2], right[3]);
      }
    }
  }
}

// c[kTiles][kOut / 8] += A B: a has 16 kTiles rows by kDepth columns in registers, rounded to T; b its kDepth rows from
// `row` and dims [dim, dim + kOut).
template <int kDepth, int kOut, int kTiles, class T, int kDim>
GK_DEVICE void multiply_columns(float (&c)[kTiles][kOut / 8][4], const uint32_t (&a)[kTiles][kDepth / 16][4],
                                TileMemory<T, kDim> b, int row, int dim) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
#pragma unroll
    for (int j = 0; j < kOut / 16; ++j) {
      uint32_t right[4];
      load_matrices_transposed(right, b.chunk(row + 16 * k + lane % 16, dim / 8 + 2 * j + lane / 16));
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        mma_16x8x16<T>(c[i][2 * j], a[i][k], right[0], right[1]);
        mma_16x8x16<T>(c[i][2 * j + 1], a[i][k], right[2], right[3]);
      }
    }
}

// A result as the left side of the next product.
template <class T, int kTiles, int kColumns>
GK_DEVICE void round_to(uint32_t (&a)[kTiles][kColumns / 2][4], const float (&c)[kTiles][kColumns][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      a[i][j / 2][j % 2 * 2] = pack<T>(c[i][j][0], c[i][j][1]);
      a[i][j / 2][j % 2 * 2 + 1] = pack<T>(c[i][j][2], c[i][j][3]);
    }
}

template <int kTiles, int kColumns>
GK_DEVICE void clear(float (&c)[kTiles][kColumns][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[i][j][e] = 0;
}

template <int kTiles, int kColumns>
GK_DEVICE bool all_finite(const float (&c)[kTiles][kColumns][4]) {
  float sum = 0;  // of zeros, or NaN
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum += c[i][j][e] - c[i][j][e];
  return sum == 0;
}

// Rows of a warp's result, times by[tile][half], to tokens: `staging` is room for 16 kTiles rows that this warp alone uses.
template <int kTiles, int kOut, class T, int kDim>
GK_DEVICE void store_rows(const float (&c)[kTiles][kOut / 8][4], const float (&by)[kTiles][2],
                          TileMemory<T, kDim> staging, int row, T* to, int64_t token_stride, int64_t dim_stride,
                          bool aligned, int count, int dim, int dims) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kOut / 8; ++j)
        reinterpret_cast<uint32_t*>(staging.chunk(row + 16 * i + 8 * half + g, j))[t] =
            pack<T>(c[i][j][2 * half] * by[i][half], c[i][j][2 * half + 1] * by[i][half]);
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < 16 * kTiles * (kOut / 8); i += 32) {
    const int r = i / (kOut / 8), chunk = i % (kOut / 8), d = dim + 8 * chunk;
    if (row + r >= count) continue;
    const T* from = staging.chunk(row + r, chunk);
    T* at = to + (row + r) * token_stride + d * dim_stride;
    if (aligned) {
      if (d < dims) *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < 8; ++e)
        if (d + e < dims) at[e * dim_stride] = from[e];
    }
  }
  __syncwarp();
}

// Dropout of the elements [row g, row g + 8] x [columns 2t, 2t + 1] of an 8-column tile of keys from `key`: bit e is set
// where element e is kept. The two rows and the 4 keys of a counter belong to a pair of lanes: each draws for one row.
GK_DEVICE uint32_t dropout_keeps(const FlashAttentionParams& p, int batch, int head, int query, int key) {
  const int lane = threadIdx.x % 32, odd = lane % 2;
  uint32_t words[4];
  dropout_words(p, batch, head, query + 8 * odd, key + lane % 4 / 2 * 4, words);
  const uint32_t give0 = odd ? words[0] : words[2], give1 = odd ? words[1] : words[3];
  const uint32_t got0 = __shfl_xor_sync(~0u, give0, 1), got1 = __shfl_xor_sync(~0u, give1, 1);
  const auto kept = [&](uint32_t word, int e) { return uint32_t(word >= p.dropout_threshold) << e; };
  return kept(odd ? got0 : words[0], 0) | kept(odd ? got1 : words[1], 1) | kept(odd ? words[2] : got0, 2) |
         kept(odd ? words[3] : got1, 3);
}

}  // namespace genai_kernels::sm80
