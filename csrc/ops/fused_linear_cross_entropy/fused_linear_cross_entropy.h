// What the kernels of fused_linear_cross_entropy are given: some rows of logits and the classes they should have named.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace genai_kernels {

struct CrossEntropyParams {
  Dtype dtype;           // of the logits: f32 or f64
  Dtype gradient_dtype;  // of their gradients, which take their place: a row begins where its logits did
  void* logits;          // [rows][row_stride], of which `vocabulary` are there
  int64_t vocabulary, row_stride;
  const int64_t* targets;     // [rows], each in [0, vocabulary)
  const double* row_weights;  // [rows], what the gradients of a row are multiplied by; or null: 1
  double label_smoothing, softcap, z_loss;
  bool gradient;            // wanted, in place of the logits
  double *loss, *z_losses;  // [rows]; the first includes the second
};

// Work item: a row.
void cross_entropy_rows_kernel(const CrossEntropyParams& p, int64_t begin, int64_t end);

// sums[j] += the gradients of logit j, over the first `rows` rows. Work item: a column.
void cross_entropy_columns_kernel(const CrossEntropyParams& p, int64_t rows, double* sums, int64_t begin, int64_t end);

}  // namespace genai_kernels
