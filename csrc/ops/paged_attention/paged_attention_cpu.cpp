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

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

constexpr int kStepKeys = 128;                    // as flash_attention's: the sums of a row are grouped by them
constexpr int kFoldKeys = 64;                     // whole pieces of multiply_folded, whatever a word holds
constexpr int kStepVectors = kStepKeys / kLanes;  // registers of scores of a row
constexpr int kBlockRows = kTileRows;             // rows multiplied together
// Registers of a product with so many rows: enough chains to hide the latency of the multiply-add, and no more
// accumulators than there are registers.
template <int Rows>
constexpr int kProductVectors = Rows >= 4 ? 2 : Rows == 2 ? (kTileRows == 2 ? 2 : 4) : 4;
constexpr int kWidestProduct = 4 * kLanes;

template <int N>
struct IntTag {
  static constexpr int value = N;
};

typedef float Quad __attribute__((vector_size(16)));

struct Row {
  const char* q;
  int64_t first, last;  // visible keys, inclusive
  const bool* tree;     // of key `tree_begin` and those after it; or null
  int64_t tree_begin;
  float slope, diagonal;
  int64_t query, head;  // of its sequence
};

// The softmax of a row over some keys.
struct State {
  float max, sum;
};

template <class P>
struct PagedScratch {
  using Word = typename P::Word;
  int64_t q_words, q_stride, value_stride;
  Row* rows;
  State *state, *total;
  Word *q, *k_t, *p_words;
  float *o, *total_o, *s, *scale_k, *scale_v;
  Arena arena;
  Contracted<P> v;
  char* end;

  PagedScratch(const PagedAttentionParams& p, int64_t count, void* memory)
      : value_stride(row_stride<float>(round_up(p.value_dim, kWidestProduct))),
        arena(memory),
        v(arena, kStepKeys / P::kPerWord, value_stride) {
    q_words = (p.head_dim + P::kPerWord - 1) / P::kPerWord;
    q_stride = row_stride<float>(q_words);
    rows = arena.take<Row>(count);
    state = arena.take<State>(count);
    total = arena.take<State>(count);
    q = arena.take<Word>(count * q_stride);
    k_t = arena.take<Word>(round_up(q_words, kLanes) * kStepKeys);
    p_words = arena.take<Word>(kBlockRows * kStepKeys);
    s = arena.take<float>(kBlockRows * kStepKeys);
    scale_k = arena.take<float>(kStepKeys);
    scale_v = arena.take<float>(kStepKeys);
    o = arena.take<float>(count * value_stride);
    total_o = arena.take<float>(count * value_stride);
    end = arena.end();
  }
};

// ---- what a row sees ----

template <class P, class T>
int64_t set_rows(const PagedAttentionParams& p, const PagedItem& item, PagedScratch<P>& scratch) {
  int64_t count = 0;
  for (int64_t i = 0; i < item.span_count; ++i) {
    const RowSpan span = item.spans[i];
    const PagedSequence& s = p.sequences[span.sequence];
    for (int64_t r = span.row_begin; r < span.row_end; ++r, ++count) {
      Row& row = scratch.rows[count];
      row.query = r / p.group;
      row.head = item.kv_head * p.group + r % p.group;
      const int64_t token = s.query_begin + row.query, diagonal = s.keys - s.queries + row.query;
      row.q = p.q + (token * p.q_token + row.head * p.q_head) * int64_t(sizeof(T));
      row.first = p.left < 0 ? 0 : max_of<int64_t>(0, diagonal - p.left);
      row.last = p.right < 0 ? s.keys - 1 : min_of(s.keys - 1, diagonal + p.right);
      row.tree = p.tree ? p.tree + token * p.tree_query : nullptr;
      row.tree_begin = s.keys - s.queries;
      row.slope = p.slopes ? p.slopes[span.sequence * p.slopes_sequence + row.head] : 0;
      row.diagonal = float(diagonal);
      const T* q = reinterpret_cast<const T*>(row.q);
      T stage[kLanes * P::kPerWord];
      for (int64_t w = 0; w < scratch.q_words; w += kLanes) {
        const int64_t from = w * P::kPerWord, n = min_of<int64_t>(kLanes * P::kPerWord, p.head_dim - from);
        const T* part = contiguous(q + from * p.q_dim, p.q_dim, n, stage);
        const Vec<float> words = load_row_words<P>(part, 0, n);
        __builtin_memcpy(scratch.q + count * scratch.q_stride + w, &words, sizeof words);
      }
    }
  }
  return count;
}

// ---- packing ----

// Rows of K or V in the dtype of q, or int8.
template <class T>
GK_INLINE const T* key_row(const PagesView& view, const int32_t* pages, int64_t page_size, int64_t key, int64_t head) {
  const int64_t page = key / page_size, token = key - page * page_size;
  return reinterpret_cast<const T*>(view.data) + pages[page] * view.page + token * view.token + head * view.head;
}

GK_INLINE VecF int8_to_float(const int8_t* from, int64_t n) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes = {};
  __builtin_memcpy(&bytes, from, n < kLanes ? n : kLanes);
  return __builtin_convertvector(__builtin_convertvector(bytes, VecI), VecF);
}

// One register of words from element `word * kPerWord` of a row of n.
template <class P, class T>
GK_INLINE VecF row_words(const T* row, int64_t word, int64_t n) {
  if constexpr (sizeof(T) > 1) {
    return load_row_words<P>(row, word, n);
  } else if constexpr (P::kPerWord == 1) {
    return int8_to_float(row + word, n - word);
  } else {  // an int8 is a bf16 exactly
    VecF words = {};
#if GENAI_KERNELS_ISA_BF16
    alignas(64) int8_t bytes[2 * kLanes] = {};
    const int64_t left = n - 2 * word;
    __builtin_memcpy(bytes, row + 2 * word, left < 2 * kLanes ? left : 2 * kLanes);
    const VecF low = int8_to_float(bytes, kLanes), high = int8_to_float(bytes + kLanes, kLanes);
    words = (VecF)(__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#endif
    return words;
  }
}
template <class T>
GK_INLINE VecF row_values(const T* row, int64_t i, int64_t n) {
  if constexpr (sizeof(T) > 1)
    return load_at(row, i, n);
  else
    return int8_to_float(row + i, n - i);
}

// k_t[words][kStepKeys] = K^T of keys [from, to) of the step at `key`, zeros for the other keys up to `padded`.
template <class P, class T>
void pack_keys(const PagedAttentionParams& p, const int32_t* pages, int64_t kv_head, int64_t key, int64_t from,
               int64_t to, int64_t padded, const PagedScratch<P>& scratch) {
  for (int64_t i = 0; i < padded; i += kLanes) {
    const T* lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t at = key + i + l;
      lanes[l] = from <= at && at < to ? key_row<T>(p.k, pages, p.page_size, at, kv_head) : nullptr;
    }
    for (int64_t w = 0; w < scratch.q_words; w += kLanes) {
      VecF x[kLanes];
      for (int l = 0; l < kLanes; ++l) x[l] = lanes[l] ? row_words<P>(lanes[l], w, p.head_dim) : VecF{};
      transpose(x);
      GK_UNROLL for (int l = 0; l < kLanes; ++l)  // rows past q_words lie in the rounding of k_t
          __builtin_memcpy(scratch.k_t + (w + l) * kStepKeys + i, &x[l], sizeof x[l]);
    }
  }
}

// V of the same keys, from the step's first one on: [key words][value_stride].
template <class P, class T>
bool pack_values(const PagedAttentionParams& p, const int32_t* pages, int64_t kv_head, int64_t key, int64_t from,
                 int64_t to, const PagedScratch<P>& scratch) {
  Finiteness<float> finite;
  const auto row_of = [&](int64_t at) {
    return from <= at && at < to ? key_row<T>(p.v, pages, p.page_size, at, kv_head) : nullptr;
  };
  typename P::Word* out = scratch.v.packed;
  for (int64_t at = key; at < key + round_up(to - key, kKeyGroup); at += P::kPerWord, out += scratch.v.stride) {
    const T *row = row_of(at), *next = P::kPerWord == 2 ? row_of(at + 1) : nullptr;
    for (int64_t d = 0; d < scratch.value_stride; d += kLanes) {
      const VecF x = row && d < p.value_dim ? row_values(row, d, p.value_dim) : VecF{};
      finite.see(x);
      if constexpr (P::kPerWord == 1) {
        __builtin_memcpy(out + d, &x, sizeof x);
      } else {
        const VecF y = next && d < p.value_dim ? row_values(next, d, p.value_dim) : VecF{};
        finite.see(y);
        const VecU words = (bit_cast<VecU>(x) >> 16) | (bit_cast<VecU>(y) & 0xffff0000);  // exact: they are bf16
        __builtin_memcpy(out + d, &words, sizeof words);
      }
    }
  }
  return finite.all_finite();
}

void pack_scales(const PagedAttentionParams& p, const PagesView& view, const int32_t* pages, int64_t kv_head,
                 int64_t key, int64_t from, int64_t to, float* out) {
  for (int64_t i = 0; i < kStepKeys; ++i) {
    const int64_t at = key + i, page = at / p.page_size, token = at - page * p.page_size;
    out[i] = from <= at && at < to
                 ? view.scale[pages[page] * view.scale_page + token * view.scale_token + kv_head * view.scale_head]
                 : 0;
  }
}

template <class T>
GK_INLINE void prefetch_key(const PagesView& view, const int32_t* pages, int64_t page_size, int64_t key, int64_t head,
                            int64_t dim) {
  const T* row = key_row<T>(view, pages, page_size, key, head);
  for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d, 0, 2);
}

// ---- one step for a few rows ----

// out[Rows][vectors] = A B in whole products of registers.
template <class P, int Rows, class Store>
GK_INLINE void multiply_rows(const typename P::Word* a, int64_t a_stride, const typename P::Word* b, int64_t b_stride,
                             int64_t depth, int64_t columns, Store&& store_product) {
  constexpr int kVectors = kProductVectors<Rows>;
  for (int64_t j = 0; j < columns; j += kVectors * kLanes) {
    VecF c[Rows][kVectors];
    multiply_folded<P>(c, a, a_stride, 1, b + j, b_stride, depth);
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
template <bool Modified>
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
    if constexpr (Modified) {
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
void attend_rows(const PagedAttentionParams& p, const PagedScratch<P>& scratch, int64_t block, int64_t key,
                 int64_t begin, int64_t keys) {
  constexpr bool kModified = Kind == Exponential::finest;
  const int64_t columns = round_up(keys, kProductVectors<Rows> * kLanes);
  const Row* rows = scratch.rows + block;
  multiply_rows<P, Rows>(
      scratch.q + block * scratch.q_stride, scratch.q_stride, scratch.k_t + (begin - key), kStepKeys, scratch.q_words,
      columns, [&](int r, int64_t i, VecF x) GK_LAMBDA_INLINE { store(scratch.s + r * kStepKeys + i, x); });
  const VecF unit = broadcast(float((kModified ? 1 : p.scale) * 1.4426950408889634));
  float alpha[Rows];
  for (int r = 0; r < Rows; ++r) {
    float* s = scratch.s + r * kStepKeys;
    State& state = scratch.state[block + r];
    const float largest = finish_scores<kModified>(p, rows[r], begin, columns, scratch.scale_k + (begin - key), s);
    const float most = state.max > largest ? state.max : largest;
    const float finite = most == -kInfinity<float> ? 0 : most;  // -inf - -inf is kept out
    alpha[r] = probability_of<Kind>(broadcast(state.max - finite), unit)[0];
    state.max = most;
    for (int64_t i = 0; i < columns; i += kLanes) store(s + i, probability_of<Kind>(load(s + i) - finite, unit));
  }
  // the four chains of flash_attention's sums, keys 4 i + c each, are the lanes of a quad here
  Quad sum[Rows] = {};
  for (int64_t i = 0; i < keys; i += 4)
    GK_UNROLL for (int r = 0; r < Rows; ++r) {
      Quad x;
      __builtin_memcpy(&x, scratch.s + r * kStepKeys + i, sizeof x);
      sum[r] = sum[r] + x;
    }
  for (int r = 0; r < Rows; ++r) {
    State& state = scratch.state[block + r];
    state.sum = fma(broadcast(state.sum), broadcast(alpha[r]),
                    broadcast((sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3])))[0];
    const float* s = scratch.s + r * kStepKeys;
    for (int64_t i = 0; i < keys; i += kLanes) {
      VecF x = load(s + i);
      if (p.int8_cache) x = x == VecF{} ? x : x * load(scratch.scale_v + (begin - key) + i);
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
  multiply_rows<P, Rows>(
      scratch.p_words, kStepKeys, scratch.v.finite + first * scratch.v.stride, scratch.v.stride, keys / P::kPerWord,
      round_up(p.value_dim, kProductVectors<Rows> * kLanes), [&](int r, int64_t d, VecF x) GK_LAMBDA_INLINE {
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
void attend(const PagedAttentionParams& p, const PagedScratch<P>& scratch, int64_t rows, int64_t key, int64_t from,
            int64_t to) {
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
      if (begin < end) attend_rows<P, Kind, kRows>(p, scratch, r, key, begin, round_up(end - begin, kKeyGroup));
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
               bool modified) {
  const float scale = float(modified ? 1 : p.scale), top = total.max * scale;
  double exact_top = double(total.max) * (modified ? 1 : p.scale);
  float sum = total.sum, beside_sink = 1;
  if (p.sink) {
    const float sink = p.sink[head], higher = top > sink ? top : sink;
    beside_sink = total.sum == 0 ? 0 : float(__builtin_exp(top - higher));
    sum = sum * beside_sink + float(__builtin_exp(sink - higher));
    if (total.sum == 0 || !(top > sink)) exact_top = sink;
  }
  if (p.lse) p.lse[head * p.lse_head + token] = sum == 0 ? -kInfinity<float> : float(exact_top + __builtin_log(double(sum)));
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
  const bool modified = p.softcap > 0 || p.slopes || p.tree || !(p.scale > 0);
  const bool narrow = p.dtype != Dtype::f32;
  const auto run = modified ? attend<P, Exponential::finest>
                   : narrow ? attend<P, Exponential::coarse>
                            : attend<P, Exponential::fine>;
  const auto fold_range = modified ? fold<Exponential::finest>
                          : narrow ? fold<Exponential::coarse>
                                   : fold<Exponential::fine>;
  for (int64_t range = first / kRangeKeys * kRangeKeys; range <= last; range += kRangeKeys) {
    for (int64_t r = 0; r < count; ++r) scratch.state[r] = {-kInfinity<float>, 0};
    for (int64_t i = 0; i < count * scratch.value_stride; ++i) scratch.o[i] = 0;
    const int64_t range_end = min_of(range + kRangeKeys, last + 1);
    for (int64_t key = range; key < range_end; key += kStepKeys) {
      const int64_t from = max_of(first, key), to = min_of<int64_t>(key + kStepKeys, last + 1);
      if (from >= to) continue;
      for (int64_t ahead = to; ahead < min_of<int64_t>(to + kStepKeys, last + 1); ++ahead) {
        prefetch_key<Cached>(p.k, sequence.pages, p.page_size, ahead, item.kv_head, p.head_dim);
        prefetch_key<Cached>(p.v, sequence.pages, p.page_size, ahead, item.kv_head, p.value_dim);
      }
      pack_keys<P, Cached>(p, sequence.pages, item.kv_head, key, from, to, round_up(to - key, kWidestProduct), scratch);
      scratch.v.separate(pack_values<P, Cached>(p, sequence.pages, item.kv_head, key, from, to, scratch),
                         round_up(to - key, kKeyGroup) / P::kPerWord);
      if (p.int8_cache) {
        pack_scales(p, p.k, sequence.pages, item.kv_head, key, from, to, scratch.scale_k);
        pack_scales(p, p.v, sequence.pages, item.kv_head, key, from, to, scratch.scale_v);
      }
      run(p, scratch, count, key, from, to);
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
                     modified);
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
  const bool modified = p.softcap > 0 || p.slopes || p.tree || !(p.scale > 0);
  const auto fold_range = modified                ? fold<Exponential::finest>
                          : p.dtype != Dtype::f32 ? fold<Exponential::coarse>
                                                  : fold<Exponential::fine>;
  for (int64_t query = 0; query < s.queries; ++query) {
    State total = {-kInfinity<float>, 0};
    for (int64_t d = 0; d < p.value_dim; ++d) o[d] = 0;
    for (int64_t range = 0; range < s.ranges(); ++range) {
      const float* partial = partial_of(p, s, query, head, range);
      fold_range(p.scale, total, o, {partial[p.value_dim], partial[p.value_dim + 1]}, partial, p.value_dim);
    }
    switch_dtype(p.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if constexpr (sizeof(T) < 8) write_row<T>(p, s.query_begin + query, head, total, o, modified);
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
