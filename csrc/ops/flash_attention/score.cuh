// What all CUDA kernels of flash_attention share: which rows and keys a block works on, which keys a query sees, how a
// product q.k becomes a score, and dropout's bits.
//
// A tile of rows is a run of queries of one query head (not, as on the CPU, of all heads of a group): a tile is then a
// box of memory whatever the group, TMA loads it, and masking needs no division. The heads of a group are neighbours in
// the grid and share K and V in L2. Key tiles begin at multiples of their size from key 0 of the sequence, so that the
// sums of a row are grouped the same way whatever its window, chunk or batch.
//
// NaN and infinities that a row does not see must not change its bits, and 0 * NaN in a tensor-core product would. Such
// a product leaves a NaN or an infinity in its result, so the fast kernels look at their sums when a tile is done. If
// one is not finite, the tile is computed again with zeros in place of what is not finite in the operand that
// probabilities (or their gradients) multiply: the bits of every row that does not see it. Then the SIMT kernel's
// functions (simt.cuh) bring NaN and infinities to the rows that do.
#pragma once
#include "core/philox.h"
#include "cuda/ptx.cuh"
#include "ops/flash_attention/flash_attention.h"

namespace genai_kernels {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kAttentionInfinity = __builtin_inff();

// ---- where things lie ----

template <class T>
GK_DEVICE T* token_at(const HeadsView& view, int64_t batch, int64_t token, int64_t head) {
  return reinterpret_cast<T*>(view.data) + batch * view.batch + token * view.token + head * view.head;
}

// One sequence. Positions within it are ints, offsets in memory int64_t.
struct Sequence {
  int batch;
  int64_t query_begin, key_begin;  // tokens; 0 in a dense call
  int queries, keys;
  int shift;  // keys - queries: key i + shift lies on the diagonal of query i

  // Where lse, delta and softmax_state have query i of a head.
  GK_DEVICE int64_t row(const FlashAttentionParams& p, int head, int i) const {
    return batch * p.lse_batch + head * p.lse_head + query_begin + i;
  }
};
GK_DEVICE Sequence sequence_at(const FlashAttentionParams& p, int batch) {
  Sequence s{batch, 0, 0, int(p.queries), int(p.keys), 0};
  if (p.cu_q) {
    s.query_begin = p.cu_q[batch];
    s.key_begin = p.cu_k[batch];
    s.queries = int(p.cu_q[batch + 1] - s.query_begin);
    s.keys = int(p.cu_k[batch + 1] - s.key_begin);
  }
  s.shift = s.keys - s.queries;
  return s;
}

// ---- tiles ----

// A run of queries of one query head, or of keys of one key head.
struct Tile {
  Sequence sequence;
  int head;
  int begin, count;  // positions within the sequence; count 0: nothing to do
  bool owned;        // false: tokens [begin, begin + count) belong to no sequence and take zeros
};

// Tiles of a grid: an upper bound where the sequences are packed. Sequence b of a packed call begins with tile
// cu[b] / size + b, which leaves it ceil(length / size) tiles at least and needs no sum over the sequences before; the
// tokens that no sequence owns are sequence `batch`.
inline int64_t tiles_of(bool packed, int64_t tokens, int64_t total, int64_t batch, int64_t heads, int size) {
  return packed ? (total / size + batch + 1) * heads : (tokens + size - 1) / size * batch * heads;
}
inline int64_t row_tiles(const FlashAttentionParams& p, int size) {
  return tiles_of(p.cu_q, p.queries, p.total_queries, p.batch, p.heads, size);
}
inline int64_t key_tiles(const FlashAttentionParams& p, int size) {
  return tiles_of(p.cu_k, p.keys, p.total_keys, p.batch, p.kv_heads, size);
}

// Tile `index` of a grid. The tiles of `together` heads are neighbours, in the order of their position, so that their K
// and V stay in L2; `last_first` begins with the last tiles, a causal call's longest.
GK_DEVICE Tile tile_at(const FlashAttentionParams& p, const int32_t* cu, int64_t tokens, int64_t total, int64_t heads,
                       int size, int64_t index, int64_t together, bool last_first) {
  const int64_t tiles = cu ? total / size + p.batch + 1 : (tokens + size - 1) / size;
  const int64_t pairs = cu ? heads : p.batch * heads;
  const int64_t section = index / (tiles * together), within = index - section * tiles * together;
  const int64_t left = pairs - section * together, width = left < together ? left : together;
  const int64_t pair = section * together + within % width;
  int64_t tile = within / width;
  if (last_first) tile = tiles - 1 - tile;

  Tile t{};
  t.head = int(pair % heads);
  if (!cu) {
    t.sequence = sequence_at(p, int(pair / heads));
    t.owned = true;
    t.begin = int(tile) * size;
    t.count = int(tokens) - t.begin < size ? int(tokens) - t.begin : size;
    return t;
  }
  int low = 0, high = int(p.batch);  // the last sequence whose first tile is at most this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (cu[middle] / size + middle <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  const int64_t begin = cu[low];
  t.owned = low < p.batch;
  t.begin = int(tile - (begin / size + low)) * size;
  int64_t length = total - begin;
  if (t.owned) {
    t.sequence = sequence_at(p, low);
    length = cu == p.cu_q ? t.sequence.queries : t.sequence.keys;
  } else {
    t.sequence = Sequence{0, begin, begin, 0, 0, 0};
  }
  t.count = length - t.begin < size ? int(length - t.begin) : size;
  if (t.count < 0) t.count = 0;
  return t;
}
GK_DEVICE Tile row_tile_at(const FlashAttentionParams& p, int size, int64_t index) {
  return tile_at(p, p.cu_q, p.queries, p.total_queries, p.heads, size, index, p.pairs_together, p.right >= 0);
}
// A causal call's first keys are seen by the most queries.
GK_DEVICE Tile key_tile_at(const FlashAttentionParams& p, int size, int64_t index) {
  return tile_at(p, p.cu_k, p.keys, p.total_keys, p.kv_heads, size, index, 1, false);
}

// ---- visibility ----

// The keys [first, last] within the window of a query; first > last: none.
GK_DEVICE int first_key(const FlashAttentionParams& p, const Sequence& s, int query) {
  const int at = query + s.shift - int(p.left);
  return p.left < 0 || at < 0 ? 0 : at;
}
GK_DEVICE int last_key(const FlashAttentionParams& p, const Sequence& s, int query) {
  const int at = query + s.shift + int(p.right);
  return p.right < 0 || at >= s.keys ? s.keys - 1 : at;
}

// What a tile visits: [begin, end), whole tiles from a multiple of the tile's size, of which all pairs in [full_begin,
// full_end) are within the window.
struct Visit {
  int begin, end, full_begin, full_end;
  GK_DEVICE bool full(int at) const { return full_begin <= at && at < full_end; }
};
// The key tiles of queries [begin, begin + count), count > 0.
GK_DEVICE Visit keys_to_visit(const FlashAttentionParams& p, const Sequence& s, int begin, int count, int size) {
  const int end = begin + count - 1;
  const int first = first_key(p, s, begin), last = last_key(p, s, end);
  if (first > last) return {0, 0, 0, 0};
  const int least_last = last_key(p, s, begin);
  return {first / size * size, last + 1, (first_key(p, s, end) + size - 1) / size * size,
          least_last < 0 ? 0 : (least_last + 1) / size * size};
}
// The query tiles of keys [begin, begin + count), count > 0.
GK_DEVICE Visit queries_to_visit(const FlashAttentionParams& p, const Sequence& s, int begin, int count, int size) {
  const int end = begin + count - 1;
  const int right = int(p.right), left = int(p.left);
  int first = p.right < 0 ? 0 : begin - s.shift - right, full_first = p.right < 0 ? 0 : end - s.shift - right;
  int last = p.left < 0 ? s.queries - 1 : end - s.shift + left;
  int full_last = p.left < 0 ? s.queries - 1 : begin - s.shift + left;
  if (first < 0) first = 0;
  if (full_first < 0) full_first = 0;
  if (last >= s.queries) last = s.queries - 1;
  if (full_last >= s.queries) full_last = s.queries - 1;
  if (first > last) return {0, 0, 0, 0};
  return {first / size * size, last + 1, (full_first + size - 1) / size * size,
          full_last < 0 ? 0 : (full_last + 1) / size * size};
}

// True if a row may not see a key that shares a tile with one that it sees, the end of a sequence apart (there, zeros
// are loaded).
GK_HOST_DEVICE inline bool hides_within_tiles(const FlashAttentionParams& p) {
  return p.left >= 0 || p.right >= 0 || p.bias.data || p.mask.data;
}

// ---- scores ----

// True if a score is more than scale * q.k under an interval. p.softmax_state then has the maximum of the scores,
// otherwise that of the products.
GK_HOST_DEVICE inline bool scores_are_modified(const FlashAttentionParams& p) {
  return p.softcap > 0 || p.slopes || p.bias.data || p.mask.data || !(p.scale > 0);
}

GK_DEVICE float element_at(const char* data, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return reinterpret_cast<const float*>(data)[i];
  if (dtype == Dtype::bf16) return to_float(reinterpret_cast<const bf16*>(data)[i]);
  return to_float(reinterpret_cast<const fp16*>(data)[i]);
}

// Products to scores, for one sequence and query head.
struct Scores {
  int shift;
  float slope, scale, cap, per_cap;
  int64_t bias, mask;  // offset of (query 0, key 0)

  GK_DEVICE Scores(const FlashAttentionParams& p, const Sequence& s, int head)
      : shift(s.shift),
        slope(p.slopes ? reinterpret_cast<const float*>(p.slopes)[s.batch * p.slopes_batch + head] : 0.f),
        scale(float(p.scale)),
        cap(float(p.softcap)),
        per_cap(float(1 / p.softcap)),
        bias(s.batch * p.bias.batch + head * p.bias.head),
        mask(s.batch * p.mask.batch + head * p.mask.head) {}

  // The score of a pair within the window, where scores_are_modified; -inf where the mask or the bias hides it.
  // `slope_of_cap` receives d(score) / d(scale * product).
  GK_DEVICE float modify(const FlashAttentionParams& p, float product, int query, int key, float& slope_of_cap) const {
    float x = product * scale;
    slope_of_cap = 1;
    if (p.softcap > 0) {
      const float t = tanhf(x * per_cap);
      slope_of_cap = 1 - t * t;
      x = cap * t;
    }
    if (p.slopes) {
      const int distance = query + shift - key;
      x -= slope * float(distance < 0 ? -distance : distance);
    }
    if (p.bias.data) {
      const float added = element_at(p.bias.data, p.bias.dtype, bias + query * p.bias.query + key * p.bias.key);
      x = added == -kAttentionInfinity ? added : x + added;
    }
    if (p.mask.data && !p.mask.data[mask + query * p.mask.query + key * p.mask.key]) x = -kAttentionInfinity;
    return x;
  }
};

// What forward kept of a row: P = exp2((score - max) * unit) * inverse. Without softmax_state lse has to do.
struct RowState {
  float max, inverse;
  // A row that sees NaN alone has that maximum too.
  GK_DEVICE bool sees_nothing() const { return max == -kAttentionInfinity && inverse == 0; }
};
GK_DEVICE RowState row_state(const FlashAttentionParams& p, int64_t row) {
  if (p.softmax_state) {
    const float* state = reinterpret_cast<const float*>(p.softmax_state) + 2 * row;
    return {state[0], state[1]};
  }
  const float lse = reinterpret_cast<const float*>(p.lse)[row];
  return {scores_are_modified(p) ? lse : float(double(lse) / p.scale), lse == -kAttentionInfinity ? 0.f : 1.f};
}
// exp(score - max) = exp2((score - max) * unit): the maximum is subtracted first, so that the largest probability is
// exactly 1, and a row with one key has inverse 1 exactly.
GK_DEVICE float unit_of_exponent(const FlashAttentionParams& p) {
  return (scores_are_modified(p) ? 1.f : float(p.scale)) * kLog2e;
}

// The end of a row: its sum with the sink's share, and what the largest probability is beside the sink's.
struct RowEnd {
  float total, beside_sink;
  double top;  // log(total) + top is lse
};
GK_DEVICE RowEnd end_of_row(const FlashAttentionParams& p, int head, float max, float sum) {
  const double exact_unit = scores_are_modified(p) ? 1 : p.scale;
  RowEnd end{sum, 1.f, double(max) * exact_unit};
  if (!p.sink) return end;
  const float top = max * float(exact_unit), sink = reinterpret_cast<const float*>(p.sink)[head];
  const float higher = top > sink ? top : sink;
  end.beside_sink = top == -kAttentionInfinity ? 0.f : expf(top - higher);
  end.total = sum * end.beside_sink + expf(sink - higher);
  if (!(top > sink)) end.top = sink;
  return end;
}
// lse and softmax_state, where they are given; out is the sum of p v, times beside_sink / total.
GK_DEVICE void store_row_state(const FlashAttentionParams& p, int64_t row, float max, const RowEnd& end) {
  if (p.lse)
    reinterpret_cast<float*>(p.lse)[row] =
        end.total == 0 ? -kAttentionInfinity : float(end.top + log(double(end.total)));
  if (!p.softmax_state) return;
  float* state = reinterpret_cast<float*>(p.softmax_state) + 2 * row;
  state[0] = end.total == end.total ? max : end.total;  // a maximum passes over NaN: they must not look like no key
  state[1] = end.total == 0 ? 0.f : end.beside_sink / end.total;
}

// The gradient that came in for lse. A row with one key has P = 1, dP = delta + dlse and dS = dlse; dP - delta would leave
// two roundings in the place of its zero. So in a tile that may hide keys, where a row's inverse is exactly 1 (its other
// probabilities together are below 2^-24) and P is not small, dS is this.
GK_DEVICE float dlse_of(const FlashAttentionParams& p, const Sequence& s, int head, int query) {
  if (!p.dlse) return 0;
  return reinterpret_cast<const float*>(
      p.dlse)[s.batch * p.dlse_batch + head * p.dlse_head + (s.query_begin + query) * p.dlse_token];
}

// ---- dropout ----

// Words [0, 4) belong to keys [key, key + 4), key a multiple of 4. A word keeps its element if it is at least
// p.dropout_threshold; what is kept is multiplied by p.dropout_factor.
GK_DEVICE void dropout_words(const FlashAttentionParams& p, int batch, int head, int query, int key,
                             uint32_t (&words)[4]) {
  const uint32_t c1[1] = {uint32_t(query)}, c2[1] = {uint32_t(batch * int(p.heads) + head)};
  uint32_t all[4][1];
  philox<1>(uint32_t(key) / 4, c1, c2, p.offset, p.seed, all);
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = all[i][0];
}

}  // namespace genai_kernels
