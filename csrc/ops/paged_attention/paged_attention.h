// What the host of paged_attention hands to its kernels, and how the work is cut.
//
// A "row" is a query of one query head; row r of a sequence and key head is query r / group, head r % group of the group,
// so that a key is read once for all heads that share it.
//
// The keys of a sequence are cut into ranges of kRangeKeys at fixed positions. Every range has a softmax of its own, and
// the ranges of a row are folded in their order, whoever computed them: one item after the other, or several threads side
// by side, or once for all sequences whose tables name the same pages. So none of that shows in the bits.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace genai_kernels {

inline constexpr int64_t kRangeKeys = 512;  // a multiple of the keys of a step

// K or V: [page][token][head][dim] with any strides but the last, in elements.
struct PagesView {
  const char* data = nullptr;
  int64_t page = 0, token = 0, head = 0;
  const float* scale = nullptr;  // of int8: what a token and head is multiplied by
  int64_t scale_page = 0, scale_token = 0, scale_head = 0;
};

// One sequence: its keys, and its queries, which are the last of them.
struct PagedSequence {
  const int32_t* pages;  // page of key k at k / page_size
  int64_t keys, queries, query_begin;
  int64_t first_key;      // that any of its queries sees
  int64_t partial_begin;  // its first partial result, where its ranges are items of their own; else -1
  int64_t ranges() const { return (keys - 1) / kRangeKeys - first_key / kRangeKeys + 1; }
};

struct PagedAttentionParams {
  Dtype dtype;      // of q and out
  bool int8_cache;  // otherwise the pages have the dtype of q
  int64_t heads, kv_heads, group, head_dim, value_dim, page_size;
  PagesView k, v;
  const char* q;
  char* out;
  int64_t q_token, q_head, q_dim, out_token, out_head;  // strides, in elements
  float* lse;                                           // [heads][lse_head], or null
  int64_t lse_head;
  double scale, softcap;
  int64_t left, right;  // window; negative: no limit
  const float* slopes;  // index sequence * slopes_sequence + head, or null
  int64_t slopes_sequence;
  const float* sink;  // [heads], or null
  const bool* tree;   // [queries of all sequences][new tokens of a sequence], or null
  int64_t tree_query, tree_token;
  const PagedSequence* sequences;
  float* partials;  // [partial][value_dim + 2]: output, maximum and sum of one row and range
};

// Rows [row_begin, row_end) of a sequence and key head.
struct RowSpan {
  int64_t sequence, row_begin, row_end;
};
// The rows of `spans`, at most kItemRows of them, over keys [key_begin, key_end). With `partial` that is one range, whose
// result goes to the partials; without, it is all that the one span sees, and its output.
inline constexpr int64_t kItemRows = 192;
struct PagedItem {
  const RowSpan* spans;
  int64_t span_count, kv_head, key_begin, key_end;
  bool partial;
};

int64_t paged_attention_scratch(const PagedAttentionParams& p, int64_t rows);
void paged_attention_kernel(const PagedAttentionParams& p, const PagedItem& item, void* scratch);
// Folds the partial results of one sequence and head. Scratch: value_dim floats.
void paged_attention_fold_kernel(const PagedAttentionParams& p, int64_t sequence, int64_t head, void* scratch);

// Where the partial result of a row and range lies.
inline float* partial_of(const PagedAttentionParams& p, const PagedSequence& s, int64_t query, int64_t head,
                         int64_t range) {
  return p.partials + (s.partial_begin + (query * p.heads + head) * s.ranges() + range) * (p.value_dim + 2);
}

}  // namespace genai_kernels
