// A fixed pool of numbered blocks: who is free, how many hold each one, which are cached, and the index of the cached.
//
// A block is in exactly one state:
//   free     refs == 0, content == 0    on the stack of free ones
//   cached   refs == 0, content != 0    in the list of cached ones, oldest first; may be evicted
//   held     refs > 0                   by that many sequences; shared if by more than one
// A block with content != 0 is published: its tokens never change, and the index finds it. All memory is allocated by
// the constructor, so nothing here can fail.
#pragma once
#include <memory>
#include <vector>

#include "runtime/block_key.h"

namespace genai_kernels::runtime {

using BlockId = int32_t;
constexpr BlockId kNone = -1;

struct Block {
  int32_t refs = 0;
  BlockId older = kNone, newer = kNone;  // neighbours in the list of cached blocks
  BlockId next = kNone;                  // in the same bucket of the index
  Link link;
  uint64_t parent = 0;  // content of the block before
  std::shared_ptr<const Scope> scope;
  uint64_t mark = 0;     // scratch of one call: which call has looked at this block,
  int32_t marked = 0;    // and how often
  int32_t furthest = 0;  // scratch of statistics: slots in use
};

class BlockPool {
 public:
  // `keeps_tokens`: needed to publish. `indexed`: published blocks can be found, and outlive their holders.
  BlockPool(int32_t blocks, int32_t block_size, bool keeps_tokens, bool indexed);

  int32_t size() const noexcept { return int32_t(blocks_.size()); }
  int32_t free() const noexcept { return int32_t(free_.size()); }
  int32_t cached() const noexcept { return cached_; }
  int32_t available() const noexcept { return free() + cached_; }
  int32_t held() const noexcept { return size() - available(); }
  int32_t shared() const noexcept { return shared_; }
  int64_t evictions() const noexcept { return evictions_; }

  Block& operator[](BlockId b) noexcept { return blocks_[b]; }
  const Block& operator[](BlockId b) const noexcept { return blocks_[b]; }
  bool published(BlockId b) const noexcept { return blocks_[b].link.content != 0; }
  std::span<Token> tokens(BlockId b) noexcept;
  std::span<const Token> tokens(BlockId b) const noexcept;

  BlockId take() noexcept;             // a block with one holder: a free one, else the cached one unused for longest
  void hold(BlockId b) noexcept;       // one holder more
  void release(BlockId b) noexcept;    // one holder less; the last one leaves it cached or free
  void touch(BlockId b) noexcept;      // a cached block counts as just used
  int32_t drop_cached() noexcept;      // all cached blocks become free; how many there were
  void unpublish(BlockId b) noexcept;  // of a held block

  void publish(BlockId b, const Link& link, uint64_t parent, const std::shared_ptr<const Scope>& scope) noexcept;
  // The published block with this digest, parent, scope and these tokens, all compared, or kNone. A block that has the
  // digest but other tokens or another scope is counted in `collisions`.
  BlockId find(const Digest& digest, uint64_t parent, const Scope& scope, std::span<const Token> tokens,
               int64_t& collisions) const noexcept;

  std::vector<BlockId> cached_blocks() const;  // oldest first
  const std::vector<BlockId>& free_blocks() const noexcept { return free_; }
  std::vector<BlockId> indexed_blocks() const;

 private:
  BlockId& bucket(const Digest& digest) noexcept;
  const BlockId& bucket(const Digest& digest) const noexcept { return const_cast<BlockPool*>(this)->bucket(digest); }
  void append_to_cached(BlockId b) noexcept;
  void remove_from_cached(BlockId b) noexcept;
  void remove_from_index(BlockId b) noexcept;

  int32_t block_size_;
  std::vector<Block> blocks_;
  std::vector<Token> tokens_;
  std::vector<BlockId> free_;
  std::vector<BlockId> buckets_;  // first block of each; a power of two of them, empty without an index
  BlockId oldest_ = kNone, newest_ = kNone;
  int32_t cached_ = 0, shared_ = 0;
  int64_t evictions_ = 0;
};

}  // namespace genai_kernels::runtime
