// A sequence goes to the second pool and comes back.
#include <algorithm>

#include "runtime/block_allocator.h"
#include "runtime/errors.h"

namespace genai_kernels::runtime {

Copies BlockAllocator::swap_out(SequenceId id) {
  constexpr char kOp[] = "swap_out";
  const std::lock_guard lock(mutex_);
  Sequence& s = find_resident(id, kOp);
  const auto blocks = int64_t(s.table.size());
  expect_blocks(blocks - s.first, swap_.available(), kOp, "second");
  Copies copies;
  copies.reserve(blocks - s.first);

  // Nothing below fails. A block that others hold is copied too: each sequence in the second pool has its own.
  for (int64_t i = s.first; i < blocks; ++i) {
    const BlockId from = s.table[i], to = swap_.take();
    if (options_.prefix_cache) {
      std::ranges::copy(pool_.tokens(from), swap_.tokens(to).begin());
      if (pool_.published(from)) swap_.publish(to, pool_[from].link, pool_[from].parent, pool_[from].scope);
    }
    copies.emplace_back(from, to);
    s.table[i] = to;
  }
  for (int64_t i = blocks - 1; i >= s.first; --i) pool_.release(copies[i - s.first].first);
  s.swapped = true;
  return copies;
}

bool BlockAllocator::can_swap_out(SequenceId id) {
  const std::lock_guard lock(mutex_);
  const Sequence& s = find(id, "can_swap_out");
  return !s.swapped && int64_t(s.table.size()) - s.first <= swap_.available();
}

// found[i - first]: the block of the first pool that still, or again, holds what block i held; kNone without one.
BlockAllocator::Match BlockAllocator::match_swapped(const Sequence& s, std::vector<BlockId>& found) {
  ++mark_;
  Match match;
  const auto blocks = int64_t(s.table.size());
  found.assign(blocks - s.first, kNone);
  match.fresh = blocks - s.first;
  uint64_t parent = link(s, s.first - 1).content;
  for (int64_t i = s.first; i < blocks && swap_.published(s.table[i]); ++i) {
    const Link& own = swap_[s.table[i]].link;
    const BlockId b =
        pool_.find(own.digest, parent, *s.scope, std::as_const(swap_).tokens(s.table[i]), match.collisions);
    parent = b == kNone ? own.content : pool_[b].link.content;
    if (b == kNone) continue;
    found[i - s.first] = b;
    --match.fresh;
    count_revived(b, match);
  }
  return match;
}

Copies BlockAllocator::swap_in(SequenceId id) {
  constexpr char kOp[] = "swap_in";
  const std::lock_guard lock(mutex_);
  Sequence& s = find(id, kOp);
  if (!s.swapped) fail<std::invalid_argument>(kOp, "seq: expected a swapped out sequence, got ", id, ", which is not");
  const Match match = match_swapped(s, scratch_);
  expect_blocks(match.fresh, pool_.available() - match.revived, kOp, "first");
  Copies copies;
  copies.reserve(match.fresh);

  // Nothing below fails. All hits first, lest a new block evict one.
  for (const BlockId b : scratch_) {
    if (b != kNone) pool_.hold(b);
  }
  uint64_t parent = link(s, s.first - 1).content;
  for (int64_t i = s.first; i < int64_t(s.table.size()); ++i) {
    const BlockId from = s.table[i];
    BlockId to = scratch_[i - s.first];
    if (to == kNone) {
      to = pool_.take();
      copies.emplace_back(from, to);
      if (options_.prefix_cache) {
        std::ranges::copy(swap_.tokens(from), pool_.tokens(to).begin());
        if (swap_.published(from)) pool_.publish(to, swap_[from].link, parent, s.scope);
      }
    }
    parent = pool_[to].link.content;
    swap_.release(from);
    s.table[i] = to;
  }
  s.swapped = false;
  collisions_ += match.collisions;
  return copies;
}

bool BlockAllocator::can_swap_in(SequenceId id) {
  const std::lock_guard lock(mutex_);
  const Sequence& s = find(id, "can_swap_in");
  if (!s.swapped) return false;
  const Match match = match_swapped(s, scratch_);
  return match.fresh <= pool_.available() - match.revived;
}

}  // namespace genai_kernels::runtime
