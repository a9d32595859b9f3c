// What this binary was built with and what it runs, for `doctor` and `explain`.
#include <torch/csrc/stable/library.h>

#include <string>

#include "core/launcher.h"
#include "cpu/isa.h"

#if defined(__clang__)
#define GK_COMPILER "clang " __clang_version__
#else
#define GK_COMPILER "gcc " __VERSION__
#endif

namespace genai_kernels {
namespace {

// One "key=value" a line.
std::string build_info() {
  std::string cuda = "0";
#ifdef GENAI_KERNELS_CUDA
  cuda = "sm_80, sm_90a and PTX of CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
         std::to_string(CUDART_VERSION % 1000 / 10);
#endif
  return "version=" GENAI_KERNELS_VERSION "\ncompiler=" GK_COMPILER "\ntarget_torch=2.10\ncuda=" + cuda + "\n";
}

// Every instruction set, one "name=yes|no" a line: whether this CPU can run it.
std::string isa_table() {
  std::string text;
  for (int i = 0; i < kIsaCount; ++i) text += std::string(kIsaNames[i]) + (isa_supported(Isa(i)) ? "=yes\n" : "=no\n");
  return text;
}

std::string isa() { return kIsaNames[int(selected_isa())]; }
std::string isa_why() {
  selected_isa();
  return isa_reason();
}

}  // namespace
}  // namespace genai_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(genai_kernels, m) {
  m.def("build_info() -> str");
  m.def("isa_table() -> str");
  m.def("isa() -> str");
  m.def("isa_reason() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(genai_kernels, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&genai_kernels::build_info));
  m.impl("isa_table", TORCH_BOX(&genai_kernels::isa_table));
  m.impl("isa", TORCH_BOX(&genai_kernels::isa));
  m.impl("isa_reason", TORCH_BOX(&genai_kernels::isa_why));
}
