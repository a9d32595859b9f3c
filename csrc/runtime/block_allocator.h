// Which blocks of a paged key/value cache belong to which sequence. README.md beside this file has the design.
//
// A call does what it says or throws one of errors.h, and then nothing has changed: each first checks, counts and
// reserves memory, and only then changes anything, which cannot fail. Every public call holds one mutex.
#pragma once
#include <cstdint>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "runtime/block_pool.h"

namespace genai_kernels::runtime {

using SequenceId = int64_t;
using Copies = std::vector<std::pair<BlockId, BlockId>>;  // (source, destination)

struct Options {
  int64_t num_blocks = 0;
  int64_t block_size = 0;       // tokens
  int64_t num_swap_blocks = 0;  // of the second pool
  int64_t window = -1;          // tokens before its own that a query sees; -1: all
  bool prefix_cache = true;
  int64_t hash_bits = 256;  // fewer make collisions, for tests
};

struct Request {
  std::span<const Token> tokens;
  std::shared_ptr<const Scope> scope;  // null: adapter 0 without salt
};

struct Growth {
  SequenceId sequence;
  std::span<const Token> tokens;
};

struct Stats {
  int64_t used, shared, cached, free, swapped;  // blocks
  int64_t sequences;
  int64_t tokens;                              // slots of used blocks that hold one, each counted once
  double waste;                                // share of the slots of used blocks that hold none
  int64_t prefix_queries, prefix_hits;         // blocks looked up and found by successful allocations
  int64_t hash_collisions, evictions, merged;  // merged: computed blocks given back since an equal one was published
};

class BlockAllocator {
 public:
  explicit BlockAllocator(const Options& options);
  const Options& options() const noexcept { return options_; }

  // ---- growing and shrinking ----
  void allocate(std::span<const Request> requests, SequenceId* ids);
  bool can_allocate(std::span<const Request> requests);
  Copies append(std::span<const Growth> growths);
  bool can_append(std::span<const SequenceId> ids, std::span<const int64_t> counts);
  void commit(SequenceId id, int64_t num_computed);
  void truncate(SequenceId id, int64_t num_tokens);
  void fork(SequenceId id, std::span<SequenceId> children);
  void free(SequenceId id);

  // ---- second pool ----
  Copies swap_out(SequenceId id);
  bool can_swap_out(SequenceId id);
  Copies swap_in(SequenceId id);
  bool can_swap_in(SequenceId id);

  // ---- looking ----
  struct Counts {
    int64_t num_tokens, num_computed, num_cached;
    bool swapped;
  };
  Counts counts(SequenceId id, const char* op);
  std::vector<BlockId> block_table(SequenceId id);
  std::vector<SequenceId> sequences();
  int64_t num_available();
  int64_t drop_cached();
  Stats stats();
  // Tokens [begins[i], ends[i]) of each sequence, one after the other; -1 outside the window.
  std::vector<int64_t> slot_mapping(std::span<const SequenceId> ids, std::span<const int64_t> begins,
                                    std::span<const int64_t> ends);
  // The tables of several sequences, of their first lengths[i] tokens; of all if `lengths` is empty.
  struct Padded {
    int64_t width;
    std::vector<int32_t> tables, seq_lens;  // tables: one row of `width` each, -1 behind its blocks
  };
  Padded block_tables(std::span<const SequenceId> ids, std::span<const int64_t> lengths, int64_t least_width);
  struct Csr {
    std::vector<int32_t> indptr, indices, last_page_len;
  };
  Csr csr(std::span<const SequenceId> ids, std::span<const int64_t> lengths);

  // ---- for tests ----
  void check_invariants();  // throws std::logic_error with what is broken
  std::string snapshot();   // the whole logical state

 private:
  struct Sequence {
    int64_t generation = 0;  // of the id that this place was last given
    bool live = false, swapped = false;
    int64_t num_tokens = 0, num_computed = 0, num_cached = 0;
    int64_t first = 0;  // index of the first block kept; entries before it fell out of the window
    Link base;          // of block first - 1
    std::vector<BlockId> table;
    std::shared_ptr<const Scope> scope;
    uint64_t mark = 0;
  };

  // How a new sequence or a swapped one meets the cache.
  struct Match {
    int64_t queries = 0, hits = 0, collisions = 0;
    int64_t fresh = 0;    // blocks that no cached one serves
    int64_t revived = 0;  // hits that are cached and held by nobody, and not counted before in this call
  };

  Sequence* locate(SequenceId id, bool& issued) noexcept;
  Sequence& find(SequenceId id, const char* op);
  Sequence& find_resident(SequenceId id, const char* op);
  SequenceId id_of(const Sequence& s) const noexcept;
  void reserve_sequences(int64_t count, const char* op);
  Sequence& next_place(int64_t i) noexcept { return places_[free_places_[free_places_.size() - 1 - i]]; }
  void open(Sequence& s) noexcept;
  int64_t length(std::span<const int64_t> lengths, size_t i, const Sequence& s, const char* op) const;

  int64_t blocks_for(int64_t tokens) const noexcept { return (tokens + size_ - 1) / size_; }
  int64_t first_needed(int64_t computed) const noexcept;
  Link link(const Sequence& s, int64_t i) const noexcept;
  Match match_prompt(const Request& request, std::vector<BlockId>& table, Link& base);
  Match match_swapped(const Sequence& s, std::vector<BlockId>& found);
  void count_revived(BlockId b, Match& match) noexcept;
  void extend(Sequence& s, std::span<const Token> tokens) noexcept;
  int64_t count_append(Sequence& s, int64_t tokens) noexcept;
  void publish_or_merge(Sequence& s, int64_t i) noexcept;
  void release_outside_window(Sequence& s) noexcept;
  void expect_blocks(int64_t needed, int64_t available, const char* op, const char* pool) const;

  const Options options_;
  const int64_t size_;  // of a block
  const int64_t tag_;   // of this allocator's ids
  const std::shared_ptr<const Scope> plain_;
  BlockPool pool_, swap_;
  std::vector<Sequence> places_;
  std::vector<int32_t> free_places_;
  std::vector<BlockId> scratch_;
  int64_t live_ = 0;
  uint64_t mark_ = 0, last_content_ = 0;
  int64_t queries_ = 0, hits_ = 0, collisions_ = 0, merged_ = 0;
  std::mutex mutex_;
};

}  // namespace genai_kernels::runtime
