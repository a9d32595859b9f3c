#include "cpu/machine_limits.h"

#include "cpu/region_headers.h"

#define GENAI_KERNELS_ISA_FILE "cpu/machine_limits.cpp"
#define GENAI_KERNELS_ISA_DOT_BF16
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// Chains in flight: two FMA units of latency 4 need 8, AMD's dot product of latency 6 needs 12, and 12 leave four of
// AVX2's 16 registers for the operands.
constexpr int kChains = 12;
constexpr int kUnroll = 8;  // rounds between two tests of the loop counter

template <class V, class Step>
GK_INLINE void chains(int64_t iterations, float* sink, V start, Step&& step) {
  V sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = start;
  for (int64_t n = 0; n < iterations; ++n)
    GK_UNROLL for (int u = 0; u < kUnroll; ++u) GK_UNROLL for (int i = 0; i < kChains; ++i) sum[i] = step(sum[i]);
  for (int i = 1; i < kChains; ++i) sum[0] = sum[0] + sum[i];
  *sink = float(sum[0][0]);
}

}  // namespace

double peak_kernel(Peak peak, int64_t iterations, float* sink) {
  const double steps = double(iterations) * kUnroll * kChains;
  // Read from memory, so that the compiler knows nothing of them; near 1 and 0, so that nothing grows or denormalises.
  const float factor = sink[0], term = sink[1];
  if (peak == Peak::fma_f32) {
    const VecF a = broadcast(factor), b = broadcast(term);
    chains(iterations, sink, a, [&](VecF sum) { return fma(sum, a, b); });
    return steps * 2 * kLanes;
  }
  if (peak == Peak::fma_f64) {
    const VecD a = broadcast(double(factor)), b = broadcast(double(term));
    chains(iterations, sink, a, [&](VecD sum) { return fma(sum, a, b); });
    return steps * 2 * kLanesOf<double>;
  }
#if GENAI_KERNELS_ISA_BF16
  const __m512bh a = _mm512_cvtne2ps_pbh((__m512)broadcast(term), (__m512)broadcast(term));
  chains(iterations, sink, broadcast(term), [&](VecF sum) { return (VecF)_mm512_dpbf16_ps((__m512)sum, a, a); });
  return steps * 4 * kLanes;
#else
  return 0;
#endif
}

float stream_read_kernel(const char* from, int64_t begin, int64_t end) {
  constexpr int64_t kStep = kRegisterBytes;
  VecF sum[8] = {};
  int64_t i = begin;
  for (; i + 8 * kStep <= end; i += 8 * kStep) GK_UNROLL for (int j = 0; j < 8; ++j) {
      VecF v;
      __builtin_memcpy(&v, from + i + j * kStep, sizeof v);
      sum[j] = sum[j] + v;
    }
  for (int j = 1; j < 8; ++j) sum[0] = sum[0] + sum[j];
  float tail = 0;
  for (; i < end; ++i) tail += from[i];
  return horizontal_sum<float>(sum[0]) + tail;
}

void stream_copy_kernel(const char* from, char* to, int64_t begin, int64_t end) {
  constexpr int64_t kStep = kRegisterBytes;
  int64_t i = begin;
  for (; i + 4 * kStep <= end; i += 4 * kStep) GK_UNROLL for (int j = 0; j < 4; ++j) {
      VecF v;
      __builtin_memcpy(&v, from + i + j * kStep, sizeof v);
      __builtin_memcpy(to + i + j * kStep, &v, sizeof v);
    }
  for (; i < end; ++i) to[i] = from[i];
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(double, peak_kernel, (Peak peak, int64_t iterations, float* sink), (peak, iterations, sink))
GENAI_KERNELS_ISA_DISPATCH(float, stream_read_kernel, (const char* from, int64_t begin, int64_t end),
                           (from, begin, end))
GENAI_KERNELS_ISA_DISPATCH(void, stream_copy_kernel, (const char* from, char* to, int64_t begin, int64_t end),
                           (from, to, begin, end))

#endif
