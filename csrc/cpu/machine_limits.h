// What this machine can do at most: the loops by which `bench` measures the limits that it quotes results against.
#pragma once
#include <cstdint>

namespace genai_kernels {

enum class Peak { fma_f32, fma_f64, dot_bf16 };

// Runs `iterations` rounds of independent multiply-add chains in registers, no memory touched, in the selected
// instruction set (dot_bf16: in avx512_bf16, if that is the selected one). Returns how many floating-point operations
// that was, 0 where the instruction set has no such operation. `sink` receives the results, so that they are computed.
double peak_kernel(Peak peak, int64_t iterations, float* sink);

// Reads bytes [begin, end) of `from` and returns a value that depends on all of them.
float stream_read_kernel(const char* from, int64_t begin, int64_t end);
// Copies bytes [begin, end).
void stream_copy_kernel(const char* from, char* to, int64_t begin, int64_t end);

}  // namespace genai_kernels
