// Which instruction set the CPU kernels run. The order is that of GENAI_KERNELS_ISA_TABLE in foreach_isa.h.
#pragma once

namespace genai_kernels {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };
inline constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
inline constexpr int kIsaCount = 4;

// True if this CPU, and the operating system that must save its registers, can run it.
bool isa_supported(Isa isa);

// The fastest supported one, or the one named by GENAI_KERNELS_ISA. A name that is unknown, or that this CPU cannot run,
// throws std::invalid_argument: silently running something else would make a test of that set pass without running it.
Isa selected_isa();

// The fastest for products of integers, whose bits are those of every set: the widest this CPU has, or the one named. An
// Intel CPU whose bf16 products are slow has fast ones of int8 all the same.
Isa integer_isa();

// Why selected_isa() is what it is, in one sentence.
const char* isa_reason();

}  // namespace genai_kernels
