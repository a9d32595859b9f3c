// The words of CUDA C++ that kernels use, for a host compiler.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "simulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- what threads do together ----
namespace simulator {
void synchronize_threads();

template <class T>
T shuffle(const char* label, T value, int from) {  // from: the lane whose value this one gets
  static_assert(sizeof(T) <= 8);
  struct Mine {
    T value, result;
    int from;
  } mine{value, value, from};
  with_warp(label, &mine, [](void* const(&lanes)[kWarp]) {
    for (void* lane : lanes) {
      auto* to = static_cast<Mine*>(lane);
      to->result = static_cast<Mine*>(lanes[to->from])->value;
    }
  });
  return mine.result;
}
inline unsigned vote(const char* label, unsigned mask, bool value) {
  if (mask != ~0u) fail(std::string(label) + ": the simulator knows the whole warp only");
  struct Mine {
    bool value;
    unsigned result;
  } mine{value, 0};
  with_warp(label, &mine, [](void* const(&lanes)[kWarp]) {
    unsigned votes = 0;
    for (int l = 0; l < kWarp; ++l) votes |= unsigned(static_cast<Mine*>(lanes[l])->value) << l;
    for (void* lane : lanes) static_cast<Mine*>(lane)->result = votes;
  });
  return mine.result;
}
}  // namespace simulator

inline void __syncthreads() { simulator::synchronize_threads(); }
inline void __syncwarp(unsigned = ~0u) { simulator::vote("__syncwarp", ~0u, true); }
template <class T>
T __shfl_sync(unsigned, T value, int from, int width = 32) {
  const int lane = simulator::lane();
  return simulator::shuffle("__shfl_sync", value, lane / width * width + (from & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return simulator::shuffle("__shfl_xor_sync", value, simulator::lane() ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int from = simulator::lane() + delta;
  return simulator::shuffle("__shfl_down_sync", value, from < 32 ? from : simulator::lane());
}
inline unsigned __ballot_sync(unsigned mask, bool value) { return simulator::vote("__ballot_sync", mask, value); }
inline bool __any_sync(unsigned mask, bool value) { return simulator::vote("__any_sync", mask, value) != 0; }
inline bool __all_sync(unsigned mask, bool value) { return simulator::vote("__all_sync", mask, value) == ~0u; }
inline bool __syncthreads_or(bool value) {
  static bool any;  // of one block, which runs alone
  __syncthreads();
  any = false;
  __syncthreads();
  any = any || value;
  __syncthreads();
  return any;
}

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T __ldg(const T* at) {
  return *at;
}

// ---- arithmetic ----
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __ffs(int x) { return x ? std::countr_zero(uint32_t(x)) + 1 : 0; }
inline float rsqrtf(float x) { return float(1 / std::sqrt(double(x))); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
