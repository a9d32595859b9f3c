// What the host of DoRA's own ops hands to their kernels.
#pragma once
#include "cpu/matmul.h"

namespace genai_kernels {

// norm[o] = |row o of W + scaling B A|, from |W|^2 + 2 scaling (W A') . B + scaling^2 (B A A') . B, row by row.
struct DoraNormParams {
  MatmulOperand weight, a, b;  // rows lie along: [out][in], [rank][in], [out][rank]
  int64_t in, rank, out;
  const void* wa;   // [rank][out]: A W', of the compute type
  const void* baa;  // [out][rank]: B A A'
  double scaling;
  void* norm;  // [out], of the compute type
  bool wide;   // which is double, else float
};

int64_t dora_norm_scratch(const DoraNormParams& p);
void dora_norm_kernel(const DoraNormParams& p, int64_t begin, int64_t end, void* scratch);

// y = column_scale * inner: d_inner = dy * column_scale, d_scale = the sum of dy * inner over rows.
struct ScaleColumnsParams {
  Dtype dtype;
  int64_t rows, columns;
  const void* dy;
  int64_t dy_row;
  const void *inner, *column_scale;
  Dtype inner_dtype;
  void *d_inner, *d_scale;  // column_scale and d_scale are float, or double for f64
};

void scale_columns_bwd_kernel(const ScaleColumnsParams& p, int64_t column_begin, int64_t column_end);

}  // namespace genai_kernels
