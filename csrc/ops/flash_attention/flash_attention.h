// What the host of flash_attention hands to its kernels, and how the work is cut.
//
// A "row" is a query of one query head. The `group` query heads that share a key head are attended together: row
// r = query * group + head_in_group, so that K and V are read once for all of them.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace genai_kernels {

// [batch, tokens, heads, dim] with any strides, in elements; for packed sequences batch stride 0.
struct HeadsView {
  char* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t batch = 0, token = 0, head = 0, dim = 0;
};

// [batch, heads, queries, keys] with stride 0 where it is broadcast.
struct ScoresView {
  char* data = nullptr;  // null: not given
  Dtype dtype = Dtype::f32;
  int64_t batch = 0, head = 0, query = 0, key = 0;
};

struct FlashAttentionParams {
  Dtype dtype;  // of q, k, v, out
  int64_t batch, heads, kv_heads, group;
  int64_t head_dim, value_dim;
  int64_t queries, keys;       // dense lengths; the longest where sequences are packed
  const int32_t *cu_q, *cu_k;  // packed sequences: where each begins, or null
  HeadsView q, k, v, out;
  char* lse;            // in the compute type, index batch * lse_batch + head * lse_head + token
  char* softmax_state;  // [lse index][2]: the row's maximum (before the scale, unless the scores are
                        // modified) and 1 / its sum, from which backward has P to the last bit; or null
  int64_t lse_batch, lse_head;
  double scale, softcap;
  int64_t left, right;  // window; negative: no limit
  const char* slopes;   // compute type, or null; index batch * slopes_batch + head
  int64_t slopes_batch;
  ScoresView bias, mask;  // the mask is bool
  const char* sink;       // [heads] in the compute type, or null
  double dropout_p;
  uint64_t seed;
  uint32_t offset;

  int64_t block_rows;  // rows of one forward item

  // backward only
  HeadsView dout, dq, dk, dv;
  const char* dlse;  // like lse, or null
  int64_t dlse_batch, dlse_head, dlse_token;
  char* delta;       // compute type, laid out as lse: sum(dout * out) - dlse
  char* dsink;       // [batch, heads] partial sums in the compute type, or null
  ScoresView dbias;  // summed over the broadcast dimensions: float64 if there are any

  // GPU only, where cu_q and cu_k lie in device memory and no length of a packed sequence is known to the host
  int64_t total_queries, total_keys;  // tokens of q, k; of packed ones, those included that no sequence owns
  int64_t pairs_together;             // heads (of all batches) whose tiles are neighbours in the grid; see score.cuh
  uint32_t dropout_threshold;         // a word of Philox below it drops its element
  float dropout_factor;               // 1 / (1 - dropout_p)

  int64_t query_begin(int64_t b) const { return cu_q ? cu_q[b] : 0; }
  int64_t query_count(int64_t b) const { return cu_q ? cu_q[b + 1] - cu_q[b] : queries; }
  int64_t key_begin(int64_t b) const { return cu_k ? cu_k[b] : 0; }
  int64_t key_count(int64_t b) const { return cu_k ? cu_k[b + 1] - cu_k[b] : keys; }
};

// Forward: rows [row_begin, row_begin + block_rows) of sequence `batch` and key head `kv_head`. `scratch` is the
// thread's own, of flash_attention_fwd_scratch() bytes.
inline constexpr int64_t kRowsMultiple = 48;  // a multiple of the rows of a tile on every instruction set
int64_t flash_attention_fwd_scratch(const FlashAttentionParams& p);
void flash_attention_fwd_kernel(const FlashAttentionParams& p, int64_t batch, int64_t kv_head, int64_t row_begin,
                                void* scratch);

// Backward. First delta (and dsink) of one batch and query head; then the gradients of one batch and key head:
//   dq and dk, dv at once, five products, or, where there are fewer heads than threads, each part by itself:
//   dk and dv of one block of keys, or dq of one block of rows. The bits are the same either way.
enum class Gradients { all, keys_and_values, queries };
inline constexpr int64_t kBackwardKeys = 256;  // keys of one keys_and_values item
inline constexpr int64_t kBackwardRows = 384;  // rows of one queries item
int64_t flash_attention_bwd_scratch(const FlashAttentionParams& p, Gradients which);
void flash_attention_delta_kernel(const FlashAttentionParams& p, int64_t batch, int64_t head);
void flash_attention_bwd_kernel(const FlashAttentionParams& p, Gradients which, int64_t batch, int64_t kv_head,
                                int64_t begin, void* scratch);
// dbias, summed over the batches, key heads and rows of a range.
struct Range {
  int64_t batch_begin, batch_end, kv_head_begin, kv_head_end, row_begin, row_end;
};
void flash_attention_dbias_kernel(const FlashAttentionParams& p, const Range& range, void* scratch);

}  // namespace genai_kernels
