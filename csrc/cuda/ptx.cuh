// Every instruction that CUDA C++ has no name for, one function each, and how a 16-bit element becomes a float. Nothing
// else in csrc has inline PTX: tests/cuda_simulator/cuda/ptx.cuh offers the same functions on the host, so that the
// text of a kernel runs in either.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/dtype.h"

#define GK_DEVICE __device__ __forceinline__
// What hardly ever runs: called, so that it takes no registers from what does.
#define GK_DEVICE_COLD __device__ __noinline__
// The dynamic shared memory of a block, aligned to 1024 bytes (what a swizzled TMA box asks for).
#define GK_SHARED(name) extern __shared__ __align__(1024) char name[]

namespace genai_kernels {

// ---- elements ----
GK_DEVICE float to_float(float x) { return x; }
GK_DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
GK_DEVICE float to_float(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
GK_DEVICE T from_float(float x);
template <>
GK_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
GK_DEVICE bf16 from_float<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
GK_DEVICE fp16 from_float<fp16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// Two 16-bit elements in one register, `low` at the lower address.
template <class T>
GK_DEVICE uint32_t pack(float low, float high);
template <>
GK_DEVICE uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
GK_DEVICE uint32_t pack<fp16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// 16 bytes of global or shared memory, aligned to 16. Data of one's own kernel that nothing writes: load_constant_16.
GK_DEVICE uint4 load_16(const void* from) { return *static_cast<const uint4*>(from); }
GK_DEVICE uint4 load_constant_16(const void* from) { return __ldg(static_cast<const uint4*>(from)); }
GK_DEVICE void store_16(void* to, uint4 value) { *static_cast<uint4*>(to) = value; }

// The compiler cannot tell that a word is what it was: it unpacks it again instead of holding on to both forms.
GK_DEVICE void forget(uint32_t& word) { asm volatile("" : "+r"(word)); }

// 2^x, to 2 ULP; subnormal results are zero.
GK_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x for 2^-126 < x < 2^126, to 1 ULP.
GK_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- shared memory and asynchronous copies (sm_80) ----
GK_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, both aligned to 16; zeros, and nothing is read, where not `valid`.
GK_DEVICE void copy_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
GK_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's groups are under way. Other threads see them after a barrier.
template <int kPending>
GK_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- matrices of 16-bit elements in a warp's registers (sm_80) ----
// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8. Lane l receives, of each matrix, the
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; of its transpose with load_matrices_transposed.
GK_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
GK_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d[16 x 8] += a[16 x 16] b[16 x 8]. With g = lane / 4 and t = lane % 4:
//   a[0], a[1], a[2], a[3]: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 (of a[2], a[3]: + 8)
//   b[0], b[1]: rows 2t, 2t + 1 (of b[1]: + 8), column g
//   d[0], d[1]: row g, columns 2t, 2t + 1; d[2], d[3]: row g + 8
template <class T>
GK_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
GK_DEVICE void mma_16x8x16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
GK_DEVICE void mma_16x8x16<fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace genai_kernels
