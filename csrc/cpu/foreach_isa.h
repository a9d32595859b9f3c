// Compiles the file that includes this header once more per instruction set, each time inside a namespace and a target
// region of its own, with plain compiler flags (no -mavx512f anywhere). No include guard, on purpose.
//
//   #include "my_op.h"                                    // (1) every other header the file needs, BEFORE the region
//   #define GENAI_KERNELS_ISA_FILE "ops/my_op/my_op_cpu.cpp"
//   #define GENAI_KERNELS_ISA_DOT_BF16                    //     only if the kernel has products of bf16 pairs
//   #include "cpu/foreach_isa.h"                          // (2) re-includes this very file, once per instruction set
//   #ifdef GENAI_KERNELS_ISA_NAME                         // (3) the kernel, written once, seen once per set
//   #include "cpu/vec.h"                                  //     (the per-set headers of csrc/cpu belong in here)
//   namespace genai_kernels::GENAI_KERNELS_ISA_NAME { void my_op(...) { ... } }
//   #else                                                 // (4) seen once: the dispatch
//   GENAI_KERNELS_ISA_DISPATCH(void, my_op, (const Params& p), (p))   //  genai_kernels::my_op runs the selected one
//   #endif
//
// -DGENAI_KERNELS_BASELINE_ONLY compiles the baseline alone, for tools that build a kernel many times (tests/mutants.py).
//
// avx512_bf16 is a set of its own only in files with GENAI_KERNELS_ISA_DOT_BF16; in the others its kernels are avx512's:
// what it adds to those, a shorter rounding to bf16, is not worth a third of their compilation.
//
// In (3): GENAI_KERNELS_ISA_LANES = fp32 lanes of the widest register, GENAI_KERNELS_ISA_BF16 = 1 if dpbf16 exists.
//
// Hazard: an inline function or template of a header (std, torch) that is compiled inside the region becomes a weak
// (COMDAT) symbol holding AVX-512 code, and the linker may keep that copy for the whole program: illegal instruction on
// an older CPU, in code that has nothing to do with this kernel. So (3) includes nothing of std or torch and calls
// nothing of theirs; its own functions live in unnamed namespaces. tests/test_floors.py looks at the objects.
#ifndef GENAI_KERNELS_ISA_NAME

#include "cpu/isa.h"

#define GENAI_KERNELS_ISA_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define GENAI_KERNELS_ISA_BEGIN(features) \
  GENAI_KERNELS_ISA_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define GENAI_KERNELS_ISA_END _Pragma("clang attribute pop")
#else
#define GENAI_KERNELS_ISA_BEGIN(features) _Pragma("GCC push_options") GENAI_KERNELS_ISA_PRAGMA(GCC target(features))
#define GENAI_KERNELS_ISA_END _Pragma("GCC pop_options")
#endif

// The compiler's default target: SSE2 on x86-64, and all there is on other architectures.
#define GENAI_KERNELS_ISA_NAME baseline
#define GENAI_KERNELS_ISA_LANES 4
#define GENAI_KERNELS_ISA_BF16 0
#include GENAI_KERNELS_ISA_FILE
#undef GENAI_KERNELS_ISA_NAME
#undef GENAI_KERNELS_ISA_LANES
#undef GENAI_KERNELS_ISA_BF16
#define GENAI_KERNELS_ISA_TABLE(fn) {&baseline::fn}

#if defined(__x86_64__) && !defined(GENAI_KERNELS_BASELINE_ONLY)

GENAI_KERNELS_ISA_BEGIN("avx2,fma,f16c")
#define GENAI_KERNELS_ISA_NAME avx2
#define GENAI_KERNELS_ISA_LANES 8
#define GENAI_KERNELS_ISA_BF16 0
#include GENAI_KERNELS_ISA_FILE
#undef GENAI_KERNELS_ISA_NAME
#undef GENAI_KERNELS_ISA_LANES
#undef GENAI_KERNELS_ISA_BF16
GENAI_KERNELS_ISA_END

GENAI_KERNELS_ISA_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define GENAI_KERNELS_ISA_NAME avx512
#define GENAI_KERNELS_ISA_LANES 16
#define GENAI_KERNELS_ISA_BF16 0
#include GENAI_KERNELS_ISA_FILE
#undef GENAI_KERNELS_ISA_NAME
#undef GENAI_KERNELS_ISA_LANES
#undef GENAI_KERNELS_ISA_BF16
GENAI_KERNELS_ISA_END

#ifdef GENAI_KERNELS_ISA_DOT_BF16
GENAI_KERNELS_ISA_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#define GENAI_KERNELS_ISA_NAME avx512_bf16
#define GENAI_KERNELS_ISA_LANES 16
#define GENAI_KERNELS_ISA_BF16 1
#include GENAI_KERNELS_ISA_FILE
#undef GENAI_KERNELS_ISA_NAME
#undef GENAI_KERNELS_ISA_LANES
#undef GENAI_KERNELS_ISA_BF16
GENAI_KERNELS_ISA_END
#else
namespace genai_kernels {
namespace avx512_bf16 = avx512;
}
#endif

#undef GENAI_KERNELS_ISA_TABLE
#define GENAI_KERNELS_ISA_TABLE(fn) {&baseline::fn, &avx2::fn, &avx512::fn, &avx512_bf16::fn}

#endif  // __x86_64__

// Defines genai_kernels::fn, which calls the kernel of the selected instruction set, or of the one that `isa` names.
#define GENAI_KERNELS_ISA_DISPATCH(result, fn, parameters, arguments) \
  GENAI_KERNELS_ISA_DISPATCH_TO(selected_isa(), result, fn, parameters, arguments)
#define GENAI_KERNELS_ISA_DISPATCH_TO(isa, result, fn, parameters, arguments)        \
  namespace genai_kernels {                                                          \
  result fn parameters {                                                             \
    static constexpr decltype(&baseline::fn) kTable[] = GENAI_KERNELS_ISA_TABLE(fn); \
    return kTable[int(isa)] arguments;                                               \
  }                                                                                  \
  }

#endif  // GENAI_KERNELS_ISA_NAME
