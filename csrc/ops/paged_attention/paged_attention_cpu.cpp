// Attention over pages on the CPU, the keys in the SIMD lanes (README.md of genai_kernels/ops/paged_attention).
//
// An item goes over its keys in steps of kStepKeys. K of a step is transposed once and V laid out once for all rows of the
// item; then for a few rows at a time, with the one product of tile_gemm.h,
//
//     S[row][key]  = Q K^T             A = Q as it lies, B = K^T
//     P            = exp(S - max)
//     O[row][dim]  = alpha O + P V     A = P, B = V
//
// Every element is made by the same chain of operations in the same order, whatever rows, keys and pages it is computed
// together with. flash_attention does the transposed products, for many rows; here the sums are cut into shorter pieces,
// as PyTorch's product of one row with a matrix does.
#include "cpu/region_headers.h"
#include "ops/paged_attention/paged_attention.h"

#define GENAI_KERNELS_ISA_FILE "ops/paged_attention/paged_attention_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/exp.h"
#include "cpu/tanh.h"
#include "cpu/tile_gemm.h"
#include "cpu/transpose.h"
#include "cpu/attention_pack.h"
#include "ops/paged_attention/item.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// ---- one step for a few rows ----

// True if the scores are scaled before their maximum is taken, and not within the exponent: where there is more to do
// with them than to scale, and in float32, whose results show the rounding of an exponent's factor.
GK_INLINE bool scores_are_scaled(const PagedAttentionParams& p) {
  return p.dtype == Dtype::f32 || p.softcap > 0 || p.slopes || !(p.scale > 0);
}

// out[Rows][vectors] = A B in whole products of registers.
template <class P, int Rows, class Store>
GK_INLINE void multiply_rows(const typename P::Word* a, int64_t a_stride, const typename P::Word* b, int64_t b_stride,
                             int64_t depth, int64_t columns, Store&& store_product) {
  constexpr int kVectors = kProductVectors<Rows>;
  for (int64_t j = 0; j < columns; j += kVectors * kLanes) {
    VecF c[Rows][kVectors];
    multiply_folded<P, kPieceWords>(c, a, a_stride, 1, b + j, b_stride, depth);
    GK_UNROLL for (int r = 0; r < Rows; ++r) GK_UNROLL for (int v = 0; v < kVectors; ++v)
        store_product(r, j + v * kLanes, c[r][v]);
  }
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
  float largest = most[0];
  for (int l = 1; l < kLanes; ++l) largest = largest > most[l] ? largest : most[l];
  return largest;
}

template <class P, Exponential Kind, int Rows>
void attend_rows(const PagedAttentionParams& p, const PagedScratch<P>& scratch, const StepRows& step, int64_t block,
                 int64_t key, int64_t begin, int64_t keys) {
  constexpr bool kScaled = Kind == Exponential::finest;
  const int64_t columns = round_up(keys, kProductVectors<Rows> * kLanes);
  const Row* rows = scratch.rows + block;
  multiply_rows<P, Rows>(scratch.q + block * scratch.q_stride, scratch.q_stride, scratch.k_t + (begin - key), kStepKeys,
                         scratch.q_words, columns,
                         [&](int r, int64_t i, VecF x) GK_LAMBDA_INLINE { store(scratch.s + r * kStepKeys + i, x); });
  const VecF unit = broadcast(float((kScaled ? 1 : p.scale) * 1.4426950408889634));
  float alpha[Rows];
  for (int r = 0; r < Rows; ++r) {
    float* s = scratch.s + r * kStepKeys;
    State& state = scratch.state[block + r];
    const float largest = finish_scores<kScaled>(p, rows[r], begin, columns, step.k_scale + (begin - key), s);
    const float most = state.max > largest ? state.max : largest;
    const float finite = most == -kInfinity<float> ? 0 : most;  // -inf - -inf is kept out
    alpha[r] = probability_of<Kind>(broadcast(state.max - finite), unit)[0];
    state.max = most;
    for (int64_t i = 0; i < columns; i += kLanes) store(s + i, probability_of<Kind>(load(s + i) - finite, unit));
  }
  // the four chains of flash_attention's sums, keys 4 i + c each, are the lanes of a quad here
  Quad sum[Rows] = {};
  for (int64_t i = 0; i < keys; i += 4) GK_UNROLL for (int r = 0; r < Rows; ++r) {
      Quad x;
      __builtin_memcpy(&x, scratch.s + r * kStepKeys + i, sizeof x);
      sum[r] = sum[r] + x;
    }
  for (int r = 0; r < Rows; ++r) {
    State& state = scratch.state[block + r];
    state.sum =
        fma(broadcast(state.sum), broadcast(alpha[r]), broadcast((sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3])))[0];
    const float* s = scratch.s + r * kStepKeys;
    for (int64_t i = 0; i < keys; i += kLanes) {
      VecF x = load(s + i);
      if (p.int8_cache) x = x == VecF{} ? x : x * load(step.v_scale + (begin - key) + i);
      if constexpr (P::kPerWord == 1) {
        __builtin_memcpy(scratch.p_words + r * kStepKeys + i, &x, sizeof x);
      } else {
#if GENAI_KERNELS_ISA_BF16
        const __m256i pairs = (__m256i)_mm512_cvtneps_pbh((__m512)x);
        __builtin_memcpy(scratch.p_words + r * kStepKeys + i / 2, &pairs, sizeof pairs);
#endif
      }
    }
  }
  const int64_t first = (begin - key) / P::kPerWord;
  float* o = scratch.o + block * scratch.value_stride;
  multiply_rows<P, Rows>(scratch.p_words, kStepKeys, scratch.v.finite + first * scratch.v.stride, scratch.v.stride,
                         keys / P::kPerWord, round_up(p.value_dim, kProductVectors<Rows> * kLanes),
                         [&](int r, int64_t d, VecF x) GK_LAMBDA_INLINE {
                           float* to = o + r * scratch.value_stride + d;
                           store(to, fma(load(to), broadcast(alpha[r]), x));
                         });
  for_each_nonfinite(scratch.v, begin - key, begin - key + keys, p.value_dim, [&](int64_t i, int64_t d, float value) {
    const int64_t at = key + i;
    for (int r = 0; r < Rows; ++r) {
      const Row& row = rows[r];
      const bool seen = row.first <= at && at <= row.last &&
                        !(row.tree && at >= row.tree_begin && !row.tree[(at - row.tree_begin) * p.tree_token]);
      const int64_t in_step = at - begin;
      if (seen)
        o[r * scratch.value_stride + d] +=
            Contracted<P>::part(scratch.p_words[r * kStepKeys + in_step / P::kPerWord], in_step % P::kPerWord) * value;
    }
  });
}

// All rows of an item over one step.
template <class P, Exponential Kind>
void attend(const PagedAttentionParams& p, const PagedScratch<P>& scratch, const StepRows& step, int64_t rows,
            int64_t key, int64_t from, int64_t to) {
  int64_t r = 0;
  const auto run = [&](auto size) {
    constexpr int kRows = decltype(size)::value;
    for (; r + kRows <= rows; r += kRows) {
      int64_t least = to, most = from - 1;
      for (int i = 0; i < kRows; ++i) {
        least = min_of(least, scratch.rows[r + i].first);
        most = max_of(most, scratch.rows[r + i].last);
      }
      // A piece of multiply_folded begins where it would without the window; one product more or less is the same bits.
      const int64_t begin = least <= key ? key : key + (least - key) / kFoldKeys * kFoldKeys;
      const int64_t end = min_of(to, most + 1);
      if (begin < end) attend_rows<P, Kind, kRows>(p, scratch, step, r, key, begin, round_up(end - begin, kKeyGroup));
    }
  };
  if constexpr (kBlockRows == 4) run(IntTag<4>{});
  run(IntTag<2>{});
  run(IntTag<1>{});
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
  const auto run = scaled ? attend<P, Exponential::finest> : attend<P, Exponential::coarse>;
  const auto fold_range = scaled ? fold<Exponential::finest> : fold<Exponential::coarse>;
  StepRows rows[2];  // of the even and of the odd steps
  const int64_t first_step = first / kStepKeys * kStepKeys;
  find_rows(p, sequence.pages, item.kv_head, first_step, first, min_of<int64_t>(first_step + kStepKeys, last + 1),
            sizeof(Cached), rows[first_step / kStepKeys % 2]);
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
                min_of<int64_t>(after + kStepKeys, last + 1), sizeof(Cached), next);
      const StepRows& now = rows[key / kStepKeys % 2];
      pack_keys<P, Cached>(p, now, next, round_up(to - key, kWidestProduct), scratch);
      scratch.v.separate(pack_values<P, Cached>(p, now, next, to - key, scratch),
                         round_up(to - key, kKeyGroup) / P::kPerWord);
      run(p, scratch, now, count, key, from, to);
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
