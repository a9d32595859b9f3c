// What a cached block is found by: whose tokens it holds, and the digest over them and all that came before.
#pragma once
#include <cstdint>
#include <span>
#include <string>

#include "runtime/sha256.h"

namespace genai_kernels::runtime {

using Token = int32_t;

// Keys and values are reused only between requests of one adapter and one salt: they depend on the adapter's weights,
// and tenants with salts of their own cannot probe each other's prompts by the time an answer takes.
struct Scope {
  int64_t adapter_id = 0;
  std::string salt;
  bool operator==(const Scope&) const = default;
};

// Place of a block in a chain. Equal `content` means: equal scope, and equal tokens from the first one to the block's
// last; it is given out when a block is published, after a comparison of the tokens, so it does not rely on the digest.
struct Link {
  Digest digest{};       // all zero before the first block
  uint64_t content = 0;  // 0 before the first block
};

// SHA-256 over (parent, tokens, adapter, salt), each as one byte of type, eight of length, and its bytes, so that no two
// lists of fields share an encoding. `bits` < 256 clears the rest: for tests of collisions.
Digest block_digest(const Digest& parent, std::span<const Token> tokens, const Scope& scope, int bits = 256) noexcept;

}  // namespace genai_kernels::runtime
