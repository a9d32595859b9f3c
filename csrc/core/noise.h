// Which random numbers are drawn for what: the last word of Philox's counter, so that two uses of one seed and offset
// share none. The layout of normal numbers is cpu/normal.h's; genai_kernels/philox.py has the same in PyTorch.
#pragma once
#include <cstdint>

namespace genai_kernels {

enum class NoiseStream : uint32_t {
  plain = 0x6e6f726d,   // seeded_normal
  step = 0x73746570,    // of a sampler's step
  known = 0x6b6e6f77,   // of the known part of an image, at a step
  latent = 0x6c61746e,  // of a VAE's latents
};

inline constexpr int kNormalBlock = 64;  // numbers made together

}  // namespace genai_kernels
