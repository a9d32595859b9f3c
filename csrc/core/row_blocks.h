// How a reduction over rows (the gradient of a weight or bias) is split: by the number of rows alone, so that its bits
// depend on no thread count. Each block's sum goes to its own row of doubles; the blocks are added in order.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace genai_kernels {

// Rows of a block that are read together: their terms meet in registers before they go to the sums in memory.
inline constexpr int kRowGroup = 4;

struct RowBlocks {
  int64_t rows;  // in all
  int64_t size;  // of a block

  // 16 blocks for few rows, so that the sums are small beside the rows; then blocks of 64 rows; then 256 blocks.
  explicit RowBlocks(int64_t rows_in_all) : rows(rows_in_all), size(kRowGroup) {
    const int64_t sixteenth = (rows + 15) / 16, part = (rows + 255) / 256;
    if (sixteenth > size) size = sixteenth < 64 ? sixteenth : 64;
    if (part > size) size = part;
    size = (size + kRowGroup - 1) / kRowGroup * kRowGroup;
  }
  RowBlocks(int64_t rows_in_all, int64_t size_of_block) : rows(rows_in_all), size(size_of_block) {}
  GK_HOST_DEVICE int64_t count() const { return (rows + size - 1) / size; }
  GK_HOST_DEVICE int64_t begin(int64_t block) const { return block * size; }
  GK_HOST_DEVICE int64_t end(int64_t block) const { return begin(block) + size < rows ? begin(block) + size : rows; }
};

}  // namespace genai_kernels
