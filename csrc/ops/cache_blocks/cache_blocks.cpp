// Whole blocks of a paged cache: copied, moved between pools, gathered. Bytes are moved and nothing is computed, so there
// is no kernel per instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/pages.h"
#include "host/parallel.h"

namespace genai_kernels {
namespace {

struct Blocks {
  char* data;
  int64_t count, stride, bytes;  // stride and size of one block, in bytes
};

// A tensor [blocks, ...] each of whose blocks is one piece of memory.
Blocks blocks_of(const char* op, const char* name, const TensorRef& t) {
  GK_CHECK_VALUE(t.dim() >= 1, op, name, ": expected [num_blocks, ...], got a scalar");
  int64_t step = 1;
  for (int64_t d = t.dim() - 1; d >= 1; --d) {
    GK_CHECK_VALUE(t.size(d) == 1 || t.stride(d) == step, op, name,
                   ": expected blocks of contiguous memory, got stride ", t.stride(d), " in dimension ", d);
    step *= t.size(d);
  }
  const int64_t size = element_size(t.scalar_type());
  GK_CHECK_VALUE(t.size(0) <= 1 || t.stride(0) >= step, op, name, ": expected blocks that do not overlap, got stride ",
                 t.stride(0), " in dimension 0");
  return {static_cast<char*>(t.data()), t.size(0), t.stride(0) * size, step * size};
}

struct Move {
  int64_t from, to;
};

// Every block is written once, and none that is written is read (where the pools are one).
std::vector<Move> moves_of(const char* op, const TensorRef& mapping, const Blocks& from, const Blocks& to,
                           bool one_pool) {
  const ScalarType type = mapping.scalar_type();
  GK_CHECK_TYPE(type == ScalarType::Int || type == ScalarType::Long, op, "block_mapping: expected int32 or int64, got ",
                dtype_name(type));
  GK_CHECK_VALUE(mapping.dim() == 2 && mapping.size(1) == 2, op,
                 "block_mapping: expected [pairs, 2], source and destination, got shape ", shape_of(mapping));
  std::vector<Move> moves;
  const auto at = [&](int64_t i, int64_t j) {
    const int64_t offset = i * mapping.stride(0) + j * mapping.stride(1);
    return type == ScalarType::Long ? mapping.data_as<int64_t>()[offset] : mapping.data_as<int32_t>()[offset];
  };
  for (int64_t i = 0; i < mapping.size(0); ++i) {
    const Move move{at(i, 0), at(i, 1)};
    GK_CHECK_INDEX(move.from >= 0 && move.from < from.count, op, "block_mapping[", i, ", 0]: expected 0 <= block < ",
                   from.count, ", got ", move.from);
    GK_CHECK_INDEX(move.to >= 0 && move.to < to.count, op, "block_mapping[", i, ", 1]: expected 0 <= block < ",
                   to.count, ", got ", move.to);
    moves.push_back(move);
  }
  std::vector<int64_t> written;
  for (const Move& move : moves) written.push_back(move.to);
  std::sort(written.begin(), written.end());
  const auto twice = std::adjacent_find(written.begin(), written.end());
  GK_CHECK_VALUE(twice == written.end(), op, "block_mapping: expected each destination once, got block ", *twice,
                 " twice");
  for (size_t i = 0; one_pool && i < moves.size(); ++i)
    GK_CHECK_VALUE(!std::binary_search(written.begin(), written.end(), moves[i].from), op, "block_mapping[", i,
                   ", 0]: expected a block that is not a destination, got ", moves[i].from,
                   "; the result would depend on the order of the copies");
  return moves;
}

void move_blocks(const std::vector<Move>& moves, const Blocks& from, const Blocks& to) {
  parallel_for_elements(int64_t(moves.size()), from.bytes / 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(to.data + moves[size_t(i)].to * to.stride, from.data + moves[size_t(i)].from * from.stride,
                  size_t(from.bytes));
  });
}

void copy_blocks(const Output& cache, const TensorRef& mapping) {
  const char* op = "copy_blocks";
  const Blocks blocks = blocks_of(op, "cache", cache);
  move_blocks(moves_of(op, mapping, blocks, blocks, true), blocks, blocks);
}

void swap_blocks(const TensorRef& source, const Output& destination, const TensorRef& mapping) {
  const char* op = "swap_blocks";
  check_same_dtype(op, "destination", destination, "source", source);
  bool fits = source.dim() == destination.dim();
  for (int64_t d = 1; fits && d < source.dim(); ++d) fits = source.size(d) == destination.size(d);
  GK_CHECK_VALUE(fits, op, "destination: expected blocks of the shape of source's, ", shape_of(source), ", got ",
                 shape_of(destination));
  check_no_overlap(op, "destination", destination, "source", source);
  const Blocks from = blocks_of(op, "source", source), to = blocks_of(op, "destination", destination);
  move_blocks(moves_of(op, mapping, from, to, false), from, to);
}

std::tuple<Tensor, Tensor> gather_kv_cache(const TensorRef& k_cache, const TensorRef& v_cache,
                                           const OptionalTensor& block_table, const OptionalTensor& seq_lens,
                                           const OptionalTensor& indptr, const OptionalTensor& indices,
                                           const OptionalTensor& last_page_len, bool heads_first) {
  const char* op = "gather_kv_cache";
  const CacheView k = cache_view(op, "k_cache", k_cache, heads_first);
  const CacheView v = cache_view(op, "v_cache", v_cache, heads_first);
  check_cache_pair(op, k, v, k_cache, v_cache);
  const std::vector<PageList> lists =
      page_lists(op, block_table, seq_lens, indptr, indices, last_page_len, k.page_size);
  std::vector<const int32_t*> page_of_token;
  std::vector<int64_t> within;
  for (size_t b = 0; b < lists.size(); ++b) {
    const PageList& list = lists[b];
    const int64_t offset = indices ? list.pages - indices->data_as<int32_t>() : 0;
    check_pages(op, block_table.has_value(), list.pages, 0, list.tokens, k.page_size, k.pages, int64_t(b), offset);
    for (int64_t t = 0; t < list.tokens; ++t) {
      page_of_token.push_back(list.pages + t / k.page_size);
      within.push_back(t % k.page_size);
    }
  }
  const int64_t tokens = int64_t(within.size()), size = element_size(k.type);
  Tensor out_k = new_empty(k_cache, {tokens, k.heads, k.dim}, k.type);
  Tensor out_v = new_empty(k_cache, {tokens, v.heads, v.dim}, v.type);
  const auto copy = [&](const CacheView& cache, Tensor& out) {
    char* to = static_cast<char*>(out.mutable_data_ptr());
    parallel_for_elements(tokens, cache.heads * cache.dim, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t h = 0; h < cache.heads; ++h)
          std::memcpy(
              to + (t * cache.heads + h) * cache.dim * size,
              cache.data +
                  (*page_of_token[size_t(t)] * cache.page + within[size_t(t)] * cache.token + h * cache.head) * size,
              size_t(cache.dim * size));
    });
  };
  copy(k, out_k);
  copy(v, out_v);
  return {out_k, out_v};
}

}  // namespace
}  // namespace genai_kernels

GK_CPU_OP(copy_blocks, genai_kernels::copy_blocks, "(Tensor(a!) cache, Tensor block_mapping) -> ()")
GK_CPU_OP(swap_blocks, genai_kernels::swap_blocks,
          "(Tensor source, Tensor(a!) destination, Tensor block_mapping) -> ()")
GK_CPU_OP(gather_kv_cache, genai_kernels::gather_kv_cache,
          "(Tensor k_cache, Tensor v_cache, Tensor? block_table, Tensor? seq_lens, Tensor? indptr, Tensor? indices, "
          "Tensor? last_page_len, bool heads_first) -> (Tensor k, Tensor v)")
