// wgmma: products of a warpgroup, d[64 x N] (+)= a[64 x 16] b[16 x N], 16-bit elements summed in float32.
// tests/cuda_simulator/cuda/wgmma_ptx.cuh offers the same functions on the host.
//
// Asynchronous: the sums, and operands in registers, belong to the hardware from wgmma_fence() until wgmma_wait().
// Thread t of the warpgroup, in warp w = t / 32 with g = t % 32 / 4 and c = t % 4, holds
//   d[i]: row 16 w + g + 8 (i / 2 % 2), column 8 (i / 4) + 2 c + i % 2
//   a[i]: row 16 w + g + 8 (i % 2), columns 8 (i / 2) + 2 c, + 1: what pack() makes of d[8 k] to d[8 k + 7] is the
//         operand of the columns 16 k to 16 k + 15 of d.
// Operands in shared memory are 64-bit descriptors (hopper_tile.cuh): of rows of k (K-major), or, transposed, of columns.
#pragma once
#include "core/switch.h"
#include "cuda/ptx.cuh"

namespace genai_kernels {

// Registers written before are seen by the products that follow.
GK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
GK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending of the committed groups are under way.
template <int kPending>
GK_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of registers above a wait.
template <int kCount>
GK_DEVICE void register_fence(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <int kCount>
GK_DEVICE void register_fence(uint32_t (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

// wgmma_shared<T, kTransposeB>(d, a, b, accumulate): both operands in shared memory, a by its rows of k.
// wgmma_registers<T, kTransposeB>(d, a, b, accumulate): a[4] in registers.
// N follows from d, float[N / 2]. Without `accumulate`, d = a b.
//
// The instruction names every register of d: GK_TEN is ten of them in its text, GK_D8 and GK_D32 are those that they
// stand for; the numbers in the lines below are those of the operands after d.
#define GK_TEN(tens)                                                                                                \
  "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens "6, %" #tens "7, %" #tens \
  "8, %" #tens "9"
#define GK_TENS_40 GK_TEN() ", " GK_TEN(1) ", " GK_TEN(2) ", " GK_TEN(3)
#define GK_TENS_90 GK_TENS_40 ", " GK_TEN(4) ", " GK_TEN(5) ", " GK_TEN(6) ", " GK_TEN(7) ", " GK_TEN(8)
#define GK_D8(i)                                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define GK_D16 GK_D8(0), GK_D8(8)
#define GK_D32(i) GK_D8(i), GK_D8(i + 8), GK_D8(i + 16), GK_D8(i + 24)

#define GK_WGMMA_TEXT(n, type, d, a, b, accumulate, transposes)                                                     \
  "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " accumulate ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type \
  "." type " {" d "}, " a ", " b ", p, 1, 1, " transposes ";\n\t}"
#define GK_WGMMA(n, text, registers, n0, n1, n2, n3, n4, n5, n6)                                                  \
  template <class T, bool kTransposeB>                                                                            \
  GK_DEVICE void wgmma_shared(float (&d)[n / 2], uint64_t a, uint64_t b, int accumulate) {                        \
    if constexpr (is_same<T, bf16>)                                                                               \
      asm volatile(GK_WGMMA_TEXT(n, "bf16", text, n0, n1, n2, "0, " n3)                                           \
                   : registers                                                                                    \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(int(kTransposeB)));                                     \
    else                                                                                                          \
      asm volatile(GK_WGMMA_TEXT(n, "f16", text, n0, n1, n2, "0, " n3)                                            \
                   : registers                                                                                    \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(int(kTransposeB)));                                     \
  }                                                                                                               \
  template <class T, bool kTransposeB>                                                                            \
  GK_DEVICE void wgmma_registers(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {         \
    if constexpr (is_same<T, bf16>)                                                                               \
      asm volatile(GK_WGMMA_TEXT(n, "bf16", text, "{" n0 ", " n1 ", " n2 ", " n3 "}", n4, n5, n6)                 \
                   : registers                                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int(kTransposeB))); \
    else                                                                                                          \
      asm volatile(GK_WGMMA_TEXT(n, "f16", text, "{" n0 ", " n1 ", " n2 ", " n3 "}", n4, n5, n6)                  \
                   : registers                                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int(kTransposeB))); \
  }

#define GK_D40 GK_D32(0), GK_D8(32)
#define GK_D48 GK_D32(0), GK_D8(32), GK_D8(40)
#define GK_D64 GK_D32(0), GK_D32(32)
#define GK_D96 GK_D64, GK_D32(64)
#define GK_D128 GK_D96, GK_D32(96)

GK_WGMMA(32, GK_TEN() ", %10, %11, %12, %13, %14, %15", GK_D16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
GK_WGMMA(64, GK_TEN() ", " GK_TEN(1) ", " GK_TEN(2) ", %30, %31", GK_D32(0), "%32", "%33", "%34", "%35", "%36", "%37",
         "%38")
GK_WGMMA(80, GK_TENS_40, GK_D40, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
GK_WGMMA(96, GK_TENS_40 ", %40, %41, %42, %43, %44, %45, %46, %47", GK_D48, "%48", "%49", "%50", "%51", "%52", "%53",
         "%54")
GK_WGMMA(128, GK_TENS_40 ", " GK_TEN(4) ", " GK_TEN(5) ", %60, %61, %62, %63", GK_D64, "%64", "%65", "%66", "%67",
         "%68", "%69", "%70")
GK_WGMMA(192, GK_TENS_90 ", %90, %91, %92, %93, %94, %95", GK_D96, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
GK_WGMMA(256,
         GK_TENS_90 ", " GK_TEN(9) ", " GK_TEN(10) ", " GK_TEN(11) ", %120, %121, %122, %123, %124, %125, %126, %127",
         GK_D128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#undef GK_WGMMA
#undef GK_WGMMA_TEXT
#undef GK_TEN
#undef GK_TENS_40
#undef GK_TENS_90
#undef GK_D8
#undef GK_D16
#undef GK_D32
#undef GK_D40
#undef GK_D48
#undef GK_D64
#undef GK_D96
#undef GK_D128

}  // namespace genai_kernels
