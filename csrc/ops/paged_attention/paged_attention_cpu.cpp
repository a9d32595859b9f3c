// Attention over pages on the CPU (README.md of genai_kernels/ops/paged_attention).
//
// An item goes over its keys in steps of kStepKeys, and for a block of its rows
//
//     S[row][key]  = Q K^T
//     P            = exp(S - max)
//     O[row][dim]  = alpha O + P V
//
// with the two products of products.h: straight from the pages where the rows are few, from packed K and V where they are
// many. Every element is made by the same chain of operations in the same order, whatever rows, keys and pages it is
// computed together with. flash_attention has products of its own, for many rows; here the sums are cut into shorter
// pieces, as PyTorch's product of one row with a matrix does.
#include "cpu/region_headers.h"
#include "ops/paged_attention/paged_attention.h"

#define GENAI_KERNELS_ISA_FILE "ops/paged_attention/paged_attention_cpu.cpp"
#define GENAI_KERNELS_ISA_DOT_BF16
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/exp.h"
#include "cpu/tanh.h"
#include "cpu/tile_gemm.h"
#include "cpu/transpose.h"
#include "cpu/attention_pack.h"
#include "ops/paged_attention/item.h"
#include "ops/paged_attention/products.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// ---- one step for a block of rows ----

// True if the scores are scaled before their maximum is taken, and not within the exponent: where there is more to do
// with them than to scale, and in float32, whose results show the rounding of an exponent's factor.
GK_INLINE bool scores_are_scaled(const PagedAttentionParams& p) {
  return p.dtype == Dtype::f32 || p.softcap > 0 || p.slopes || !(p.scale > 0);
}

GK_INLINE VecI key_numbers(int64_t key) {
  VecI lane;
  GK_UNROLL for (int l = 0; l < kLanes; ++l) lane[l] = l;
  return lane + int32_t(key);
}

// Raw products of a row to scores, in place, -inf where a key is not seen; the largest of them.
template <bool Scaled>
GK_INLINE float finish_scores(const PagedAttentionParams& p, const Row& row, int64_t key, int64_t columns,
                              const float* scale_k, float* s) {
  const VecF hidden = broadcast(-kInfinity<float>);
  VecF most = hidden;
  const bool sees_all = row.first <= key && key + columns - 1 <= row.last && !row.tree;
  const VecF scale = broadcast(float(p.scale)), cap = broadcast(float(p.softcap));
  const VecF per_cap = broadcast(float(1 / p.softcap)), slope = broadcast(row.slope);
  for (int64_t i = 0; i < columns; i += kLanes) {
    VecF x = load(s + i);
    if (p.int8_cache) x = x * load(scale_k + i);
    const VecI at = key_numbers(key + i);
    if constexpr (Scaled) {
      x = x * scale;
      if (p.softcap > 0) x = cap * tanh(x * per_cap);
      if (p.slopes) {
        const VecF distance = broadcast(row.diagonal) - __builtin_convertvector(at, VecF);
        x = x - slope * max(distance, -distance);
      }
    }
    if (!sees_all) {
      x = ((at < int32_t(row.first)) | (at > int32_t(row.last))) ? hidden : x;
      if (row.tree)
        for (int l = 0; l < kLanes; ++l) {
          const int64_t number = key + i + l;
          if (row.tree_begin <= number && number <= row.last && !row.tree[(number - row.tree_begin) * p.tree_token])
            x[l] = -kInfinity<float>;
        }
    }
    most = max(most, x);
    store(s + i, x);
  }
  GK_UNROLL for (int width = kLanes / 2; width > 0; width /= 2) GK_UNROLL for (int l = 0; l < width; ++l) most[l] =
      most[l] > most[l + width] ? most[l] : most[l + width];
  return most[0];
}

// The keys of a step that a block of rows sees, in whole pieces of a product: [begin, begin + keys). A piece begins where
// it would without the window; a piece of hidden keys more or less is the same bits.
struct Seen {
  int64_t begin, keys;
};
template <class P>
GK_INLINE Seen keys_seen(const Row* rows, int64_t count, int64_t key, int64_t from, int64_t to) {
  int64_t least = to, most = from - 1;
  for (int64_t r = 0; r < count; ++r) {
    least = min_of(least, rows[r].first);
    most = max_of(most, rows[r].last);
  }
  const int64_t begin = least <= key ? key : key + (least - key) / kFoldKeys * kFoldKeys;
  const int64_t end = min_of(to, most + 1);
  return {begin, begin < end ? round_up(end - begin, kPieceKeys<P>) : 0};
}

// Scores of a row, in place, to probabilities, and those to words; the row's state. Returns what its output is scaled by.
template <class P, Exponential Kind>
GK_INLINE float finish_probabilities(const PagedAttentionParams& p, const Row& row, const Seen& seen,
                                     const float* k_scale, const float* v_scale, float* s, typename P::Word* words,
                                     State& state) {
  constexpr bool kScaled = Kind == Exponential::finest;
  const int64_t columns = round_up(seen.keys, kLanes);
  const VecF unit = broadcast(float((kScaled ? 1 : p.scale) * 1.4426950408889634));
  const float largest = finish_scores<kScaled>(p, row, seen.begin, columns, k_scale, s);
  const float most = state.max > largest ? state.max : largest;
  const float finite = most == -kInfinity<float> ? 0 : most;  // -inf - -inf is kept out
  const float alpha = probability_of<Kind>(broadcast(state.max - finite), unit)[0];
  state.max = most;
  VecF sum[kSumLanes / kLanes] = {};  // as many chains as of a score, one for each key modulo kSumLanes
  for (int64_t i = 0; i < columns; i += kLanes) {
    VecF x = probability_of<Kind>(load(s + i) - finite, unit);
    sum[i / kLanes % (kSumLanes / kLanes)] = sum[i / kLanes % (kSumLanes / kLanes)] + x;
    if (p.int8_cache) x = x == VecF{} ? x : x * load(v_scale + i);
    if constexpr (P::kPerWord == 1) {
      __builtin_memcpy(words + i, &x, sizeof x);
    } else {
#if GENAI_KERNELS_ISA_BF16
      const __m256i pairs = (__m256i)_mm512_cvtneps_pbh((__m512)x);
      __builtin_memcpy(words + i / 2, &pairs, sizeof pairs);
#endif
    }
  }
  for (int parts = kSumLanes / kLanes; parts > 1; parts /= 2)
    for (int part = 0; part < parts / 2; ++part) sum[part] = sum[part] + sum[part + parts / 2];
  state.sum = fma(broadcast(state.sum), broadcast(alpha), broadcast(horizontal_sum<float>(sum[0])))[0];
  return alpha;
}

GK_INLINE bool all_finite(const float* x, int64_t n) {
  VecF zeros[4] = {};  // as many as hide the latency of an addition
  const auto see = [&](int64_t i, int j) GK_LAMBDA_INLINE { zeros[j] = fma(load(x + i), VecF{}, zeros[j]); };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) GK_UNROLL for (int j = 0; j < 4; ++j) see(i + j * kLanes, j);
  for (; i < n; i += kLanes) see(i, 0);
  return horizontal_sum<float>((zeros[0] + zeros[1]) + (zeros[2] + zeros[3])) == 0;
}

// products = P V of a block's rows. True if all are finite, and V with them: what is not finite makes a product that is
// not, even times 0.
template <class P, class Values>
[[gnu::noinline]] bool multiply_values(const PagedAttentionParams& p, const PagedScratch<P>& scratch, int64_t count,
                                       int64_t words, int64_t words_at_a_time, const Values& values) {
  const int64_t stride = scratch.value_stride;
  for (int64_t i = 0; i < count * stride; ++i) scratch.products[i] = 0;
  for (int64_t w = 0; w < words; w += words_at_a_time) {
    for_row_blocks(count, [&](int64_t r, auto size) GK_LAMBDA_INLINE {
      add_products<P, decltype(size)::value>(scratch.p_words + r * kStepKeys, values, p.value_dim, w,
                                             min_of(words, w + words_at_a_time), r == 0, scratch.products + r * stride,
                                             stride);
    });
  }
  return all_finite(scratch.products, count * stride);
}

// The scores of a block's rows, from packed keys and from rows of K. Compiled once, not for each kind of exponential.
template <class P>
[[gnu::noinline]] void scores_of_packed(const PagedScratch<P>& scratch, const typename P::Word* q,
                                        const typename P::Word* k_t, int64_t count, int64_t keys) {
  for (int64_t i = 0; i < keys; i += kPackedKeys)
    for_row_blocks(count, [&](int64_t r, auto size) GK_LAMBDA_INLINE {
      scores_of_tile<P, decltype(size)::value>(q + r * scratch.q_stride, scratch.q_stride, k_t + i * scratch.q_words,
                                               scratch.q_words, scratch.s + r * kStepKeys + i);
    });
}
template <class P, class T>
[[gnu::noinline]] void scores_in_place(const PagedAttentionParams& p, const PagedScratch<P>& scratch,
                                       const typename P::Word* q, const char* const* k, int64_t count, int64_t keys) {
  const Ahead ahead(p.head_dim * int64_t(sizeof(T)));
  for (int64_t i = 0; i < keys; i += kLanes)
    for_row_blocks(count, [&](int64_t r, auto size) GK_LAMBDA_INLINE {
      scores_of_rows<P, T, decltype(size)::value>(q + r * scratch.q_stride, scratch.q_stride, k + i, p.head_dim, ahead,
                                                  r == 0, scratch.s + r * kStepKeys + i);
    });
}

// One step for the rows of a block. `packed`: K and V are in the scratch; else they are read where they lie.
template <class P, class T, Exponential Kind>
void attend(const PagedAttentionParams& p, PagedScratch<P>& scratch, const StepRows& step, int64_t block, int64_t count,
            int64_t key, int64_t from, int64_t to, bool packed) {
  const Row* rows = scratch.rows + block;
  const Seen seen = keys_seen<P>(rows, count, key, from, to);
  if (!seen.keys) return;
  const int64_t begin = seen.begin, first = begin - key;
  const typename P::Word* q = scratch.q + block * scratch.q_stride;
  if (packed)
    scores_of_packed<P>(scratch, q, scratch.k_t + first * scratch.q_words, count, seen.keys);
  else
    scores_in_place<P, T>(p, scratch, q, step.k() + first, count, seen.keys);
  float alpha[kBlockRows];
  for (int64_t r = 0; r < count; ++r)
    alpha[r] = finish_probabilities<P, Kind>(p, rows[r], seen, step.k_scale + first, step.v_scale + first,
                                             scratch.s + r * kStepKeys, scratch.p_words + r * kStepKeys,
                                             scratch.state[block + r]);
  const int64_t words = seen.keys / P::kPerWord, first_word = first / P::kPerWord * scratch.v.stride;
  bool finite;
  if (packed) {
    finite = multiply_values<P>(p, scratch, count, words, kPackedValues,
                                PackedValues<P>{scratch.v.packed + first_word, scratch.v.stride});
  } else {
    const char* const* v = step.v() + first;
    finite = multiply_values<P>(p, scratch, count, words, kPieceWords,
                                ValueRows<P, T>{v, p.value_dim, Ahead(p.value_dim * int64_t(sizeof(T)))});
  }
  if (!finite) {  // once more without what is not finite
    if (!packed) pack_values<P, T>(p, step, first + seen.keys, scratch);
    scratch.v.separate(false, (first + seen.keys) / P::kPerWord);
    multiply_values<P>(p, scratch, count, words, kPackedValues,
                       PackedValues<P>{scratch.v.finite + first_word, scratch.v.stride});
  }
  const int64_t stride = scratch.value_stride;
  float* o = scratch.o + block * stride;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t d = r * stride; d < (r + 1) * stride; d += kLanes)
      store(o + d, fma(load(o + d), broadcast(alpha[r]), load(scratch.products + d)));
  if (finite) return;
  for_each_nonfinite(scratch.v, first, first + seen.keys, p.value_dim, [&](int64_t i, int64_t d, float value) {
    const int64_t at = key + i;
    for (int64_t r = 0; r < count; ++r) {
      const Row& row = rows[r];
      const bool sees = row.first <= at && at <= row.last &&
                        !(row.tree && at >= row.tree_begin && !row.tree[(at - row.tree_begin) * p.tree_token]);
      const int64_t in_step = at - begin;
      if (sees)
        o[r * stride + d] +=
            Contracted<P>::part(scratch.p_words[r * kStepKeys + in_step / P::kPerWord], in_step % P::kPerWord) * value;
    }
  });
}

// ---- ranges, and the results ----

// total = total and state, of two disjoint sets of keys, the earlier ones in total.
template <Exponential Kind>
GK_INLINE void fold(double scale, State& total, float* total_o, const State& state, const float* o, int64_t dims) {
  if (state.sum == 0) return;
  if (total.sum == 0) {
    total = state;
    for (int64_t d = 0; d < dims; ++d) total_o[d] = o[d];
    return;
  }
  const float most = total.max > state.max ? total.max : state.max;
  const VecF unit = broadcast(float((Kind == Exponential::finest ? 1 : scale) * 1.4426950408889634));
  const VecF before = broadcast(probability_of<Kind>(broadcast(total.max - most), unit)[0]);
  const VecF now = broadcast(probability_of<Kind>(broadcast(state.max - most), unit)[0]);
  total.max = most;
  total.sum = fma(broadcast(total.sum), before, broadcast(state.sum) * now)[0];
  int64_t d = 0;
  for (; d + kLanes <= dims; d += kLanes) store(total_o + d, fma(load(total_o + d), before, load(o + d) * now));
  if (d < dims)
    store_first(total_o + d, fma(load_first(total_o + d, dims - d), before, load_first(o + d, dims - d) * now),
                dims - d);
}

template <class T>
void write_row(const PagedAttentionParams& p, int64_t token, int64_t head, const State& total, const float* o,
               bool scaled) {
  const float scale = float(scaled ? 1 : p.scale), top = total.max * scale;
  double exact_top = double(total.max) * (scaled ? 1 : p.scale);
  float sum = total.sum, beside_sink = 1;
  if (p.sink) {
    const float sink = p.sink[head], higher = top > sink ? top : sink;
    beside_sink = total.sum == 0 ? 0 : float(__builtin_exp(top - higher));
    sum = sum * beside_sink + float(__builtin_exp(sink - higher));
    if (total.sum == 0 || !(top > sink)) exact_top = sink;
  }
  if (p.lse)
    p.lse[head * p.lse_head + token] = sum == 0 ? -kInfinity<float> : float(exact_top + __builtin_log(double(sum)));
  const VecF by = broadcast(sum == 0 ? 0 : 1 / sum), divisor = broadcast(sum), factor = broadcast(beside_sink);
  T* to = reinterpret_cast<T*>(p.out) + token * p.out_token + head * p.out_head;
  for (int64_t d = 0; d < p.value_dim; d += kLanes) {
    const int64_t n = min_of<int64_t>(kLanes, p.value_dim - d);
    const VecF x = load_first(o + d, n), quotient = x * by;
    store_first(to + d, fma(fma(-quotient, divisor, x), by, quotient) * factor, n);  // a Newton step, as good as /
  }
}

template <class P, class T, class Cached>
void run_item(const PagedAttentionParams& p, const PagedItem& item, void* memory) {
  int64_t count = 0;
  for (int64_t i = 0; i < item.span_count; ++i) count += item.spans[i].row_end - item.spans[i].row_begin;
  PagedScratch<P> scratch(p, count, memory);
  set_rows<P, T>(p, item, scratch);
  const PagedSequence& sequence = p.sequences[item.spans[0].sequence];  // the others have the same pages here
  int64_t first = item.key_end, last = -1;
  for (int64_t r = 0; r < count; ++r) {
    first = min_of(first, scratch.rows[r].first);
    last = max_of(last, scratch.rows[r].last);
    scratch.total[r] = {-kInfinity<float>, 0};
    for (int64_t d = 0; d < scratch.value_stride; ++d) scratch.total_o[r * scratch.value_stride + d] = 0;
  }
  first = max_of(first, item.key_begin);
  last = min_of(last, item.key_end - 1);
  const bool scaled = scores_are_scaled(p);
  const auto run = scaled ? attend<P, Cached, Exponential::finest> : attend<P, Cached, Exponential::coarse>;
  const auto fold_range = scaled ? fold<Exponential::finest> : fold<Exponential::coarse>;
  const bool packed = count > kBlockRows;
  for (int64_t i = 0; i < scratch.zeros_bytes; ++i) scratch.zeros[i] = 0;
  StepRows rows[2];  // of the even and of the odd steps
  const int64_t first_step = first / kStepKeys * kStepKeys;
  find_rows(p, sequence.pages, item.kv_head, first_step, first, min_of<int64_t>(first_step + kStepKeys, last + 1),
            sizeof(Cached), scratch.zeros, rows[first_step / kStepKeys % 2]);
  for (int64_t range = first / kRangeKeys * kRangeKeys; range <= last; range += kRangeKeys) {
    for (int64_t r = 0; r < count; ++r) scratch.state[r] = {-kInfinity<float>, 0};
    for (int64_t i = 0; i < count * scratch.value_stride; ++i) scratch.o[i] = 0;
    const int64_t range_end = min_of(range + kRangeKeys, last + 1);
    for (int64_t key = range; key < range_end; key += kStepKeys) {
      const int64_t from = max_of(first, key), to = min_of<int64_t>(key + kStepKeys, last + 1);
      if (from >= to) continue;
      const int64_t after = key + kStepKeys;
      StepRows& next = rows[(key / kStepKeys + 1) % 2];
      find_rows(p, sequence.pages, item.kv_head, after, max_of(first, after),
                min_of<int64_t>(after + kStepKeys, last + 1), sizeof(Cached), scratch.zeros, next);
      StepRows& now = rows[key / kStepKeys % 2];
      __builtin_memcpy(now.next(), next.k(), kMostAhead * sizeof *next.k());
      if (packed) {
        pack_keys<P, Cached>(p, now, round_up(to - key, kPackedKeys), scratch);
        pack_values<P, Cached>(p, now, round_up(to - key, kPieceKeys<P>), scratch);
      }
      for (int64_t r = 0; r < count; r += kBlockRows)
        run(p, scratch, now, r, min_of(kBlockRows, count - r), key, from, to, packed);
    }
    if (item.partial) break;
    for (int64_t r = 0; r < count; ++r)
      fold_range(p.scale, scratch.total[r], scratch.total_o + r * scratch.value_stride, scratch.state[r],
                 scratch.o + r * scratch.value_stride, p.value_dim);
  }
  int64_t r = 0;
  for (int64_t i = 0; i < item.span_count; ++i) {
    const RowSpan span = item.spans[i];
    const PagedSequence& s = p.sequences[span.sequence];
    for (int64_t row = span.row_begin; row < span.row_end; ++row, ++r) {
      const Row& at = scratch.rows[r];
      if (!item.partial) {
        write_row<T>(p, s.query_begin + at.query, at.head, scratch.total[r], scratch.total_o + r * scratch.value_stride,
                     scaled);
        continue;
      }
      float* to = partial_of(p, s, at.query, at.head, item.key_begin / kRangeKeys - s.first_key / kRangeKeys);
      for (int64_t d = 0; d < p.value_dim; ++d) to[d] = scratch.o[r * scratch.value_stride + d];
      to[p.value_dim] = scratch.state[r].max;
      to[p.value_dim + 1] = scratch.state[r].sum;
    }
  }
}

// f(product, dtype of q, dtype of the cache)
template <class F>
GK_INLINE void with_types(const PagedAttentionParams& p, F&& f) {
  const auto with_cache = [&](auto product, auto type) {
    if (p.int8_cache)
      f(product, type, TypeTag<int8_t>{});
    else
      f(product, type, type);
  };
#if GENAI_KERNELS_ISA_BF16
  if (p.dtype == Dtype::bf16) return with_cache(TypeTag<DotBf16>{}, TypeTag<bf16>{});
#endif
  if (p.dtype == Dtype::f32) return with_cache(TypeTag<Fma<float>>{}, TypeTag<float>{});
  if (p.dtype == Dtype::bf16) return with_cache(TypeTag<Fma<float>>{}, TypeTag<bf16>{});
  with_cache(TypeTag<Fma<float>>{}, TypeTag<fp16>{});
}

}  // namespace

int64_t paged_attention_scratch(const PagedAttentionParams& p, int64_t rows) {
  int64_t bytes = 0;
  with_types(p, [&](auto product, auto, auto) {
    bytes = PagedScratch<typename decltype(product)::type>(p, rows, nullptr).end - static_cast<char*>(nullptr);
  });
  return bytes;
}

void paged_attention_kernel(const PagedAttentionParams& p, const PagedItem& item, void* scratch) {
  with_types(p, [&](auto product, auto type, auto cached) {
    run_item<typename decltype(product)::type, typename decltype(type)::type, typename decltype(cached)::type>(p, item,
                                                                                                               scratch);
  });
}

void paged_attention_fold_kernel(const PagedAttentionParams& p, int64_t sequence, int64_t head, void* scratch) {
  const PagedSequence& s = p.sequences[sequence];
  float* o = static_cast<float*>(scratch);
  const bool scaled = scores_are_scaled(p);
  const auto fold_range = scaled ? fold<Exponential::finest> : fold<Exponential::coarse>;
  for (int64_t query = 0; query < s.queries; ++query) {
    State total = {-kInfinity<float>, 0};
    for (int64_t d = 0; d < p.value_dim; ++d) o[d] = 0;
    for (int64_t range = 0; range < s.ranges(); ++range) {
      const float* partial = partial_of(p, s, query, head, range);
      fold_range(p.scale, total, o, {partial[p.value_dim], partial[p.value_dim + 1]}, partial, p.value_dim);
    }
    switch_dtype(p.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if constexpr (sizeof(T) < 8) write_row<T>(p, s.query_begin + query, head, total, o, scaled);
    });
  }
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(int64_t, paged_attention_scratch, (const PagedAttentionParams& p, int64_t rows), (p, rows))
GENAI_KERNELS_ISA_DISPATCH(void, paged_attention_kernel,
                           (const PagedAttentionParams& p, const PagedItem& item, void* scratch), (p, item, scratch))
GENAI_KERNELS_ISA_DISPATCH(void, paged_attention_fold_kernel,
                           (const PagedAttentionParams& p, int64_t sequence, int64_t head, void* scratch),
                           (p, sequence, head, scratch))

#endif
