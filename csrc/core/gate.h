// The activations of gated layers, gate(x) * y.
#pragma once
#include <cstdint>

namespace genai_kernels {

enum class Gate : int32_t { silu, gelu, gelu_tanh };

}  // namespace genai_kernels
