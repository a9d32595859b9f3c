#include "runtime/block_pool.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace genai_kernels::runtime {

BlockPool::BlockPool(int32_t blocks, int32_t block_size, bool keeps_tokens, bool indexed)
    : block_size_(block_size),
      blocks_(blocks),
      tokens_(keeps_tokens ? size_t(blocks) * block_size : 0),
      free_(blocks),
      buckets_(indexed ? std::bit_ceil(size_t(blocks) * 2) : 0, kNone) {
  for (int32_t i = 0; i < blocks; ++i) free_[i] = blocks - 1 - i;  // block 0 is taken first
}

std::span<Token> BlockPool::tokens(BlockId b) noexcept {
  return {tokens_.data() + int64_t(b) * block_size_, size_t(block_size_)};
}
std::span<const Token> BlockPool::tokens(BlockId b) const noexcept { return const_cast<BlockPool*>(this)->tokens(b); }

BlockId BlockPool::take() noexcept {
  BlockId b;
  if (!free_.empty()) {
    b = free_.back();
    free_.pop_back();
  } else {
    b = oldest_;
    remove_from_cached(b);
    unpublish(b);
    ++evictions_;
  }
  blocks_[b].refs = 1;
  return b;
}

void BlockPool::hold(BlockId b) noexcept {
  const int32_t holders = ++blocks_[b].refs;
  if (holders == 1) remove_from_cached(b);
  if (holders == 2) ++shared_;
}

void BlockPool::release(BlockId b) noexcept {
  const int32_t holders = --blocks_[b].refs;
  if (holders == 1) --shared_;
  if (holders > 0) return;
  if (published(b) && !buckets_.empty()) {
    append_to_cached(b);
  } else {
    unpublish(b);
    free_.push_back(b);  // within the capacity that the constructor made
  }
}

void BlockPool::touch(BlockId b) noexcept {
  if (blocks_[b].refs > 0) return;
  remove_from_cached(b);
  append_to_cached(b);
}

int32_t BlockPool::drop_cached() noexcept {
  const int32_t dropped = cached_;
  while (cached_ > 0) {
    const BlockId b = oldest_;
    remove_from_cached(b);
    unpublish(b);
    free_.push_back(b);
  }
  return dropped;
}

void BlockPool::unpublish(BlockId b) noexcept {
  if (!published(b)) return;
  if (!buckets_.empty()) remove_from_index(b);
  blocks_[b].link.content = 0;
  blocks_[b].scope.reset();
}

void BlockPool::publish(BlockId b, const Link& link, uint64_t parent,
                        const std::shared_ptr<const Scope>& scope) noexcept {
  Block& block = blocks_[b];
  block.link = link, block.parent = parent, block.scope = scope;
  if (buckets_.empty()) return;
  BlockId& first = bucket(link.digest);
  block.next = first;
  first = b;
}

BlockId BlockPool::find(const Digest& digest, uint64_t parent, const Scope& scope, std::span<const Token> tokens,
                        int64_t& collisions) const noexcept {
  for (BlockId b = bucket(digest); b != kNone; b = blocks_[b].next) {
    const Block& block = blocks_[b];
    if (block.link.digest != digest) continue;
    if (std::ranges::equal(this->tokens(b), tokens) && *block.scope == scope) {
      if (block.parent == parent) return b;
    } else {
      ++collisions;
    }
  }
  return kNone;
}

BlockId& BlockPool::bucket(const Digest& digest) noexcept {
  uint64_t word;
  std::memcpy(&word, digest.data(), sizeof(word));
  return buckets_[word & (buckets_.size() - 1)];
}

void BlockPool::append_to_cached(BlockId b) noexcept {
  blocks_[b].older = newest_;
  blocks_[b].newer = kNone;
  (newest_ == kNone ? oldest_ : blocks_[newest_].newer) = b;
  newest_ = b;
  ++cached_;
}

void BlockPool::remove_from_cached(BlockId b) noexcept {
  Block& block = blocks_[b];
  (block.older == kNone ? oldest_ : blocks_[block.older].newer) = block.newer;
  (block.newer == kNone ? newest_ : blocks_[block.newer].older) = block.older;
  --cached_;
}

void BlockPool::remove_from_index(BlockId b) noexcept {
  BlockId* at = &bucket(blocks_[b].link.digest);
  while (*at != b) at = &blocks_[*at].next;
  *at = blocks_[b].next;
}

std::vector<BlockId> BlockPool::cached_blocks() const {
  std::vector<BlockId> found;
  for (BlockId b = oldest_; b != kNone; b = blocks_[b].newer) found.push_back(b);
  return found;
}

std::vector<BlockId> BlockPool::indexed_blocks() const {
  std::vector<BlockId> found;
  for (const BlockId first : buckets_) {
    for (BlockId b = first; b != kNone; b = blocks_[b].next) found.push_back(b);
  }
  return found;
}

}  // namespace genai_kernels::runtime
