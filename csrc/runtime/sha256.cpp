#include "runtime/sha256.h"

#include <bit>
#include <cstring>

namespace genai_kernels::runtime {
namespace {

// 4.2.2: the first 32 bits of the fractional parts of the cube roots of the first 64 primes.
constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t read_big_endian(const uint8_t* p) {
  return uint32_t(p[0]) << 24 | uint32_t(p[1]) << 16 | uint32_t(p[2]) << 8 | p[3];
}
void write_big_endian(uint32_t x, uint8_t* p) {
  for (int i = 0; i < 4; ++i) p[i] = uint8_t(x >> (24 - 8 * i));
}

}  // namespace

void Sha256::compress(const uint8_t* chunk) noexcept {
  using std::rotr;
  uint32_t w[64];
  for (int t = 0; t < 16; ++t) w[t] = read_big_endian(chunk + 4 * t);
  for (int t = 16; t < 64; ++t) {
    const uint32_t x = w[t - 15], y = w[t - 2];
    w[t] = w[t - 16] + (rotr(x, 7) ^ rotr(x, 18) ^ (x >> 3)) + w[t - 7] + (rotr(y, 17) ^ rotr(y, 19) ^ (y >> 10));
  }
  uint32_t a = state_[0], b = state_[1], c = state_[2], d = state_[3];
  uint32_t e = state_[4], f = state_[5], g = state_[6], h = state_[7];
  for (int t = 0; t < 64; ++t) {
    const uint32_t t1 = h + (rotr(e, 6) ^ rotr(e, 11) ^ rotr(e, 25)) + ((e & f) ^ (~e & g)) + kRound[t] + w[t];
    const uint32_t t2 = (rotr(a, 2) ^ rotr(a, 13) ^ rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + t1;
    d = c, c = b, b = a, a = t1 + t2;
  }
  const uint32_t added[8] = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state_[i] += added[i];
}

void Sha256::update(const void* data, size_t size) noexcept {
  auto from = static_cast<const uint8_t*>(data);
  while (size > 0) {
    const size_t at = size_ % 64, n = size < 64 - at ? size : 64 - at;
    if (n == 64) {
      compress(from);
    } else {
      std::memcpy(pending_ + at, from, n);
      if (at + n == 64) compress(pending_);
    }
    size_ += n, from += n, size -= n;
  }
}

Digest Sha256::finish() noexcept {
  const uint64_t bits = size_ * 8;
  const uint8_t padding[64] = {0x80};
  update(padding, 1 + (119 - size_ % 64) % 64);  // up to 56 modulo 64: the length takes the last eight bytes
  uint8_t length[8];
  write_big_endian(uint32_t(bits >> 32), length);
  write_big_endian(uint32_t(bits), length + 4);
  update(length, 8);
  Digest digest;
  for (int i = 0; i < 8; ++i) write_big_endian(state_[i], digest.data() + 4 * i);
  return digest;
}

}  // namespace genai_kernels::runtime
