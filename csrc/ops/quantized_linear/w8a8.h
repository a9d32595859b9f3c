// A linear layer in int8: rows of x are quantized as they come, and multiplied by a weight of int8 in integers.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "cpu/matmul.h"

namespace genai_kernels {

// Sums of more products of 7 bits by 7 could leave 32 bits.
inline constexpr int64_t kW8a8MostDepth = 1 << 17;

struct W8a8Params {
  MatmulOperand x;
  const int8_t* weight;  // [columns][depth]
  const float* scale;    // [columns]
  MatmulOperand bias;    // outer stride per column; or data null
  int64_t rows, columns, depth;
  void* out;  // [rows][columns], of the type of x
};

int64_t w8a8_scratch(const W8a8Params& p, int64_t rows);
void w8a8_kernel(const W8a8Params& p, const MatmulItem& item, void* scratch);

}  // namespace genai_kernels
