// Paged caches as the hosts see them: pages of tokens, and which pages a sequence has.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <initializer_list>
#include <vector>

#include "host/check.h"

namespace genai_kernels {

// [pages, page_size, heads, dim], or with the heads first [pages, heads, page_size, dim], as strides in elements.
struct CacheView {
  char* data;
  ScalarType type;
  int64_t pages, page_size, heads, dim;
  int64_t page, token, head;
};

inline CacheView cache_view(const char* op, const char* name, const TensorRef& t, bool heads_first) {
  GK_CHECK_VALUE(t.dim() == 4, op, name, ": expected [num_blocks, ",
                 heads_first ? "kv_heads, block_size" : "block_size, kv_heads", ", head_dim], got shape ", shape_of(t));
  const int token = heads_first ? 2 : 1, head = heads_first ? 1 : 2;
  GK_CHECK_VALUE(t.size(3) <= 1 || t.stride(3) == 1, op, name, ": expected stride 1 in the last dimension, got ",
                 t.stride(3));
  GK_CHECK_VALUE(t.size(token) > 0, op, name, ": expected a block_size of at least 1, got shape ", shape_of(t));
  return {static_cast<char*>(t.data()),
          t.scalar_type(),
          t.size(0),
          t.size(token),
          t.size(head),
          t.size(3),
          t.stride(0),
          t.stride(token),
          t.stride(head)};
}

inline void check_cache_pair(const char* op, const CacheView& k, const CacheView& v, const TensorRef& k_cache,
                             const TensorRef& v_cache) {
  GK_CHECK_TYPE(v.type == k.type, op, "v_cache: expected the dtype of k_cache, ", dtype_name(k.type), ", got ",
                dtype_name(v.type));
  GK_CHECK_VALUE(v.pages == k.pages && v.page_size == k.page_size && v.heads == k.heads, op,
                 "v_cache: expected the shape of k_cache, ", shape_of(k_cache), ", but for head_dim, got ",
                 shape_of(v_cache));
}

// The scales of an int8 cache: its shape without the last dimension.
template <class View>
void set_scales(const char* op, View& to, const char* name, const OptionalTensor& scale, const CacheView& cache,
                bool heads_first) {
  const bool wanted = cache.type == ScalarType::Char;
  GK_CHECK_VALUE(
      scale.has_value() == wanted, op, name,
      wanted ? ": expected the scales of an int8 cache, got None" : ": expected None for a cache that is not int8");
  if (!wanted) return;
  const TensorRef& t = *scale;
  GK_CHECK_TYPE(t.scalar_type() == ScalarType::Float, op, name, ": expected float32, got ",
                dtype_name(t.scalar_type()));
  const int token = heads_first ? 2 : 1, head = heads_first ? 1 : 2;
  GK_CHECK_VALUE(
      t.dim() == 3 && t.size(0) == cache.pages && t.size(token) == cache.page_size && t.size(head) == cache.heads, op,
      name, ": expected the shape of its cache without the last dimension, got ", shape_of(t));
  to.scale = static_cast<decltype(to.scale)>(t.data());
  to.scale_page = t.stride(0);
  to.scale_token = t.stride(token);
  to.scale_head = t.stride(head);
}

inline const int32_t* check_int32(const char* op, const char* name, const TensorRef& t,
                                  std::initializer_list<int64_t> shape) {
  GK_CHECK_TYPE(t.scalar_type() == ScalarType::Int, op, name, ": expected int32, got ", dtype_name(t.scalar_type()));
  bool fits = t.dim() == int64_t(shape.size()) && t.is_contiguous();
  int64_t d = 0;
  for (const int64_t size : shape) {
    fits = fits && (size < 0 || t.size(d) == size);
    ++d;
  }
  std::ostringstream text;
  for (const int64_t size : shape) text << (text.tellp() ? ", " : "") << (size < 0 ? "any" : std::to_string(size));
  GK_CHECK_VALUE(fits, op, name, ": expected a contiguous [", text.str(), "], got shape ", shape_of(t));
  return t.data_as<int32_t>();
}

// The pages of one sequence: key k lies in pages[k / page_size].
struct PageList {
  const int32_t* pages;
  int64_t tokens, count;
};

// From a table [batch, pages] and lengths, or from lists one behind the other (CSR).
inline std::vector<PageList> page_lists(const char* op, const OptionalTensor& block_table,
                                        const OptionalTensor& seq_lens, const OptionalTensor& indptr,
                                        const OptionalTensor& indices, const OptionalTensor& last_page_len,
                                        int64_t page_size) {
  std::vector<PageList> lists;
  const bool table = block_table && seq_lens && !indptr && !indices && !last_page_len;
  const bool csr = !block_table && !seq_lens && indptr && indices && last_page_len;
  GK_CHECK_VALUE(table || csr, op,
                 "block_table: expected block_table and seq_lens, or indptr, indices and last_page_len, and not a part "
                 "of each");
  if (table) {
    const TensorRef& t = *block_table;
    GK_CHECK_TYPE(t.scalar_type() == ScalarType::Int, op, "block_table: expected int32, got ",
                  dtype_name(t.scalar_type()));
    GK_CHECK_VALUE(t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1), op,
                   "block_table: expected [batch, blocks] with contiguous rows, got shape ", shape_of(t));
    const int64_t batch = t.size(0);
    const int32_t* lens = check_int32(op, "seq_lens", *seq_lens, {batch});
    for (int64_t b = 0; b < batch; ++b) {
      GK_CHECK_VALUE(lens[b] >= 0 && lens[b] <= t.size(1) * page_size, op, "seq_lens[", b, "]: expected 0 to ",
                     t.size(1) * page_size, ", the tokens of ", t.size(1), " blocks, got ", lens[b]);
      lists.push_back({t.data_as<int32_t>() + b * t.stride(0), lens[b], t.size(1)});
    }
    return lists;
  }
  const int64_t batch = indptr->dim() == 1 ? indptr->size(0) - 1 : -1;
  GK_CHECK_VALUE(batch >= 0, op, "indptr: expected [batch + 1], got shape ", shape_of(*indptr));
  const int32_t* begin = check_int32(op, "indptr", *indptr, {batch + 1});
  const int32_t* pages = check_int32(op, "indices", *indices, {-1});
  const int32_t* last = check_int32(op, "last_page_len", *last_page_len, {batch});
  GK_CHECK_VALUE(begin[0] == 0, op, "indptr[0]: expected 0, got ", begin[0]);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t count = int64_t(begin[b + 1]) - begin[b];
    GK_CHECK_VALUE(count >= 0 && begin[b + 1] <= indices->size(0), op, "indptr[", b + 1, "]: expected at least ",
                   begin[b], " and at most ", indices->size(0), ", got ", begin[b + 1]);
    GK_CHECK_VALUE(count ? last[b] >= 1 && last[b] <= page_size : last[b] == 0, op, "last_page_len[", b, "]: expected ",
                   count ? "1 to " : "0, as there is no block, not ", count ? page_size : last[b], ", got ", last[b]);
    lists.push_back({pages + begin[b], count ? (count - 1) * page_size + last[b] : 0, count});
  }
  return lists;
}

// Every page that keys [first, end) lie in is one of the cache's.
inline void check_pages(const char* op, bool table, const int32_t* list, int64_t first, int64_t end, int64_t page_size,
                        int64_t pages, int64_t sequence, int64_t offset) {
  for (int64_t i = first / page_size; i * page_size < end; ++i)
    if (list[i] < 0 || list[i] >= pages) [[unlikely]] {
      GK_CHECK_INDEX(!table, op, "block_table[", sequence, ", ", i, "]: expected 0 <= id < ", pages, ", got ", list[i]);
      GK_CHECK_INDEX(false, op, "indices[", offset + i, "]: expected 0 <= id < ", pages, ", got ", list[i]);
    }
}

}  // namespace genai_kernels
