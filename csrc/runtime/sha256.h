// SHA-256 (FIPS 180-4), for the keys of the prefix cache. Own text, so that the library links no cryptography package.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

namespace genai_kernels::runtime {

using Digest = std::array<uint8_t, 32>;

class Sha256 {
 public:
  void update(const void* data, size_t size) noexcept;
  Digest finish() noexcept;  // ends the message; the object is spent

 private:
  void compress(const uint8_t* chunk) noexcept;

  // 5.3.3: the first 32 bits of the fractional parts of the square roots of the first eight primes.
  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint8_t pending_[64];
  uint64_t size_ = 0;  // bytes so far; size_ % 64 of them are pending
};

}  // namespace genai_kernels::runtime
