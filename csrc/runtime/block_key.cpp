#include "runtime/block_key.h"

#include <bit>

namespace genai_kernels::runtime {
namespace {

enum class Field : uint8_t { kFormat = 0, kParent = 1, kTokens = 2, kAdapter = 3, kSalt = 4 };

template <class Word>
void add_little_endian(Sha256& hash, Word word) noexcept {
  uint8_t bytes[sizeof(Word)];
  for (size_t i = 0; i < sizeof(Word); ++i) bytes[i] = uint8_t(word >> (8 * i));
  hash.update(bytes, sizeof(Word));
}

void add_header(Sha256& hash, Field field, uint64_t size) noexcept {
  const auto kind = uint8_t(field);
  hash.update(&kind, 1);
  add_little_endian(hash, size);
}

void add_bytes(Sha256& hash, Field field, const void* data, size_t size) noexcept {
  add_header(hash, field, size);
  hash.update(data, size);
}

}  // namespace

Digest block_digest(const Digest& parent, std::span<const Token> tokens, const Scope& scope, int bits) noexcept {
  constexpr char kFormat[] = "kv-block-1";  // another layout of the fields gets another name
  Sha256 hash;
  add_bytes(hash, Field::kFormat, kFormat, sizeof(kFormat) - 1);
  add_bytes(hash, Field::kParent, parent.data(), parent.size());
  if constexpr (std::endian::native == std::endian::little) {
    add_bytes(hash, Field::kTokens, tokens.data(), tokens.size_bytes());
  } else {
    add_header(hash, Field::kTokens, tokens.size_bytes());
    for (const Token t : tokens) add_little_endian(hash, uint32_t(t));
  }
  add_header(hash, Field::kAdapter, 8);
  add_little_endian(hash, uint64_t(scope.adapter_id));
  add_bytes(hash, Field::kSalt, scope.salt.data(), scope.salt.size());
  Digest digest = hash.finish();
  for (int i = 0; i < 32; ++i) {
    const int kept = bits - 8 * i;
    if (kept < 8) digest[i] &= kept <= 0 ? 0 : uint8_t(0xff00 >> kept);
  }
  return digest;
}

}  // namespace genai_kernels::runtime
