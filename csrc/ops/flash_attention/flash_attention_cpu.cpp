// Flash attention forward on the CPU, the queries in the SIMD lanes (README.md in this folder derives it).
//
// One call handles a block of rows of one sequence and key head. It goes over the keys in steps of kTileKeys: K and V of
// the step are packed once for all tiles of the block; then for each tile of kTileQueries rows, with the one product of
// tile_gemm.h,
//
//     S^T[key][query]  = K Q^T       A = K as it lies, B = Q^T (transposed once per block)
//     P^T              = exp(S^T - max), in place; the running maximum and sum are lane vectors
//     O^T[dim][query]  = alpha O^T + V^T P^T       A = V as it lies, B = P^T
#include "cpu/region_headers.h"
#include "ops/flash_attention/flash_attention.h"

#define GENAI_KERNELS_ISA_FILE "ops/flash_attention/flash_attention_cpu.cpp"
#define GENAI_KERNELS_ISA_DOT_BF16
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/exp.h"
#include "cpu/tanh.h"
#include "cpu/tile_gemm.h"
#include "cpu/transpose.h"
#include "cpu/attention_pack.h"
#include "ops/flash_attention/tile.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// What a tile of queries carries from one step over the keys to the next.
template <class P>
struct TileState {
  using C = typename P::Compute;
  TileRows<C> rows;
  Vec<C> max[kTileVectors], sum[kTileVectors];  // of the scores so far (raw products, or modified scores)
  typename P::Word* q_t;                        // [words of head_dim][kTileQueries]
  C* o_t;                                       // [value_dim in whole panels][kTileQueries]
};

template <class P>
struct ForwardScratch {
  using C = typename P::Compute;
  using Word = typename P::Word;
  Arena arena;
  int64_t q_words, k_stride, value_rows, tiles;
  TileState<P>* state;
  Word* k;
  Contracted<P> v;
  C *s, *extra;
  void* stage;
  char* end;

  ForwardScratch(const FlashAttentionParams& p, void* memory)
      : arena(memory), v(arena, kTileKeys / P::kPerWord, row_stride<C>(p.value_dim)) {
    q_words = (p.head_dim + P::kPerWord - 1) / P::kPerWord;
    k_stride = row_stride<C>(q_words);
    value_rows = round_up(p.value_dim, kTileRows);
    tiles = (p.block_rows + kTileQueries<C> - 1) / kTileQueries<C>;
    state = arena.take<TileState<P>>(tiles);
    k = arena.take<Word>(kTileKeys * k_stride);
    s = arena.take<C>(kTileKeys * kTileQueries<C>);
    extra = arena.take<C>(p.bias.data || p.mask.data ? kTileKeys * kTileQueries<C> : 0);
    stage = arena.take<double>(kLanes * max_of(p.head_dim, p.value_dim));
    Word* q_t = arena.take<Word>(tiles * q_words * kTileQueries<C>);
    C* o_t = arena.take<C>(tiles * value_rows * kTileQueries<C>);
    end = arena.end();
    if (memory)
      for (int64_t t = 0; t < tiles; ++t) {
        state[t].q_t = q_t + t * q_words * kTileQueries<C>;
        state[t].o_t = o_t + t * value_rows * kTileQueries<C>;
      }
  }
};

// Probabilities of one step, in place: s[keys][lanes] to words [keys / kPerWord][lanes]. alpha is the factor for what was
// summed under the old maximum; `unit` takes s to exponents of 2 (of e for finest). The maximum is subtracted before: the largest
// probability is exactly 1, and scores as large as floats get do not overflow.
template <class P, Exponential Kind>
[[gnu::noinline]] void softmax_step(typename P::Compute* s, int64_t keys, typename P::Compute unit,
                                    const Vec<typename P::Compute>* tile_max, TileState<P>& state,
                                    Vec<typename P::Compute>* alpha) {
  using C = typename P::Compute;
  constexpr int kStep = kLanesOf<C>, kSize = kTileQueries<C>;
  const Vec<C> by = broadcast(unit);
  const auto exponential = [&](Vec<C> x) GK_LAMBDA_INLINE { return probability_of<Kind>(x, by); };
  Vec<C> most[kTileVectors], offset[kTileVectors], sum[4][kTileVectors];  // four chains: half the error of one
  for (int j = 0; j < kTileVectors; ++j) {
    most[j] = max(state.max[j], tile_max[j]);
    // where no key was seen yet the maximum is -inf; 0 in its place keeps -inf - -inf out
    const Vec<C> finite = most[j] == broadcast(-kInfinity<C>) ? Vec<C>{} : most[j];
    alpha[j] = exponential(state.max[j] - finite);
    offset[j] = finite;
    for (auto& chain : sum) chain[j] = Vec<C>{};
    state.max[j] = most[j];
  }
  for (int64_t i = 0; i < keys; i += 4)
    GK_UNROLL for (int j = 0; j < kTileVectors; ++j) GK_UNROLL for (int half = 0; half < 4; half += 2) {
      Vec<C> probability[2];
      GK_UNROLL for (int h = 0; h < 2; ++h) {
        const Vec<C> x = load(s + (i + half + h) * kSize + j * kStep);
        probability[h] = exponential(x - offset[j]);
        sum[half + h][j] = sum[half + h][j] + probability[h];
      }
      P::store_pair(s + (i + half) / P::kPerWord * kSize + j * kStep, kSize, probability);  // behind the reads
    }
  for (int j = 0; j < kTileVectors; ++j)
    state.sum[j] = fma(state.sum[j], alpha[j], (sum[0][j] + sum[1][j]) + (sum[2][j] + sum[3][j]));
}

// Dropout of one step: P^T times 0 or 1 / (1 - p), after the sums were taken.
template <class P>
void drop_step(const FlashAttentionParams& p, int64_t batch, const TileRows<typename P::Compute>& rows, int64_t key,
               int64_t keys, typename P::Compute* s) {
  using C = typename P::Compute;
  constexpr int kSize = kTileQueries<C>;
  alignas(64) C factor[4][kSize];
  for (int64_t i = 0; i < keys; i += 4) {
    dropout_factors(p, batch, rows, key + i, factor);
    for (int k = 0; k < 4; ++k)
      for (int lane = 0; lane < kSize; ++lane) s[(i + k) * kSize + lane] *= factor[k][lane];
  }
}

// o_t[kTileRows dims] = alpha o_t + V^T P^T for one panel of dims.
template <class P, bool Folded>
[[gnu::noinline]] void output_panel(const typename P::Word* v, int64_t v_stride, const typename P::Word* p_t,
                                    int64_t depth, const Vec<typename P::Compute>* alpha, typename P::Compute* o_t) {
  using C = typename P::Compute;
  constexpr int kStep = kLanesOf<C>, kSize = kTileQueries<C>;
  Vec<C> c[kTileRows][kTileVectors];  // of this step alone: the error grows with the steps, not with the keys
  if constexpr (Folded)
    multiply_folded<P>(c, v, 1, v_stride, p_t, kSize, depth);
  else
    multiply<P>(c, v, 1, v_stride, p_t, kSize, depth);
  GK_UNROLL for (int i = 0; i < kTileRows; ++i) GK_UNROLL for (int j = 0; j < kTileVectors; ++j) {
    C* o = o_t + i * kSize + j * kStep;
    store(o, fma(load(o), alpha[j], c[i][j]));
  }
}

// o_t[dims][lanes] += V^T P^T for the values that are NaN or infinite, where they are seen. The keys begin with row
// `first` of V and lie at `key` of their sequence.
template <class P>
void add_nonfinite_values(const FlashAttentionParams& p, const ForwardScratch<P>& scratch, int64_t first, int64_t key,
                          int64_t keys, TileState<P>& state) {
  using C = typename P::Compute;
  constexpr int kSize = kTileQueries<C>;
  const auto* p_t = reinterpret_cast<const typename P::Word*>(scratch.s);
  const bool has_bias = p.bias.data || p.mask.data;
  for_each_nonfinite(scratch.v, first, first + keys, p.value_dim, [&](int64_t row, int64_t d, C value) {
    const int64_t i = row - first;
    for (int lane = 0; lane < kSize; ++lane)
      if (sees(state.rows, lane, key + i, has_bias ? scratch.extra + i * kSize : nullptr))
        state.o_t[d * kSize + lane] +=
            Contracted<P>::part(p_t[i / P::kPerWord * kSize + lane], i % P::kPerWord) * value;
  });
}

// One step over the keys [key, key + keys) for one tile of queries.
template <class P>
void attend(const FlashAttentionParams& p, int64_t batch, int64_t key, int64_t keys, const ForwardScratch<P>& scratch,
            TileState<P>& state) {
  using C = typename P::Compute;
  int64_t begin = key, end = key + round_up(keys, kKeyGroup);
  state.rows.clip(begin, end);
  if (begin >= end) return;
  constexpr int kStep = kLanesOf<C>;
  const bool masked = !state.rows.see_all(begin, end - begin), modified = scores_are_modified(p);
  Vec<C> tile_max[kTileVectors], alpha[kTileVectors];
  for (Vec<C>& m : tile_max) m = broadcast(-kInfinity<C>);

  const auto score = modified ? score_panel<P, false, false>
                     : masked ? score_panel<P, true, true>
                              : score_panel<P, false, true>;
  for (int64_t i = begin; i < end; i += kTileRows)
    score(scratch.k + (i - key) * scratch.k_stride, scratch.k_stride, state.q_t, scratch.q_words, state.rows, i,
          scratch.s + (i - begin) * kTileQueries<C>, tile_max);
  const bool narrow = p.dtype == Dtype::bf16 || p.dtype == Dtype::f16;
  const auto softmax = narrow     ? softmax_step<P, Exponential::coarse>
                       : modified ? softmax_step<P, Exponential::finest>
                                  : softmax_step<P, Exponential::fine>;
  if (modified) modify_scores<C>(p, batch, state.rows, begin, end - begin, scratch.s, scratch.extra, nullptr, tile_max);
  const double unit = (modified ? 1 : p.scale) * 1.4426950408889634;
  softmax(scratch.s, end - begin, C(unit), tile_max, state, alpha);
  if (p.dropout_p > 0) {
    if constexpr (P::kPerWord == 1) drop_step<P>(p, batch, state.rows, begin, end - begin, scratch.s);
  }
  const auto* v = scratch.v.finite + (begin - key) / P::kPerWord * scratch.v.stride;
  // narrow values: few operations, and eager's product of them has as many chains as lanes
  const auto output = modified || p.value_dim < kStep ? output_panel<P, true> : output_panel<P, false>;
  const auto* p_t = reinterpret_cast<const typename P::Word*>(scratch.s);
  for (int64_t d = 0; d < scratch.value_rows; d += kTileRows)
    output(v + d, scratch.v.stride, p_t, (end - begin) / P::kPerWord, alpha, state.o_t + d * kTileQueries<C>);
  add_nonfinite_values(p, scratch, begin - key, begin, end - begin, state);
}

// The rows of a tile to out and lse: O^T / sum, the sink included.
template <class P, class T>
void finish(const FlashAttentionParams& p, int64_t batch, TileState<P>& state) {
  using C = typename P::Compute;
  constexpr int kStep = kLanesOf<C>, kSize = kTileQueries<C>;
  alignas(64) C most[kSize], sum[kSize], inverse[kSize], beside_sink[kSize];
  __builtin_memcpy(most, state.max, sizeof most);
  __builtin_memcpy(sum, state.sum, sizeof sum);
  const double exact_unit = scores_are_modified(p) ? 1 : p.scale;
  const C unit = C(exact_unit);
  const int64_t first = batch * p.lse_batch + p.query_begin(batch);
  C *lse = reinterpret_cast<C*>(p.lse), *softmax_state = reinterpret_cast<C*>(p.softmax_state);  // or null
  const TileRows<C>& rows = state.rows;
  for (int lane = 0; lane < kSize; ++lane) {
    if (lane >= rows.count) {
      sum[lane] = inverse[lane] = beside_sink[lane] = 0;
      continue;
    }
    const C top = most[lane] * unit;
    C total = sum[lane];
    double exact_top = double(most[lane]) * exact_unit;
    beside_sink[lane] = 1;
    if (p.sink) {
      const C sink = reinterpret_cast<const C*>(p.sink)[rows.head[lane]];
      const C higher = top > sink ? top : sink;
      beside_sink[lane] = top == -kInfinity<C> ? C(0) : C(__builtin_exp(top - higher));
      total = total * beside_sink[lane] + C(__builtin_exp(sink - higher));
      if (!(top > sink)) exact_top = sink;
    }
    sum[lane] = total;
    inverse[lane] = total == 0 ? C(0) : 1 / total;
    const int64_t at = first + rows.head[lane] * p.lse_head + rows.query[lane];
    if (lse) lse[at] = total == 0 ? -kInfinity<C> : C(exact_top + __builtin_log(double(total)));
    if (!softmax_state) continue;
    softmax_state[2 * at] = most[lane];
    softmax_state[2 * at + 1] = beside_sink[lane] * inverse[lane];
  }
  for (int j = 0; j < kTileVectors && j * kStep < rows.count; ++j) {
    const Vec<C> by = load(inverse + j * kStep), divisor = load(sum + j * kStep), scale = load(beside_sink + j * kStep);
    const int64_t lanes = min_of<int64_t>(kStep, rows.count - j * kStep);
    for (int64_t d = 0; d < p.value_dim; d += kStep) {
      Vec<C> x[kStep];
      const int64_t dims = min_of<int64_t>(kStep, p.value_dim - d);
      for (int64_t i = 0; i < kStep; ++i) {
        const Vec<C> o = i < dims ? load(state.o_t + (d + i) * kSize + j * kStep) : Vec<C>{};
        const Vec<C> quotient = o * by;
        x[i] = fma(fma(-quotient, divisor, o), by, quotient) * scale;  // a Newton step: as good as a division
      }
      transpose(x);
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t lane = j * kStep + l;
        T* to = token_of<T>(p.out, batch, p.query_begin(batch) + rows.query[lane], rows.head[lane]) + d;
        if (dims == kStep)
          store(to, x[l]);
        else
          store_first(to, x[l], dims);
      }
    }
  }
}

template <class P, class T>
void forward_block(const FlashAttentionParams& p, int64_t batch, int64_t kv_head, int64_t row_begin, void* memory) {
  using C = typename P::Compute;
  const int64_t rows = p.query_count(batch) * p.group, row_end = min_of(rows, row_begin + p.block_rows);
  if (row_begin >= row_end) return;
  ForwardScratch<P> scratch(p, memory);
  T* stage = static_cast<T*>(scratch.stage);
  int64_t tiles = 0, first_key = p.key_count(batch), last_key = -1;
  for (int64_t row = row_begin; row < row_end; row += kTileQueries<C>, ++tiles) {
    TileState<P>& state = scratch.state[tiles];
    state.rows.set(p, batch, kv_head, row, min_of<int64_t>(kTileQueries<C>, row_end - row));
    for (int j = 0; j < kTileVectors; ++j) state.max[j] = broadcast(-kInfinity<C>), state.sum[j] = Vec<C>{};
    pack_queries<P, T>(p, p.q, batch, state.rows, p.head_dim, state.q_t, stage);
    for (int64_t i = 0; i < scratch.value_rows * kTileQueries<C>; ++i) state.o_t[i] = 0;
    first_key = min_of(first_key, state.rows.least_first);
    last_key = max_of(last_key, state.rows.most_last);
  }
  const int64_t begin = p.key_begin(batch);
  for (int64_t key = first_key / kTileKeys * kTileKeys; key <= last_key; key += kTileKeys) {
    const int64_t keys = min_of<int64_t>(kTileKeys, p.key_count(batch) - key);
    pack_rows<P, T>(p.k, batch, begin + key, keys, kv_head, p.head_dim, scratch.k, scratch.k_stride, stage);
    scratch.v.separate(pack_values<P, T>(p.v, batch, begin + key, keys, kv_head, p.value_dim, scratch.v.packed,
                                         scratch.v.stride, stage),
                       round_up(keys, kKeyGroup) / P::kPerWord);
    for (int64_t t = 0; t < tiles; ++t) {
      // The next step's keys come into L2 while this one's are multiplied, a share with each tile.
      const int64_t next = key + kTileKeys, from = next + kTileKeys * t / tiles,
                    to = next + kTileKeys * (t + 1) / tiles;
      for (int64_t ahead = from; ahead < min_of(to, last_key + 1); ++ahead) {
        prefetch_row<T>(p.k, batch, begin + ahead, kv_head, p.head_dim);
        prefetch_row<T>(p.v, batch, begin + ahead, kv_head, p.value_dim);
      }
      attend<P>(p, batch, key, keys, scratch, scratch.state[t]);
    }
  }
  for (int64_t t = 0; t < tiles; ++t) finish<P, T>(p, batch, scratch.state[t]);
}

}  // namespace

int64_t flash_attention_fwd_scratch(const FlashAttentionParams& p) {
  GK_BASELINE_IF_F64(p, flash_attention_fwd_scratch(p))
  int64_t bytes = 0;
  with_product(p, [&](auto product, auto) {
    bytes = ForwardScratch<typename decltype(product)::type>(p, nullptr).end - static_cast<char*>(nullptr);
  });
  return bytes;
}

void flash_attention_fwd_kernel(const FlashAttentionParams& p, int64_t batch, int64_t kv_head, int64_t row_begin,
                                void* scratch) {
  GK_BASELINE_IF_F64(p, flash_attention_fwd_kernel(p, batch, kv_head, row_begin, scratch))
  with_product(p, [&](auto product, auto type) {
    forward_block<typename decltype(product)::type, typename decltype(type)::type>(p, batch, kv_head, row_begin,
                                                                                   scratch);
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(int64_t, flash_attention_fwd_scratch, (const FlashAttentionParams& p), (p))
GENAI_KERNELS_ISA_DISPATCH(void, flash_attention_fwd_kernel,
                           (const FlashAttentionParams& p, int64_t batch, int64_t kv_head, int64_t row_begin,
                            void* scratch),
                           (p, batch, kv_head, row_begin, scratch))

#endif
