#include "runtime/block_allocator.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "runtime/errors.h"

namespace genai_kernels::runtime {
namespace {

// An id is generation | tag of the allocator | place, so that one of another allocator, a freed one and a number that
// never was an id (of a block, say: those are small) are all told apart from a live one. Ids are never given out twice.
constexpr int kPlaceBits = 20, kTagBits = 11;
constexpr int64_t kPlaces = int64_t(1) << kPlaceBits, kTags = int64_t(1) << kTagBits;
constexpr int64_t kGenerations = int64_t(1) << (63 - kPlaceBits - kTagBits);
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

int64_t next_tag() {
  static std::atomic<int64_t> count{0};
  return count++ % kTags;
}

const Options& checked(const Options& o) {
  const auto expect = [](const char* name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most) {
      fail<std::invalid_argument>("", name, ": expected ", least, " <= ", name, " <= ", most, ", got ", value);
    }
  };
  expect("num_blocks", o.num_blocks, 1, kMaxInt32);
  expect("block_size", o.block_size, 1, kMaxInt32 / o.num_blocks);  // slots are counted in 31 bits
  expect("num_swap_blocks", o.num_swap_blocks, 0, kMaxInt32 / o.block_size);
  expect("window", o.window, -1, kMaxInt32);
  expect("hash_bits", o.hash_bits, 0, 256);
  return o;
}

}  // namespace

BlockAllocator::BlockAllocator(const Options& options)
    : options_(checked(options)),
      size_(options.block_size),
      tag_(next_tag()),
      plain_(std::make_shared<const Scope>()),
      pool_(int32_t(options.num_blocks), int32_t(size_), options.prefix_cache, options.prefix_cache),
      swap_(int32_t(options.num_swap_blocks), int32_t(size_), options.prefix_cache, false) {}

// ---- ids ----

SequenceId BlockAllocator::id_of(const Sequence& s) const noexcept {
  return (s.generation << kTagBits | tag_) << kPlaceBits | (&s - places_.data());
}

// The live sequence of an id, or null; `issued`: the id was given out by this allocator, now or before.
BlockAllocator::Sequence* BlockAllocator::locate(SequenceId id, bool& issued) noexcept {
  const int64_t place = id & (kPlaces - 1), tag = id >> kPlaceBits & (kTags - 1);
  const int64_t generation = id >> (kPlaceBits + kTagBits);
  issued = id >= 0 && tag == tag_ && place < int64_t(places_.size()) && generation > 0 &&
           generation <= places_[place].generation;
  return issued && places_[place].live && places_[place].generation == generation ? &places_[place] : nullptr;
}

BlockAllocator::Sequence& BlockAllocator::find(SequenceId id, const char* op) {
  bool issued;
  if (Sequence* s = locate(id, issued)) return *s;
  if (issued) fail<UnknownSequenceError>(op, "seq: expected a live sequence, got ", id, ", which is freed");
  fail<UnknownSequenceError>(op, "seq: expected an id of this allocator, got ", id,
                             "; pass what its allocate or fork returned");
}

BlockAllocator::Sequence& BlockAllocator::find_resident(SequenceId id, const char* op) {
  Sequence& s = find(id, op);
  if (s.swapped) {
    fail<SwappedOutError>(op, "seq: expected a sequence in the first pool, got ", id,
                          ", which is swapped out; call swap_in first");
  }
  return s;
}

// Makes `count` free places, without giving them out: harmless if the call fails later on.
void BlockAllocator::reserve_sequences(int64_t count, const char* op) {
  const int64_t missing = count - int64_t(free_places_.size()), have = int64_t(places_.size());
  if (missing <= 0) return;
  if (missing > kPlaces - have) {
    fail<BlockError>(op, "sequences: expected at most ", kPlaces, " at once; free some");
  }
  const int64_t room = std::min(kPlaces, std::max(have + missing, 2 * have));
  places_.reserve(room);
  free_places_.reserve(room);
  for (int64_t i = 0; i < missing; ++i) places_.emplace_back();
  for (int64_t i = missing - 1; i >= 0; --i) free_places_.push_back(int32_t(have + i));
}

// The place on top of the free ones becomes a sequence; the caller has filled in the rest.
void BlockAllocator::open(Sequence& s) noexcept {
  free_places_.pop_back();
  ++s.generation;
  s.live = true, s.swapped = false;
  ++live_;
}

void BlockAllocator::expect_blocks(int64_t needed, int64_t available, const char* op, const char* pool) const {
  if (needed <= available) return;
  fail<OutOfBlocksError>(op, "blocks: expected at most ", available, " (free or cached) of the ", pool,
                         " pool, got a need of ", needed, "; free or swap out a sequence, or wait for one to end");
}

// ---- the cache ----

int64_t BlockAllocator::first_needed(int64_t computed) const noexcept {
  // The next query stands at position `computed`; the first key it sees is `window` before.
  return options_.window < 0 ? 0 : std::max<int64_t>(0, computed - options_.window) / size_;
}

Link BlockAllocator::link(const Sequence& s, int64_t i) const noexcept {
  if (i < 0) return {};
  return i == s.first - 1 ? s.base : (s.swapped ? swap_ : pool_)[s.table[i]].link;
}

void BlockAllocator::count_revived(BlockId b, Match& match) noexcept {
  if (pool_[b].refs > 0 || pool_[b].mark == mark_) return;
  pool_[b].mark = mark_;
  ++match.revived;
}

// Fills `table` with the published blocks that begin the prompt, -1 where they lie outside the window. At least one
// token is left to be computed: its logits are what the caller is after.
BlockAllocator::Match BlockAllocator::match_prompt(const Request& request, std::vector<BlockId>& table, Link& base) {
  const int64_t count = int64_t(request.tokens.size()), limit = options_.prefix_cache ? (count - 1) / size_ : 0;
  Match match;
  Link before;
  table.clear();
  table.reserve(blocks_for(count));
  for (int64_t i = 0; i < limit; ++i) {
    const auto tokens = request.tokens.subspan(i * size_, size_);
    const Scope& scope = request.scope ? *request.scope : *plain_;
    const Digest digest = block_digest(before.digest, tokens, scope, int(options_.hash_bits));
    ++match.queries;
    const BlockId b = pool_.find(digest, before.content, scope, tokens, match.collisions);
    if (b == kNone) break;
    before = pool_[b].link;
    table.push_back(b);
  }
  match.hits = int64_t(table.size());
  match.fresh = blocks_for(count) - match.hits;
  const int64_t first = first_needed(match.hits * size_);
  base = first > 0 ? pool_[table[first - 1]].link : Link{};
  for (int64_t i = first; i < match.hits; ++i) count_revived(table[i], match);
  return match;
}

void BlockAllocator::allocate(std::span<const Request> requests, SequenceId* ids) {
  constexpr char kOp[] = "allocate";
  const std::lock_guard lock(mutex_);
  for (size_t r = 0; r < requests.size(); ++r) {
    if (requests[r].tokens.empty() || requests[r].tokens.size() > size_t(kMaxInt32)) {
      fail<std::invalid_argument>(kOp, "requests[", r, "].tokens: expected 1 to ", kMaxInt32, " tokens, got ",
                                  requests[r].tokens.size());
    }
  }
  const auto count = int64_t(requests.size());
  reserve_sequences(count, kOp);
  ++mark_;
  Match all;
  for (int64_t r = 0; r < count; ++r) {
    Sequence& s = next_place(r);
    const Match match = match_prompt(requests[r], s.table, s.base);
    all.queries += match.queries, all.hits += match.hits, all.collisions += match.collisions;
    all.fresh += match.fresh, all.revived += match.revived;
  }
  expect_blocks(all.fresh, pool_.available() - all.revived, kOp, "first");

  // Nothing below fails. All hits first, lest one request evict what another has found.
  for (int64_t r = 0; r < count; ++r) {
    Sequence& s = next_place(r);
    const auto hits = int64_t(s.table.size());
    s.num_computed = s.num_cached = hits * size_;
    s.first = first_needed(s.num_computed);
    s.scope = requests[r].scope ? requests[r].scope : plain_;
    for (int64_t i = hits - 1; i >= 0; --i) {
      if (i >= s.first) {
        pool_.hold(s.table[i]);
      } else {
        pool_.touch(s.table[i]);
        s.table[i] = kNone;
      }
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    Sequence& s = next_place(0);
    s.num_tokens = s.num_computed;
    extend(s, requests[r].tokens.subspan(s.num_computed));
    open(s);
    ids[r] = id_of(s);
  }
  queries_ += all.queries, hits_ += all.hits, collisions_ += all.collisions;
}

bool BlockAllocator::can_allocate(std::span<const Request> requests) {
  const std::lock_guard lock(mutex_);
  ++mark_;
  int64_t fresh = 0, revived = 0;
  for (const Request& request : requests) {
    if (request.tokens.empty() || request.tokens.size() > size_t(kMaxInt32)) return false;
    Link base;
    const Match match = match_prompt(request, scratch_, base);
    fresh += match.fresh, revived += match.revived;
  }
  return fresh <= pool_.available() - revived;
}

// ---- a sequence grows, is computed, shrinks ----

// Blocks that `tokens` more need: new ones, and a copy of the last one if it has room and others hold it as well. Those
// counted before in this call will have left it by then.
int64_t BlockAllocator::count_append(Sequence& s, int64_t tokens) noexcept {
  if (tokens == 0) return 0;
  const int64_t more = blocks_for(s.num_tokens + tokens) - int64_t(s.table.size());
  if (s.num_tokens % size_ == 0) return more;
  Block& last = pool_[s.table.back()];
  if (last.mark != mark_) last.mark = mark_, last.marked = 0;
  return last.refs - last.marked > 1 ? ++last.marked, more + 1 : more;
}

// Adds tokens behind the last one, in its block and in new ones. The caller has made sure of the blocks and of the memory.
void BlockAllocator::extend(Sequence& s, std::span<const Token> tokens) noexcept {
  const int64_t begin = s.num_tokens;
  s.num_tokens += int64_t(tokens.size());
  while (int64_t(s.table.size()) < blocks_for(s.num_tokens)) s.table.push_back(pool_.take());
  if (!options_.prefix_cache) return;
  for (int64_t at = begin; at < s.num_tokens;) {
    const int64_t n = std::min(size_ - at % size_, s.num_tokens - at);
    std::ranges::copy(tokens.subspan(at - begin, n), pool_.tokens(s.table[at / size_]).begin() + at % size_);
    at += n;
  }
}

Copies BlockAllocator::append(std::span<const Growth> growths) {
  constexpr char kOp[] = "append";
  const std::lock_guard lock(mutex_);
  ++mark_;
  int64_t needed = 0;
  for (const Growth& g : growths) {
    Sequence& s = find_resident(g.sequence, kOp);
    if (s.mark == mark_)
      fail<std::invalid_argument>(kOp, "seqs: expected each sequence once, got ", g.sequence, " twice");
    s.mark = mark_;
    if (int64_t(g.tokens.size()) > kMaxInt32 - s.num_tokens) {
      fail<std::invalid_argument>(kOp, "tokens: expected at most ", kMaxInt32, " in a sequence, got ", s.num_tokens,
                                  " and ", g.tokens.size(), " more");
    }
    needed += count_append(s, int64_t(g.tokens.size()));
  }
  expect_blocks(needed, pool_.available(), kOp, "first");
  Copies copies;
  copies.reserve(growths.size());
  for (const Growth& g : growths) {
    Sequence& s = find(g.sequence, kOp);
    const size_t blocks = blocks_for(s.num_tokens + int64_t(g.tokens.size()));
    if (blocks > s.table.capacity()) s.table.reserve(std::max(blocks, 2 * s.table.capacity()));
  }

  // Nothing below fails.
  for (const Growth& g : growths) {
    if (g.tokens.empty()) continue;
    Sequence& s = find(g.sequence, kOp);
    if (const int64_t at = s.num_tokens % size_; at > 0) {
      BlockId& last = s.table.back();
      if (pool_[last].refs > 1) {
        const BlockId own = pool_.take();
        if (options_.prefix_cache) std::ranges::copy(pool_.tokens(last).first(at), pool_.tokens(own).begin());
        pool_.release(last);
        copies.emplace_back(last, own);
        last = own;
      } else {
        pool_.unpublish(last);  // it was full once, and truncated since
      }
    }
    extend(s, g.tokens);
  }
  return copies;
}

bool BlockAllocator::can_append(std::span<const SequenceId> ids, std::span<const int64_t> counts) {
  constexpr char kOp[] = "can_append";
  const std::lock_guard lock(mutex_);
  ++mark_;
  int64_t needed = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    Sequence& s = find(ids[i], kOp);
    if (s.swapped || s.mark == mark_ || counts[i] < 0 || counts[i] > kMaxInt32 - s.num_tokens) return false;
    s.mark = mark_;
    needed += count_append(s, counts[i]);
  }
  return needed <= pool_.available();
}

// A block whose keys and values are there, all of them, can serve others. If an equal one already does, this sequence
// goes over to it and gives its own back.
void BlockAllocator::publish_or_merge(Sequence& s, int64_t i) noexcept {
  const Link before = link(s, i - 1);
  const BlockId own = s.table[i];
  const auto tokens = std::as_const(pool_).tokens(own);
  const Digest digest = block_digest(before.digest, tokens, *s.scope, int(options_.hash_bits));
  const BlockId other = pool_.find(digest, before.content, *s.scope, tokens, collisions_);
  if (other == kNone) {
    pool_.publish(own, {digest, ++last_content_}, before.content, s.scope);
  } else {
    pool_.hold(other);
    pool_.release(own);
    s.table[i] = other;
    ++merged_;
  }
}

void BlockAllocator::release_outside_window(Sequence& s) noexcept {
  const int64_t first = first_needed(s.num_computed);
  if (first <= s.first) return;
  if (options_.prefix_cache) s.base = link(s, first - 1);
  for (int64_t i = first - 1; i >= s.first; --i) {
    pool_.release(s.table[i]);
    s.table[i] = kNone;
  }
  s.first = first;
}

void BlockAllocator::commit(SequenceId id, int64_t num_computed) {
  constexpr char kOp[] = "commit";
  const std::lock_guard lock(mutex_);
  Sequence& s = find_resident(id, kOp);
  if (num_computed < s.num_computed || num_computed > s.num_tokens) {
    fail<std::invalid_argument>(kOp, "num_computed: expected ", s.num_computed,
                                " (computed before) <= n <= ", s.num_tokens, " (tokens), got ", num_computed);
  }
  const int64_t before = s.num_computed;
  s.num_computed = num_computed;
  if (options_.prefix_cache) {
    for (int64_t i = before / size_; i < num_computed / size_; ++i) publish_or_merge(s, i);
  }
  release_outside_window(s);
}

void BlockAllocator::truncate(SequenceId id, int64_t num_tokens) {
  constexpr char kOp[] = "truncate";
  const std::lock_guard lock(mutex_);
  Sequence& s = find_resident(id, kOp);
  if (num_tokens < 0 || num_tokens > s.num_tokens) {
    fail<std::invalid_argument>(kOp, "num_tokens: expected 0 <= n <= ", s.num_tokens, ", got ", num_tokens);
  }
  const int64_t computed = std::min(s.num_computed, num_tokens);
  if (first_needed(computed) < s.first) {
    fail<std::invalid_argument>(kOp, "num_tokens: expected its window to be there, got ", num_tokens, ": the first ",
                                s.first * size_, " tokens are given back; commit only tokens that will stay");
  }
  for (int64_t keep = blocks_for(num_tokens); int64_t(s.table.size()) > keep;) {
    pool_.release(s.table.back());
    s.table.pop_back();
  }
  s.num_tokens = num_tokens;
  s.num_computed = computed;
  s.num_cached = std::min(s.num_cached, num_tokens);
}

void BlockAllocator::fork(SequenceId id, std::span<SequenceId> children) {
  constexpr char kOp[] = "fork";
  const std::lock_guard lock(mutex_);
  const Sequence& checked = find_resident(id, kOp);
  if (checked.num_computed < checked.num_tokens) {
    fail<std::invalid_argument>(kOp, "seq: expected all of its ", checked.num_tokens, " tokens to be computed, got ",
                                checked.num_computed, ": two sequences would write the rest; call commit first");
  }
  if (children.empty()) fail<std::invalid_argument>(kOp, "n: expected at least 1, got 0");
  const auto count = int64_t(children.size());
  reserve_sequences(count, kOp);
  const Sequence& s = find(id, kOp);  // again: places_ may have moved
  for (int64_t c = 0; c < count; ++c) next_place(c).table.reserve(s.table.size());

  // Nothing below fails.
  for (int64_t c = 0; c < count; ++c) {
    Sequence& child = next_place(0);
    child.table = s.table;
    child.num_tokens = s.num_tokens, child.num_computed = s.num_computed, child.num_cached = s.num_tokens;
    child.first = s.first, child.base = s.base, child.scope = s.scope;
    for (int64_t i = s.first; i < int64_t(s.table.size()); ++i) pool_.hold(s.table[i]);
    open(child);
    children[c] = id_of(child);
  }
}

void BlockAllocator::free(SequenceId id) {
  const std::lock_guard lock(mutex_);
  bool issued;
  Sequence* const found = locate(id, issued);
  if (!found && issued) {
    fail<DoubleFreeError>("free", "seq: expected a live sequence, got ", id, ", which is freed; free each one once");
  }
  Sequence& s = found ? *found : find(id, "free");
  // The last block first: what is used by more prompts, the beginning, is evicted last.
  for (int64_t i = int64_t(s.table.size()) - 1; i >= s.first; --i) (s.swapped ? swap_ : pool_).release(s.table[i]);
  s.table.clear();
  s.scope.reset();
  s.live = false;
  --live_;
  if (s.generation + 1 < kGenerations) free_places_.push_back(int32_t(&s - places_.data()));
}

}  // namespace genai_kernels::runtime
