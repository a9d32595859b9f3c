// Host of paged_attention: schema, checks, and how the work is cut into items.
#include "ops/paged_attention/paged_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/pages.h"
#include "host/parallel.h"
#include "host/scratch.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "paged_attention";
// Sequences with at most so many rows for a key head (decode, a short draft) have their ranges as items of their own.
constexpr int64_t kFewRows = 32;

struct Arguments {
  const TensorRef &q, &k_cache, &v_cache;
  const OptionalTensor &block_table, &seq_lens, &indptr, &indices, &last_page_len, &cu_seqlens_q, &slopes, &sink, &tree,
      &k_scale, &v_scale;
  int64_t left, right;
  std::optional<double> scale;
  double softcap;
  bool heads_first;
};

// What the kernels point into.
struct Call {
  PagedAttentionParams params{};
  std::vector<PagedSequence> sequences;
  std::vector<PagedItem> items;
  std::vector<RowSpan> spans;
  std::vector<int64_t> split;         // sequences whose ranges are items
  std::unique_ptr<float[]> partials;  // written whole before it is read
};

const float* float_vector(const char* name, const OptionalTensor& t, int64_t heads, int64_t batch, int64_t& per_batch) {
  per_batch = 0;
  if (!t) return nullptr;
  GK_CHECK_TYPE(t->scalar_type() == ScalarType::Float, kOp, name, ": expected float32, got ",
                dtype_name(t->scalar_type()));
  const bool with_batch = batch >= 0 && t->dim() == 2 && t->size(0) == batch && t->size(1) == heads;
  GK_CHECK_VALUE(t->is_contiguous() && (with_batch || (t->dim() == 1 && t->size(0) == heads)), kOp, name,
                 ": expected a contiguous [", heads, "]", batch >= 0 ? " or [batch, heads]" : "", ", got ",
                 shape_of(*t));
  if (with_batch) per_batch = heads;
  return t->data_as<float>();
}

void check_queries(const Arguments& a, Call& call) {
  PagedAttentionParams& p = call.params;
  const TensorRef& q = a.q;
  p.dtype = float_dtype(kOp, "q", q);
  GK_CHECK_TYPE(p.dtype != Dtype::f64, kOp, "q: expected float32, bfloat16 or float16, got float64");
  GK_CHECK_VALUE(q.dim() == 3 || (q.dim() == 4 && !a.cu_seqlens_q), kOp,
                 "q: expected [tokens, heads, head_dim], or [batch, tokens, heads, head_dim] without cu_seqlens_q, got "
                 "shape ",
                 shape_of(q));
  const int64_t d = q.dim() - 3;
  GK_CHECK_VALUE(d == 0 || q.size(0) <= 1 || q.size(1) == 0 || q.stride(0) == q.size(1) * q.stride(1), kOp,
                 "q: expected sequences that follow each other, got stride ", q.stride(0),
                 " in dimension 0; pass "
                 "q.contiguous()");
  p.heads = q.size(d + 1);
  p.head_dim = q.size(d + 2);
  p.q = static_cast<const char*>(q.data());
  p.q_token = q.stride(d);
  p.q_head = q.stride(d + 1);
  p.q_dim = p.head_dim == 1 ? 1 : q.stride(d + 2);
}

// The tokens of q that belong to each sequence.
void set_queries(const Arguments& a, Call& call, int64_t batch) {
  const TensorRef& q = a.q;
  if (!a.cu_seqlens_q) {
    GK_CHECK_VALUE(q.size(0) == batch, kOp, "q: expected ", batch, " in dimension 0, one for each sequence, got shape ",
                   shape_of(q), "; for other lengths pass cu_seqlens_q");
    const int64_t tokens = q.dim() == 4 ? q.size(1) : 1;
    for (int64_t b = 0; b < batch; ++b) call.sequences[b].queries = tokens, call.sequences[b].query_begin = b * tokens;
    return;
  }
  const TensorRef& cu = *a.cu_seqlens_q;
  const int32_t* at = check_int32(kOp, "cu_seqlens_q", cu, {batch + 1});
  GK_CHECK_VALUE(at[0] == 0, kOp, "cu_seqlens_q[0]: expected 0, got ", at[0]);
  for (int64_t b = 0; b < batch; ++b) {
    GK_CHECK_VALUE(at[b + 1] >= at[b] && at[b + 1] <= q.size(0), kOp, "cu_seqlens_q[", b + 1, "]: expected at least ",
                   at[b], " and at most ", q.size(0), ", the tokens of q, got ", at[b + 1]);
    call.sequences[b].query_begin = at[b];
    call.sequences[b].queries = at[b + 1] - at[b];
  }
  GK_CHECK_VALUE(at[batch] == q.size(0), kOp, "cu_seqlens_q[", batch, "]: expected ", q.size(0),
                 ", the tokens of q, got ", at[batch]);
}

Call checked(const Arguments& a) {
  Call call;
  PagedAttentionParams& p = call.params;
  check_queries(a, call);
  const CacheView k = cache_view(kOp, "k_cache", a.k_cache, a.heads_first);
  const CacheView v = cache_view(kOp, "v_cache", a.v_cache, a.heads_first);
  check_cache_pair(kOp, k, v, a.k_cache, a.v_cache);
  p.int8_cache = k.type == ScalarType::Char;
  GK_CHECK_TYPE(p.int8_cache || k.type == a.q.scalar_type(), kOp, "k_cache: expected the dtype of q, ",
                dtype_name(a.q.scalar_type()), ", or int8, got ", dtype_name(k.type));
  GK_CHECK_VALUE(k.dim == p.head_dim, kOp, "k_cache: expected head_dim ", p.head_dim, " as q, got shape ",
                 shape_of(a.k_cache));
  p.kv_heads = k.heads;
  p.value_dim = v.dim;
  p.page_size = k.page_size;
  GK_CHECK_VALUE(p.heads > 0 && p.head_dim > 0 && p.value_dim > 0, kOp, "q: expected heads and a head_dim, got shape ",
                 shape_of(a.q));
  GK_CHECK_VALUE(p.kv_heads > 0 && p.heads % p.kv_heads == 0, kOp, "q: expected a multiple of the ", p.kv_heads,
                 " heads of k_cache, got ", p.heads);
  p.group = p.heads / p.kv_heads;
  p.k = {k.data, k.page, k.token, k.head};
  p.v = {v.data, v.page, v.token, v.head};
  set_scales(kOp, p.k, "k_scale", a.k_scale, k, a.heads_first);
  set_scales(kOp, p.v, "v_scale", a.v_scale, v, a.heads_first);
  p.scale = a.scale.value_or(1 / std::sqrt(double(p.head_dim)));
  GK_CHECK_VALUE(a.softcap >= 0, kOp, "softcap: expected 0 (none) or more, got ", a.softcap);
  p.softcap = a.softcap;
  p.left = a.left;
  p.right = a.right;
  for (const int64_t side : {a.left, a.right})
    GK_CHECK_VALUE(side >= -1, kOp, "window_size: expected -1 (no limit) or more, got ", side);
  for (const PageList& list :
       page_lists(kOp, a.block_table, a.seq_lens, a.indptr, a.indices, a.last_page_len, p.page_size))
    call.sequences.push_back({list.pages, list.tokens, 0, 0, 0, -1});
  const int64_t batch = int64_t(call.sequences.size());
  set_queries(a, call, batch);
  int64_t ignored;
  p.slopes = float_vector("alibi_slopes", a.slopes, p.heads, batch, p.slopes_sequence);
  p.sink = float_vector("sink", a.sink, p.heads, -1, ignored);
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    PagedSequence& s = call.sequences[b];
    longest = std::max(longest, s.queries);
    GK_CHECK_VALUE(s.queries <= s.keys, kOp, "seq_lens[", b, "]: expected at least the ", s.queries,
                   " new tokens of this sequence, which are in the cache already, got ", s.keys);
    s.first_key = p.left < 0 ? 0 : std::max<int64_t>(0, s.keys - s.queries - p.left);
    if (!s.queries) continue;
    const int64_t offset = a.indices ? s.pages - a.indices->data_as<int32_t>() : 0;
    check_pages(kOp, a.block_table.has_value(), s.pages, s.first_key, s.keys, p.page_size, k.pages, b, offset);
  }
  if (a.tree) {
    const TensorRef& t = *a.tree;
    GK_CHECK_TYPE(t.scalar_type() == ScalarType::Bool, kOp, "tree_mask: expected bool, got ",
                  dtype_name(t.scalar_type()));
    const int64_t tokens = a.q.dim() == 4 ? a.q.size(0) * a.q.size(1) : a.q.size(0);
    GK_CHECK_VALUE(t.dim() == 2 && t.size(0) == tokens && t.size(1) >= longest, kOp, "tree_mask: expected [", tokens,
                   ", at least ", longest, "]: a row for each query, a column for each new token, got ", shape_of(t));
    p.tree = t.data_as<bool>();
    p.tree_query = t.stride(0);
    p.tree_token = t.stride(1);
  }
  return call;
}

// True if a sequence's table has pages of its own nowhere in a whole range.
bool same_pages(const PagedAttentionParams& p, const PagedSequence& a, const PagedSequence& b, int64_t range) {
  const int64_t first = range * kRangeKeys / p.page_size, last = ((range + 1) * kRangeKeys - 1) / p.page_size;
  return std::memcmp(a.pages + first, b.pages + first, size_t(last - first + 1) * sizeof(int32_t)) == 0;
}

// The items: long prefills by rows, everything else by ranges, a range of pages that several sequences share once.
void cut(Call& call) {
  PagedAttentionParams& p = call.params;
  const int64_t batch = int64_t(call.sequences.size());
  const int64_t threads = torch::stable::get_num_threads();
  int64_t total_rows = 0, partials = 0, most_ranges = 0;
  for (int64_t b = 0; b < batch; ++b) {
    PagedSequence& s = call.sequences[b];
    const int64_t rows = s.queries * p.group;
    total_rows += rows;
    if (rows == 0 || rows > kFewRows || s.ranges() == 1) continue;
    s.partial_begin = partials;
    partials += s.queries * p.heads * s.ranges();
    call.split.push_back(b);
    most_ranges = std::max(most_ranges, (s.keys - 1) / kRangeKeys + 1);
  }
  struct Piece {
    int64_t span_begin, span_end, key_begin, key_end;
    bool partial;
  };
  std::vector<Piece> pieces;
  const int64_t fair = std::max<int64_t>(8, total_rows * p.kv_heads / (4 * threads) / 8 * 8);
  for (int64_t b = 0; b < batch; ++b) {
    const PagedSequence& s = call.sequences[b];
    if (s.partial_begin >= 0) continue;
    const int64_t rows = s.queries * p.group, step = std::min(kItemRows, fair);
    for (int64_t row = std::max<int64_t>(0, (rows - 1) / step * step); row >= 0 && rows; row -= step) {
      call.spans.push_back({b, row, std::min(rows, row + step)});
      const int64_t at = int64_t(call.spans.size());
      pieces.push_back({at - 1, at, 0, s.keys, false});
    }
  }
  std::vector<int64_t> waiting, later;
  for (int64_t range = 0; range < most_ranges; ++range) {
    waiting.clear();
    for (const int64_t b : call.split) {
      const PagedSequence& s = call.sequences[b];
      if (s.first_key / kRangeKeys <= range && range * kRangeKeys < s.keys) waiting.push_back(b);
    }
    while (!waiting.empty()) {
      const int64_t leader = waiting.front();
      const PagedSequence& s = call.sequences[leader];
      const bool whole = (range + 1) * kRangeKeys <= s.keys && s.first_key <= range * kRangeKeys;
      later.clear();
      int64_t rows = 0;
      const int64_t begin = int64_t(call.spans.size());
      for (const int64_t b : waiting) {
        const PagedSequence& other = call.sequences[b];
        const bool together = b == leader || (whole && (range + 1) * kRangeKeys <= other.keys &&
                                              other.first_key <= range * kRangeKeys && same_pages(p, s, other, range));
        const int64_t more = other.queries * p.group;
        if (!together || rows + more > kItemRows) {
          later.push_back(b);
          continue;
        }
        rows += more;
        call.spans.push_back({b, 0, more});
      }
      pieces.push_back({begin, int64_t(call.spans.size()), range * kRangeKeys, (range + 1) * kRangeKeys, true});
      waiting.swap(later);
    }
  }
  for (const Piece& piece : pieces)
    for (int64_t head = 0; head < p.kv_heads; ++head)
      call.items.push_back({call.spans.data() + piece.span_begin, piece.span_end - piece.span_begin, head,
                            piece.key_begin, piece.key_end, piece.partial});
  call.partials = std::make_unique_for_overwrite<float[]>(size_t(partials * (p.value_dim + 2)));
  p.partials = call.partials.get();
  p.sequences = call.sequences.data();
}

struct Result {
  Tensor out;
  std::optional<Tensor> lse;
};

Result forward(const Arguments& a, bool with_lse) {
  Call call = checked(a);
  PagedAttentionParams& p = call.params;
  const bool dense = a.q.dim() == 4;
  const int64_t tokens = dense ? a.q.size(0) * a.q.size(1) : a.q.size(0);
  const int64_t sizes[4] = {dense ? a.q.size(0) : 1, dense ? a.q.size(1) : tokens, p.heads, p.value_dim};
  Result result{new_empty(a.q, sizes + !dense, 3 + dense, a.q.scalar_type()), {}};
  p.out = static_cast<char*>(result.out.mutable_data_ptr());
  p.out_token = p.heads * p.value_dim;
  p.out_head = p.value_dim;
  if (with_lse) {
    result.lse = new_empty(a.q, {p.heads, tokens}, ScalarType::Float);
    p.lse = static_cast<float*>(result.lse->mutable_data_ptr());
    p.lse_head = tokens;
  }
  cut(call);
  int64_t most_rows = 0;
  for (const PagedItem& item : call.items) {
    int64_t rows = 0;
    for (int64_t i = 0; i < item.span_count; ++i) rows += item.spans[i].row_end - item.spans[i].row_begin;
    most_rows = std::max(most_rows, rows);
  }
  const int64_t bytes = paged_attention_scratch(p, most_rows);
  parallel_for_dynamic(
      int64_t(call.items.size()), [&] { return Scratch(bytes); },
      [&](int64_t i, Scratch& scratch) { paged_attention_kernel(p, call.items[size_t(i)], scratch.get()); });
  const int64_t folds = int64_t(call.split.size()) * p.heads;
  parallel_for(folds, 1 + 4096 / p.value_dim, [&](int64_t begin, int64_t end) {
    const Scratch scratch(p.value_dim * int64_t(sizeof(float)));
    for (int64_t i = begin; i < end; ++i)
      paged_attention_fold_kernel(p, call.split[size_t(i / p.heads)], i % p.heads, scratch.get());
  });
  return result;
}

#define GK_PARAMETERS                                                                                          \
  const TensorRef &q, const TensorRef &k_cache, const TensorRef &v_cache, const OptionalTensor &block_table,   \
      const OptionalTensor &seq_lens, const OptionalTensor &indptr, const OptionalTensor &indices,             \
      const OptionalTensor &last_page_len, const OptionalTensor &cu_seqlens_q, const OptionalTensor &slopes,   \
      const OptionalTensor &sink, const OptionalTensor &tree, const OptionalTensor &k_scale,                   \
      const OptionalTensor &v_scale, int64_t left, int64_t right, std::optional<double> scale, double softcap, \
      bool heads_first
#define GK_ARGUMENTS                                                                                              \
  Arguments {                                                                                                     \
    q, k_cache, v_cache, block_table, seq_lens, indptr, indices, last_page_len, cu_seqlens_q, slopes, sink, tree, \
        k_scale, v_scale, left, right, scale, softcap, heads_first                                                \
  }

Tensor paged_attention(GK_PARAMETERS) { return forward(GK_ARGUMENTS, false).out; }
std::tuple<Tensor, Tensor> paged_attention_lse(GK_PARAMETERS) {
  Result result = forward(GK_ARGUMENTS, true);
  return {result.out, *result.lse};
}

}  // namespace
}  // namespace genai_kernels

#define GK_SCHEMA                                                                                                  \
  "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? block_table, Tensor? seq_lens, Tensor? indptr, "             \
  "Tensor? indices, Tensor? last_page_len, Tensor? cu_seqlens_q, Tensor? alibi_slopes, Tensor? sink, "             \
  "Tensor? tree_mask, Tensor? k_scale, Tensor? v_scale, int window_left, int window_right, float? softmax_scale, " \
  "float softcap, bool heads_first) -> "

GK_CPU_OP(paged_attention, genai_kernels::paged_attention, GK_SCHEMA "Tensor")
GK_CPU_OP(paged_attention_lse, genai_kernels::paged_attention_lse, GK_SCHEMA "(Tensor out, Tensor lse)")
