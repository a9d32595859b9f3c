#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace genai_kernels {
namespace {

#if defined(__x86_64__)
bool f16c_supported() {  // Clang before 19 does not know __builtin_cpu_supports("f16c")
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

}  // namespace

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();  // these return a mask, not 0/1
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c_supported();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::baseline;
}

namespace {

// vdpbf16ps does twice the work of an fp32 FMA. AMD (Zen 4, 5) issues both at the same rate: bf16 is twice as fast.
// Intel (Cooper Lake to Emerald Rapids) issues it at a quarter of the FMA rate (measured on Sapphire/Emerald Rapids: 86
// against 178 GFLOP/s a core), so that converting to fp32 and multiplying there is twice as fast, and more exact.
bool bf16_dot_is_fast() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

struct Selection {
  Isa isa;
  const char* reason;
};

Selection select() {
  if (const char* name = std::getenv("GENAI_KERNELS_ISA")) {
    for (int i = 0; i < kIsaCount; ++i)
      if (isa_supported(Isa(i)) && std::string(name) == kIsaNames[i]) return {Isa(i), "forced by GENAI_KERNELS_ISA"};
    std::string supported;
    for (int i = 0; i < kIsaCount; ++i)
      if (isa_supported(Isa(i))) supported += std::string(supported.empty() ? "" : ", ") + kIsaNames[i];
    throw std::invalid_argument("genai_kernels: GENAI_KERNELS_ISA: expected one of " + supported +
                                " (what this CPU supports), got '" + name + "'");
  }
  if (isa_supported(Isa::avx512_bf16))
    return bf16_dot_is_fast()
               ? Selection{Isa::avx512_bf16, "the widest this CPU has; its bf16 dot product runs at full rate"}
               : Selection{Isa::avx512, "avx512_bf16 is there, but this CPU's bf16 dot product is slower than fp32"};
  if (isa_supported(Isa::avx512)) return {Isa::avx512, "the widest this CPU has; it has no bf16 dot product"};
  if (isa_supported(Isa::avx2)) return {Isa::avx2, "the widest this CPU has; it has no AVX-512"};
  return {Isa::baseline, "this CPU has no AVX2 with FMA and F16C"};
}

const Selection& selection() {
  static const Selection selected = select();
  return selected;
}

}  // namespace

Isa selected_isa() { return selection().isa; }
Isa integer_isa() {
  static const Isa widest =
      std::getenv("GENAI_KERNELS_ISA") || !isa_supported(Isa::avx512_bf16) ? selected_isa() : Isa::avx512_bf16;
  return widest;
}
const char* isa_reason() { return selection().reason; }

}  // namespace genai_kernels
