// How a row of a norm is laid over threads on the GPU, and rows over blocks: what its launchers and its host, which
// allocates the blocks' sums, agree on.
#pragma once
#include "core/dtype.h"
#include "core/row_blocks.h"

namespace genai_kernels {

// By the length of a row alone, so that neither other rows nor strides change its bits.
struct RowLaunch {
  int group;    // threads of a row
  int threads;  // of a block
  int vectors;  // of 16 bytes, that a thread holds; 0: too long a row, read again for every pass over it
  bool wide;    // 16 bytes at once
  double length, inverse_length;
};

inline constexpr int kShortRowThreads = 128;  // a block of several rows: small enough that few rows fill the card
inline constexpr int kTileThreads = 512;      // the most threads where each holds 4 vectors of several tensors
inline constexpr int kLongRowThreads = 512;   // of a row that does not fit into registers

inline int lanes_for(int64_t vectors) {
  int lanes = 1;
  while (lanes < vectors) lanes *= 2;
  return lanes;
}
// Up to 32 vectors: one for each lane. Up to 128: a warp or half of one with 4 each, without a barrier. Then whole warps.
inline RowLaunch row_launch(int64_t length, int64_t bytes_of_element, int most_threads_with_8) {
  const int64_t vectors = (length * bytes_of_element + 15) / 16;
  const double n = double(length);
  const auto whole_warps = [&](int64_t each) { return int((vectors + each * 32 - 1) / (each * 32) * 32); };
  if (vectors <= 32) return {lanes_for(vectors), kShortRowThreads, 1, false, n, 1 / n};
  if (vectors <= 128) return {lanes_for((vectors + 3) / 4), kShortRowThreads, 4, false, n, 1 / n};
  if (vectors <= 4 * kTileThreads) return {whole_warps(4), whole_warps(4), 4, false, n, 1 / n};
  if (vectors <= 8 * most_threads_with_8) return {whole_warps(8), whole_warps(8), 8, false, n, 1 / n};
  return {kLongRowThreads, kLongRowThreads, 0, false, n, 1 / n};
}

// Backward: x, dy and dsum with 8 vectors each are too many registers.
inline RowLaunch backward_row_launch(int64_t length, Dtype dtype) {
  return row_launch(length, dtype == Dtype::f32 ? 4 : 2, 0);
}
// By the number and length of rows alone. 512 blocks are four for each SM of the largest card; more would cost more to
// add than they gain.
inline RowBlocks gpu_norm_blocks(int64_t rows, int64_t length, Dtype dtype) {
  const RowLaunch launch = backward_row_launch(length, dtype);
  const int64_t at_once = launch.threads / launch.group, part = (rows + 511) / 512;
  const int64_t least = at_once > 1 ? at_once : 2, size = part > least ? part : least;
  return RowBlocks(rows, (size + at_once - 1) / at_once * at_once);
}

}  // namespace genai_kernels
