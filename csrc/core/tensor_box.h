// How a tile's columns are cut into the boxes that TMA copies: shared by the host, which describes the tensor, and the
// kernel.
#pragma once

namespace genai_kernels {

// 16-bit elements in a line of shared memory: 128 bytes, or 64 where 128 would leave a part of the last box unused.
constexpr int tensor_box_columns(int columns) { return columns % 64 == 0 ? 64 : 32; }

}  // namespace genai_kernels
