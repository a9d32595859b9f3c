// What kernels and people ask of the allocator; nothing here changes it.
#include <algorithm>

#include "runtime/block_allocator.h"
#include "runtime/errors.h"

namespace genai_kernels::runtime {

BlockAllocator::Counts BlockAllocator::counts(SequenceId id, const char* op) {
  const std::lock_guard lock(mutex_);
  const Sequence& s = find(id, op);
  return {s.num_tokens, s.num_computed, s.num_cached, s.swapped};
}

std::vector<BlockId> BlockAllocator::block_table(SequenceId id) {
  const std::lock_guard lock(mutex_);
  return find_resident(id, "block_table").table;
}

std::vector<SequenceId> BlockAllocator::sequences() {
  const std::lock_guard lock(mutex_);
  std::vector<SequenceId> ids;
  ids.reserve(live_);
  for (const Sequence& s : places_) {
    if (s.live) ids.push_back(id_of(s));
  }
  return ids;
}

int64_t BlockAllocator::num_available() {
  const std::lock_guard lock(mutex_);
  return pool_.available();
}

int64_t BlockAllocator::drop_cached() {
  const std::lock_guard lock(mutex_);
  return pool_.drop_cached();
}

int64_t BlockAllocator::length(std::span<const int64_t> lengths, size_t i, const Sequence& s, const char* op) const {
  if (lengths.empty()) return s.num_tokens;
  if (lengths[i] < 0 || lengths[i] > s.num_tokens) {
    fail<std::invalid_argument>(op, "lengths[", i, "]: expected 0 <= length <= ", s.num_tokens, ", got ", lengths[i]);
  }
  return lengths[i];
}

std::vector<int64_t> BlockAllocator::slot_mapping(std::span<const SequenceId> ids, std::span<const int64_t> begins,
                                                  std::span<const int64_t> ends) {
  constexpr char kOp[] = "slot_mapping";
  const std::lock_guard lock(mutex_);
  int64_t total = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    const Sequence& s = find_resident(ids[i], kOp);
    if (begins[i] < 0 || ends[i] < begins[i] || ends[i] > s.num_tokens) {
      fail<std::invalid_argument>(kOp, "start, end: expected 0 <= start <= end <= ", s.num_tokens, ", got ", begins[i],
                                  ", ", ends[i]);
    }
    total += ends[i] - begins[i];
  }
  std::vector<int64_t> slots;
  slots.reserve(total);
  for (size_t i = 0; i < ids.size(); ++i) {
    const Sequence& s = find(ids[i], kOp);
    for (int64_t at = begins[i]; at < ends[i];) {
      const BlockId b = s.table[at / size_];
      const int64_t stop = std::min(ends[i], at / size_ * size_ + size_);
      for (; at < stop; ++at) slots.push_back(b == kNone ? -1 : b * size_ + at % size_);
    }
  }
  return slots;
}

BlockAllocator::Padded BlockAllocator::block_tables(std::span<const SequenceId> ids, std::span<const int64_t> lengths,
                                                    int64_t least_width) {
  constexpr char kOp[] = "block_tables";
  const std::lock_guard lock(mutex_);
  Padded padded{least_width, {}, {}};
  padded.seq_lens.reserve(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    const int64_t tokens = length(lengths, i, find_resident(ids[i], kOp), kOp);
    padded.seq_lens.push_back(int32_t(tokens));
    padded.width = std::max(padded.width, blocks_for(tokens));
  }
  padded.tables.assign(ids.size() * padded.width, kNone);
  for (size_t i = 0; i < ids.size(); ++i) {
    std::copy_n(find(ids[i], kOp).table.begin(), blocks_for(padded.seq_lens[i]),
                padded.tables.begin() + i * padded.width);
  }
  return padded;
}

BlockAllocator::Csr BlockAllocator::csr(std::span<const SequenceId> ids, std::span<const int64_t> lengths) {
  constexpr char kOp[] = "csr";
  const std::lock_guard lock(mutex_);
  Csr csr;
  csr.indptr.reserve(ids.size() + 1);
  csr.indptr.push_back(0);
  csr.last_page_len.reserve(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    const Sequence& s = find_resident(ids[i], kOp);
    const int64_t tokens = length(lengths, i, s, kOp), blocks = blocks_for(tokens);
    csr.indices.insert(csr.indices.end(), s.table.begin(), s.table.begin() + blocks);
    csr.indptr.push_back(int32_t(csr.indices.size()));
    csr.last_page_len.push_back(int32_t(tokens - std::max<int64_t>(0, blocks - 1) * size_));
  }
  return csr;
}

Stats BlockAllocator::stats() {
  const std::lock_guard lock(mutex_);
  // A block is full unless it is the last one of each of its holders; then as full as the longest of them makes it.
  ++mark_;
  int64_t empty = 0;
  for (const Sequence& s : places_) {
    const auto in_last = int32_t(s.num_tokens % size_);
    if (!s.live || s.swapped || in_last == 0) continue;
    Block& last = pool_[s.table.back()];
    if (last.mark != mark_) last.mark = mark_, last.marked = last.furthest = 0;
    ++last.marked;
    last.furthest = std::max(last.furthest, in_last);
    if (last.marked == last.refs) empty += size_ - last.furthest;
  }
  const int64_t slots = pool_.held() * size_;
  return {pool_.held(), pool_.shared(), pool_.cached(), pool_.free(),
          swap_.held(), live_,          slots - empty,  slots ? double(empty) / double(slots) : 0,
          queries_,     hits_,          collisions_,    pool_.evictions(),
          merged_};
}

}  // namespace genai_kernels::runtime
