// Attention of one row, and the gradients of one row or key, by one warp in float32: the exact semantics, any head dim,
// any strides. The SIMT kernels are these functions over a grid; the fast kernels call them to bring NaN and infinities
// to the rows that see them (score.cuh).
//
// The lanes hold 32 keys (queries) while scores are computed, so that only a maximum crosses the warp, and 32 dims at a
// time while they are summed. Sums are of 8 products first, then of 32, then over the steps: their error grows with the
// steps.
// What a row does not see is not multiplied.
#pragma once
#include "ops/flash_attention/score.cuh"

namespace genai_kernels::simt {

inline constexpr int kDims = 256;  // dims that a warp sums: 8 registers in a lane
inline constexpr int kSums = kDims / 32;

inline int dim_chunks(int64_t dims) { return dims <= kDims ? 1 : int((dims + kDims - 1) / kDims); }

GK_DEVICE float warp_max(float x) {
#pragma unroll
  for (int m = 16; m; m >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, m));
  return x;
}
template <class T>
GK_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int m = 16; m; m >>= 1) x += __shfl_xor_sync(~0u, x, m);
  return x;
}
GK_DEVICE bool is_finite(float x) { return x - x == 0; }

template <class T>
GK_DEVICE float dot(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t n) {
  float sum[4] = {};  // four chains: half the error of one
  int64_t d = 0;
  for (; d + 4 <= n; d += 4)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = fmaf(to_float(a[(d + i) * a_stride]), to_float(b[(d + i) * b_stride]), sum[i]);
  for (; d < n; ++d) sum[0] = fmaf(to_float(a[d * a_stride]), to_float(b[d * b_stride]), sum[0]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// A result's elements [dim + lane + 32 i]. In a repair only those that are not finite are stored.
template <class T>
GK_DEVICE void store(T* to, int64_t stride, int64_t dim, int64_t dims, const float (&x)[kSums], bool repair) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const int64_t d = dim + lane + 32 * i;
    if (d < dims && !(repair && is_finite(x[i]))) to[d * stride] = from_float<T>(x[i]);
  }
}

// part[i] += factor * row[dim + lane + 32 i].
template <class T>
GK_DEVICE void add_row(const T* row, int64_t stride, int64_t dim, int64_t dims, float factor, float (&part)[kSums]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const int64_t d = dim + lane + 32 * i;
    if (d < dims) part[i] = fmaf(factor, to_float(row[d * stride]), part[i]);
  }
}

// sum += the sum over the rows j that are seen, which add(j, few) adds to `few`: eight at a time.
template <class F>
GK_DEVICE void add_sum_of_32(unsigned seen, float (&sum)[kSums], const F& add) {
  float part[kSums] = {};
#pragma unroll 1
  for (int begin = 0; begin < 32; begin += 8) {
    float few[kSums] = {};
    for (int j = begin; j < begin + 8; ++j)
      if (seen >> j & 1) add(j, few);
#pragma unroll
    for (int i = 0; i < kSums; ++i) part[i] += few[i];
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) sum[i] += part[i];
}

// 0, or what a kept probability is multiplied with.
GK_DEVICE float dropout_of(const FlashAttentionParams& p, const Sequence& s, int head, int query, int key) {
  uint32_t words[4];
  dropout_words(p, s.batch, head, query, key, words);
  const int i = key % 4;
  const uint32_t word = i < 2 ? (i ? words[1] : words[0]) : (i == 2 ? words[2] : words[3]);
  return word >= p.dropout_threshold ? p.dropout_factor : 0.f;
}

// Forward of one row: dims [dim, dim + kDims) of out; with dim 0 and no repair also lse and softmax_state. `room`: 32
// floats of shared memory of this warp.
template <class T>
GK_DEVICE void attend_row(const FlashAttentionParams& p, const Sequence& s, int head, int query, int64_t dim,
                          bool repair, float* room) {
  const int lane = threadIdx.x % 32, kv_head = head / int(p.group);
  const bool modified = scores_are_modified(p);
  const Scores scores(p, s, head);
  const T* q = token_at<T>(p.q, s.batch, s.query_begin + query, head);
  const int first = first_key(p, s, query), last = last_key(p, s, query);
  const float unit = modified ? 1.f : float(p.scale);
  float most = -kAttentionInfinity, sum = 0, o[kSums] = {};
  for (int step = first / 32 * 32; step <= last; step += 32) {
    const int key = step + lane;
    float score = -kAttentionInfinity, unused;
    if (first <= key && key <= last) {
      score = dot(q, p.q.dim, token_at<T>(p.k, s.batch, s.key_begin + key, kv_head), p.k.dim, p.head_dim);
      if (modified) score = scores.modify(p, score, query, key, unused);
    }
    const float before = most;
    most = fmaxf(most, warp_max(score));
    const float offset = most == -kAttentionInfinity ? 0.f : most;  // -inf - -inf is NaN
    const float alpha = expf((before - offset) * unit);
    float probability = score == -kAttentionInfinity ? 0.f : expf((score - offset) * unit);
    sum = fmaf(sum, alpha, probability);
    if (p.dropout_p > 0) probability *= dropout_of(p, s, head, query, key);
    const unsigned seen = __ballot_sync(~0u, score != -kAttentionInfinity);
    room[lane] = probability;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kSums; ++i) o[i] *= alpha;
    add_sum_of_32(seen, o, [&](int j, float (&few)[kSums]) {
      add_row(token_at<T>(p.v, s.batch, s.key_begin + step + j, kv_head), p.v.dim, dim, p.value_dim, room[j], few);
    });
    __syncwarp();
  }
  sum = warp_sum(sum);
  const RowEnd end = end_of_row(p, head, most, sum);
#pragma unroll
  for (int i = 0; i < kSums; ++i) o[i] = end.total == 0 ? 0.f : o[i] / end.total * end.beside_sink;
  store(token_at<T>(p.out, s.batch, s.query_begin + query, head), p.out.dim, dim, p.value_dim, o, repair);
  if (lane == 0 && dim == 0 && !repair) store_row_state(p, s.row(p, head, query), most, end);
}

// P, dP and dS of one pair; `row` is where lse has the query.
struct Pair {
  float kept;      // P after dropout, what multiplies V
  float gradient;  // dS, of the score
  float cap;       // d(score) / d(scale * product)
  bool seen;
};
template <class T>
GK_DEVICE Pair differentiate_pair(const FlashAttentionParams& p, const Sequence& s, const Scores& scores, int head,
                                  int query, int key, bool modified) {
  Pair pair{0, 0, 1, false};
  const int64_t row = s.row(p, head, query);
  const RowState state = row_state(p, row);
  if (key < first_key(p, s, query) || key > last_key(p, s, query) || state.sees_nothing()) return pair;
  const int kv_head = head / int(p.group);
  float score = dot(token_at<T>(p.q, s.batch, s.query_begin + query, head), p.q.dim,
                    token_at<T>(p.k, s.batch, s.key_begin + key, kv_head), p.k.dim, p.head_dim);
  if (modified) score = scores.modify(p, score, query, key, pair.cap);
  if (score == -kAttentionInfinity) return pair;
  pair.seen = true;
  float dp = dot(token_at<T>(p.dout, s.batch, s.query_begin + query, head), p.dout.dim,
                 token_at<T>(p.v, s.batch, s.key_begin + key, kv_head), p.v.dim, p.value_dim);
  const float probability = expf((score - state.max) * (modified ? 1.f : float(p.scale))) * state.inverse;
  pair.kept = probability;
  if (p.dropout_p > 0) {
    const float factor = dropout_of(p, s, head, query, key);
    pair.kept *= factor;
    dp *= factor;
  }
  const bool one_key = p.softmax_state ? state.inverse == 1.f && probability > 0.5f : probability == 1.f;
  pair.gradient =
      one_key ? dlse_of(p, s, head, query) : probability * (dp - reinterpret_cast<const float*>(p.delta)[row]);
  return pair;
}

// dq of one row, dims [dim, dim + kDims).
template <class T>
GK_DEVICE void differentiate_row(const FlashAttentionParams& p, const Sequence& s, int head, int query, int64_t dim,
                                 bool repair, float* room) {
  const int lane = threadIdx.x % 32, kv_head = head / int(p.group);
  const bool modified = scores_are_modified(p);
  const Scores scores(p, s, head);
  const int first = first_key(p, s, query), last = last_key(p, s, query);
  float dq[kSums] = {};
  for (int step = first / 32 * 32; step <= last; step += 32) {
    const Pair pair = differentiate_pair<T>(p, s, scores, head, query, step + lane, modified);
    const unsigned seen = __ballot_sync(~0u, pair.seen);
    room[lane] = pair.gradient * pair.cap;
    __syncwarp();
    add_sum_of_32(seen, dq, [&](int j, float (&few)[kSums]) {
      add_row(token_at<T>(p.k, s.batch, s.key_begin + step + j, kv_head), p.k.dim, dim, p.head_dim, room[j], few);
    });
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) dq[i] *= float(p.scale);
  store(token_at<T>(p.dq, s.batch, s.query_begin + query, head), p.dq.dim, dim, p.head_dim, dq, repair);
}

// dk and dv of one key, dims [dim, dim + kDims). `room`: 64 floats.
template <class T>
GK_DEVICE void differentiate_key(const FlashAttentionParams& p, const Sequence& s, int kv_head, int key, int64_t dim,
                                 bool repair, float* room) {
  const int lane = threadIdx.x % 32;
  const bool modified = scores_are_modified(p);
  const Visit visit = queries_to_visit(p, s, key, 1, 32);
  float dk[kSums] = {}, dv[kSums] = {};
  for (int head = kv_head * int(p.group); head < (kv_head + 1) * int(p.group); ++head) {
    const Scores scores(p, s, head);
    for (int step = visit.begin; step < visit.end; step += 32) {
      Pair pair{0, 0, 1, false};
      if (step + lane < s.queries) pair = differentiate_pair<T>(p, s, scores, head, step + lane, key, modified);
      const unsigned seen = __ballot_sync(~0u, pair.seen);
      room[lane] = pair.gradient * pair.cap;
      room[32 + lane] = pair.kept;
      __syncwarp();
      add_sum_of_32(seen, dk, [&](int j, float (&few)[kSums]) {
        add_row(token_at<T>(p.q, s.batch, s.query_begin + step + j, head), p.q.dim, dim, p.head_dim, room[j], few);
      });
      add_sum_of_32(seen, dv, [&](int j, float (&few)[kSums]) {
        add_row(token_at<T>(p.dout, s.batch, s.query_begin + step + j, head), p.dout.dim, dim, p.value_dim,
                room[32 + j], few);
      });
      __syncwarp();
    }
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) dk[i] *= float(p.scale);
  store(token_at<T>(p.dk, s.batch, s.key_begin + key, kv_head), p.dk.dim, dim, p.head_dim, dk, repair);
  store(token_at<T>(p.dv, s.batch, s.key_begin + key, kv_head), p.dv.dim, dim, p.value_dim, dv, repair);
}

}  // namespace genai_kernels::simt
