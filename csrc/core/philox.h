// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), for any number of lanes.
//
// Counter-based: the random bits of an element follow from its index alone, so that every backend, tiling, thread count
// and pass (forward, backward) sees the same ones. Written over arrays of lanes; the compiler vectorises the loops.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace genai_kernels {

// words[w][lane] = word w of Philox(counter = (c0, c1[lane], c2[lane], c3), key = seed).
template <int Lanes>
[[gnu::always_inline]] GK_HOST_DEVICE inline void philox(uint32_t c0, const uint32_t (&c1)[Lanes],
                                                         const uint32_t (&c2)[Lanes], uint32_t c3, uint64_t seed,
                                                         uint32_t (&words)[4][Lanes]) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  for (int l = 0; l < Lanes; ++l) {
    words[0][l] = c0;
    words[1][l] = c1[l];
    words[2][l] = c2[l];
    words[3][l] = c3;
  }
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < Lanes; ++l) {
      const uint64_t product0 = kMultiplier0 * words[0][l], product1 = kMultiplier1 * words[2][l];
      const uint32_t w0 = uint32_t(product1 >> 32) ^ words[1][l] ^ key0;
      const uint32_t w2 = uint32_t(product0 >> 32) ^ words[3][l] ^ key1;
      words[0][l] = w0;
      words[1][l] = uint32_t(product1);
      words[2][l] = w2;
      words[3][l] = uint32_t(product0);
    }
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
}

// A 32-bit word w keeps its element if w >= threshold: probability 1 - p, to within 2^-32.
inline uint32_t dropout_threshold(double p) {
  const double t = p * 4294967296.0;
  return t >= 4294967295.0 ? 0xffffffffu : uint32_t(t);
}

}  // namespace genai_kernels
