// For tests: what must always hold, and the whole state as text, to see that a call which failed has left it alone.
#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "runtime/block_allocator.h"

namespace genai_kernels::runtime {
namespace {

void expect(bool holds, const char* what, int64_t where) {
  if (!holds) throw std::logic_error(std::string("broken invariant: ") + what + ", at " + std::to_string(where));
}

// Every block free, cached or held, in one list or with as many holders as it says.
void check_pool(const BlockPool& pool, const std::vector<int32_t>& holders, bool indexed) {
  std::vector<int32_t> listed(pool.size());
  for (const BlockId b : pool.free_blocks()) {
    expect(listed[b]++ == 0, "a block is free once", b);
    expect(pool[b].refs == 0 && !pool.published(b) && !pool[b].scope, "a free block is nobody's and not published", b);
  }
  const auto cached = pool.cached_blocks();
  expect(int32_t(cached.size()) == pool.cached(), "the cached blocks are counted", pool.cached());
  BlockId older = kNone;
  for (const BlockId b : cached) {
    expect(listed[b]++ == 0, "a cached block is in one list", b);
    expect(pool[b].refs == 0 && pool.published(b), "a cached block is nobody's and published", b);
    expect(pool[b].older == older, "the list of cached blocks is linked both ways", b);
    older = b;
  }
  int32_t shared = 0, published = 0;
  for (BlockId b = 0; b < pool.size(); ++b) {
    expect(pool[b].refs == holders[b], "a block has as many holders as tables list it", b);
    expect((listed[b] == 0) == (pool[b].refs > 0), "a block without holder is free or cached: none is lost", b);
    shared += pool[b].refs > 1;
    published += pool.published(b);
  }
  expect(shared == pool.shared(), "the shared blocks are counted", shared);
  if (!indexed) return;
  const auto index = pool.indexed_blocks();
  expect(int32_t(index.size()) == published, "the index has the published blocks", published);
  for (const BlockId b : index) expect(pool.published(b) && pool[b].scope, "a block of the index is published", b);
}

void write(std::ostream& out, const BlockPool& pool) {
  out << "free";
  for (const BlockId b : pool.free_blocks()) out << ' ' << b;
  out << "\ncached";
  for (const BlockId b : pool.cached_blocks()) out << ' ' << b;
  out << "\nevictions " << pool.evictions() << " shared " << pool.shared() << '\n';
  for (BlockId b = 0; b < pool.size(); ++b) {
    const Block& block = pool[b];
    if (block.refs == 0 && !pool.published(b)) continue;
    out << "block " << b << " refs " << block.refs << " content " << block.link.content;
    if (pool.published(b)) {
      out << " parent " << block.parent << " adapter " << block.scope->adapter_id << " salt " << block.scope->salt;
      out << " digest";
      for (const uint8_t byte : block.link.digest) out << ' ' << int(byte);
      out << " tokens";
      for (const Token t : pool.tokens(b)) out << ' ' << t;
    }
    out << '\n';
  }
}

}  // namespace

void BlockAllocator::check_invariants() {
  const std::lock_guard lock(mutex_);
  std::vector<int32_t> holders(pool_.size()), swap_holders(swap_.size());
  int64_t live = 0;
  for (const Sequence& s : places_) {
    if (!s.live) {
      expect(!s.scope, "a freed sequence holds nothing", &s - places_.data());
      continue;
    }
    ++live;
    const int64_t id = id_of(s);
    expect(int64_t(s.table.size()) == blocks_for(s.num_tokens), "a table is as long as its tokens need", id);
    expect(s.num_cached <= s.num_tokens && s.num_computed <= s.num_tokens, "no more computed than there are", id);
    expect(s.first == std::max(s.first, first_needed(s.num_computed)), "what fell out of the window is given back", id);
    for (int64_t i = 0; i < int64_t(s.table.size()); ++i) {
      const BlockId b = s.table[i];
      expect((b == kNone) == (i < s.first), "only what fell out of the window is missing", id);
      if (b == kNone) continue;
      BlockPool& pool = s.swapped ? swap_ : pool_;
      expect(b >= 0 && b < pool.size(), "a table lists blocks of its pool", id);
      ++(s.swapped ? swap_holders : holders)[b];
      if (!options_.prefix_cache) continue;
      if ((i + 1) * size_ <= s.num_computed) {
        expect(pool.published(b), "every full and computed block is published", id);
        expect(*pool[b].scope == *s.scope, "a sequence holds blocks of its own scope", id);
        const Link before = link(s, i - 1);
        expect(pool[b].link.digest ==
                   block_digest(before.digest, std::as_const(pool).tokens(b), *s.scope, int(options_.hash_bits)),
               "a digest is that of the block's tokens", id);
      } else if ((i + 1) * size_ > s.num_tokens && i * size_ < s.num_computed) {
        continue;  // the last one: may be published, if the sequence was truncated, and may be shared
      } else if (!s.swapped) {
        expect(pool[b].refs == 1, "what is yet to be written has one holder", id);
        expect(!pool.published(b), "what is yet to be written is not published", id);
      }
    }
  }
  expect(live == live_, "the sequences are counted", live);
  check_pool(pool_, holders, options_.prefix_cache);
  check_pool(swap_, swap_holders, false);
}

std::string BlockAllocator::snapshot() {
  const std::lock_guard lock(mutex_);
  std::ostringstream out;
  out << "counters " << queries_ << ' ' << hits_ << ' ' << collisions_ << ' ' << merged_ << ' ' << last_content_
      << '\n';
  for (const Sequence& s : places_) {
    if (!s.live) continue;
    out << "sequence " << id_of(s) << " tokens " << s.num_tokens << " computed " << s.num_computed << " cached "
        << s.num_cached << " swapped " << s.swapped << " first " << s.first << " base " << s.base.content << " adapter "
        << s.scope->adapter_id << " salt " << s.scope->salt << " table";
    for (const BlockId b : s.table) out << ' ' << b;
    out << '\n';
  }
  write(out, pool_);
  write(out << "second pool\n", swap_);
  return out.str();
}

}  // namespace genai_kernels::runtime
