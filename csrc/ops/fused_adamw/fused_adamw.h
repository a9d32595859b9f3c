// What the host of fused_adamw_ hands to its kernels.
#pragma once
#include "core/dtype.h"

namespace genai_kernels {

// Elements of a piece of work, and of a partial sum of the norm: 5 us of work, what it costs to wake a thread, and a sum
// for each is little to keep.
constexpr int64_t kAdamwBlock = int64_t(1) << 14;

// One parameter and what belongs to it: as many elements each, in the same order of memory.
struct AdamwTensor {
  Dtype dtype, grad_dtype;  // the gradient has the parameter's or float32
  void* param;
  const void* grad;
  float *exp_avg, *exp_avg_sq;
  float *master, *ema;  // may be null
  int64_t count;
};

// The numbers of a step, each rounded to float32 once.
struct AdamwStep {
  float clip;          // what gradients are multiplied by; -itself to maximize
  float keep;          // 1 - lr weight_decay
  float new_share;     // 1 - beta1
  float keep_sq;       // beta2
  float new_share_sq;  // 1 - beta2
  float root_scale;    // 1 / sqrt(1 - beta2^step)
  float eps;
  float rate;       // lr / (1 - beta1^step)
  float ema_share;  // 1 - ema_decay
};

// Elements [begin, end) of one parameter.
void fused_adamw_kernel(const AdamwTensor& t, const AdamwStep& step, int64_t begin, int64_t end);
// The sum of the squares of elements [begin, end), in double: the same bits on every instruction set.
double sum_of_squares_kernel(Dtype dtype, const void* x, int64_t begin, int64_t end);

}  // namespace genai_kernels
