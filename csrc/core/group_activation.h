// What follows a norm over groups of channels.
#pragma once
#include <cstdint>

#include "core/rows.h"

namespace genai_kernels {

enum class GroupActivation : int32_t { none, silu, gelu, gelu_tanh, relu };

// [batch, channels], or absent: the scale or shift of each sample.
struct SampleParameter {
  Parameter row;  // its stride is that between channels
  int64_t batch_stride = 0;
};

}  // namespace genai_kernels
