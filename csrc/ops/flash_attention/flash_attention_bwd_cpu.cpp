// Flash attention backward on the CPU: the scores are computed again from q, k and lse, and with (README.md derives it)
//
//     P = exp(S - lse)     dP = dO V^T     dS = P (dP - delta)     delta = sum(dO O) - dlse
//
// the five products are, for a tile of queries in the lanes and a step of keys in the rows,
//
//     S^T  = K Q^T         A = K as it lies, B = Q^T          dV += P^T dO     A = P^T, B = dO as it lies
//     dP^T = V dO^T        A = V as it lies, B = dO^T         dK += dS^T Q     A = dS^T, B = Q as it lies
//                                                             dQ += dS K       A = dS^T read down, B = K as it lies
//
// Sums are float32 (float64 for float64) whatever the stored type, in the order of the tiles: dK and dV over the
// queries, dQ over the keys. Nothing is added by two threads, so the bits depend on no thread count.
#include "cpu/region_headers.h"
#include "ops/flash_attention/flash_attention.h"

#define GENAI_KERNELS_ISA_FILE "ops/flash_attention/flash_attention_bwd_cpu.cpp"
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

constexpr int kSteps = kBackwardKeys / kTileKeys;  // steps of keys that are packed together

template <class C>
struct BackwardScratch {
  static constexpr int kSize = kTileQueries<C>;
  Arena arena;
  int64_t head_stride, value_stride;  // of a packed row
  TileRows<C>* rows;
  Contracted<Fma<C>> k, q, dout;  // [kBackwardKeys][stride]; a tile of queries: [lanes][stride]
  C* v;                           // [kBackwardKeys][stride]
  C *dk, *dv, *dk_sum, *dv_sum;   // likewise: of the tiles since the last flush, and of all before
  C *q_t, *do_t;                  // a tile of queries: [dim][lanes]
  C *s, *dp, *extra, *cap;        // [kTileKeys][lanes]
  C *max, *inverse, *delta;       // [lanes]; P = exp(score - max) * inverse
  C* dq;                          // [rows of the item][stride]
  void* stage;
  char* end;

  BackwardScratch(const FlashAttentionParams& p, int64_t dq_rows, void* memory)
      : arena(memory),
        head_stride(row_stride<C>(p.head_dim)),
        value_stride(row_stride<C>(p.value_dim)),
        rows(arena.take<TileRows<C>>(1)),
        k(arena, kBackwardKeys, head_stride),
        q(arena, kSize, head_stride),
        dout(arena, kSize, value_stride) {
    dk = arena.take<C>(kBackwardKeys * head_stride);
    dk_sum = arena.take<C>(kBackwardKeys * head_stride);
    v = arena.take<C>(kBackwardKeys * value_stride);
    dv = arena.take<C>(kBackwardKeys * value_stride);
    dv_sum = arena.take<C>(kBackwardKeys * value_stride);
    q_t = arena.take<C>(kSize * head_stride);
    do_t = arena.take<C>(kSize * value_stride);
    s = arena.take<C>(kTileKeys * kSize);
    dp = arena.take<C>(kTileKeys * kSize);
    extra = arena.take<C>(p.bias.data || p.mask.data ? kTileKeys * kSize : 0);
    cap = arena.take<C>(p.softcap > 0 ? kTileKeys * kSize : 0);
    max = arena.take<C>(kSize);
    inverse = arena.take<C>(kSize);
    delta = arena.take<C>(kSize);
    stage = arena.take<double>(kLanes * max_of(p.head_dim, p.value_dim));
    dq = arena.take<C>(dq_rows * head_stride);
    end = arena.end();
  }
};

// to[lanes] = the rows of a tile as they are, zeros in the lanes past the last one.
template <class C, class T>
void pack_query_rows(const FlashAttentionParams& p, const HeadsView& view, int64_t batch, const TileRows<C>& rows,
                     int64_t dim, Contracted<Fma<C>>& to, T* stage) {
  Finiteness<C> finite;
  C* out = to.packed;
  for (int lane = 0; lane < kTileQueries<C>; ++lane, out += to.stride) {
    const T* row = lane < rows.count
                       ? contiguous(token_of<T>(view, batch, p.query_begin(batch) + rows.query[lane], rows.head[lane]),
                                    view.dim, dim, stage)
                       : nullptr;
    for (int64_t d = 0; d < dim; d += kLanesOf<C>) {
      const Vec<C> x = row ? load_at(row, d, dim) : Vec<C>{};
      finite.see(x);
      store(out + d, x);
    }
  }
  to.separate(finite.all_finite(), kTileQueries<C>);
}

// Registers across a panel: with 32 of them 4 x 4 sums in one chain, which load less for a multiply-add than two chains of
// 4 x 2. A contraction is cut into pieces of kChain for it, or of kShortChain where a row is a single register: eager's
// products of a matrix and a vector have as many chains as lanes.
constexpr int kWidest = GENAI_KERNELS_ISA_LANES == 16 ? 4 : 3;
constexpr int64_t kChain = 64, kShortChain = 16;

// out[kTileRows][Vectors] += A B for one panel of rows.
template <class C, int Vectors>
[[gnu::noinline]] void add_product_panel(const C* a, int64_t row_stride, int64_t depth_stride, const C* b,
                                         int64_t b_stride, int64_t depth, C* out, int64_t out_stride) {
  Vec<C> c[kTileRows][Vectors];
  multiply<Fma<C>, Vectors == kWidest && kWidest == 4 ? 1 : 2>(c, a, row_stride, depth_stride, b, b_stride, depth);
  GK_UNROLL for (int i = 0; i < kTileRows; ++i) GK_UNROLL for (int j = 0; j < Vectors; ++j) {
    C* to = out + i * out_stride + j * kLanesOf<C>;
    store(to, load(to) + c[i][j]);
  }
}

// out[rows][stride] += A[rows][depth] B[depth][stride]; the dims lie in the lanes.
template <class C>
void add_product(const C* a, int64_t row_stride, int64_t depth_stride, int64_t rows, const C* b, int64_t stride,
                 int64_t depth, C* out) {
  const int64_t vectors = stride / kLanesOf<C>, chain = vectors == 1 ? kShortChain : kChain;
  for (int64_t k = 0; k < depth; k += chain)
    for (int64_t j = 0; j < vectors;) {
      const int64_t left = vectors - j;
      // no single one is left over where it can be helped
      const int64_t width = left <= kWidest ? left : left == kWidest + 1 ? kWidest - 1 : kWidest;
      const auto panel = width == 1   ? add_product_panel<C, 1>
                         : width == 2 ? add_product_panel<C, 2>
                         : width == 3 ? add_product_panel<C, 3>
                                      : add_product_panel<C, kWidest>;
      for (int64_t r = 0; r < rows; r += kTileRows)
        panel(a + r * row_stride + k * depth_stride, row_stride, depth_stride, b + k * stride + j * kLanesOf<C>, stride,
              min_of(chain, depth - k), out + r * stride + j * kLanesOf<C>, stride);
      j += width;
    }
}

// In place, for a step of keys: s becomes P^T (after dropout, what multiplies V) and dp becomes dS^T, the gradient of the
// score before it is divided by the softcap's slope.
template <class C, bool Dropout>
[[gnu::noinline]] void score_gradients(const FlashAttentionParams& p, int64_t batch, const BackwardScratch<C>& scratch,
                                       int64_t key, int64_t keys) {
  constexpr int kStep = kLanesOf<C>, kSize = kTileQueries<C>;
  const Vec<C> unit = broadcast(scores_are_modified(p) ? C(1) : C(p.scale)), hidden = broadcast(-kInfinity<C>);
  alignas(64) C factor[4][kSize];
  for (int64_t i = 0; i < keys; ++i) {
    if constexpr (Dropout)
      if (i % 4 == 0) dropout_factors(p, batch, *scratch.rows, key + i, factor);
    GK_UNROLL for (int j = 0; j < kTileVectors; ++j) {
      C* s = scratch.s + i * kSize + j * kStep;
      C* dp = scratch.dp + i * kSize + j * kStep;
      const Vec<C> score = load(s), exponent = (score - load(scratch.max + j * kStep)) * unit;
      const Vec<C> probability = exp_nonpositive(exponent) * load(scratch.inverse + j * kStep);
      Vec<C> kept = probability, gradient = load(dp);
      if constexpr (Dropout) {
        const Vec<C> by = load(factor[i % 4] + j * kStep);
        kept = probability * by;
        gradient = gradient * by;
      }
      gradient = probability * (gradient - load(scratch.delta + j * kStep));
      store(s, score == hidden ? Vec<C>{} : kept);       // a row whose maximum is infinite would give NaN
      store(dp, score == hidden ? Vec<C>{} : gradient);  // a hidden key's dP may be NaN
    }
  }
}

// S, dP, P and dS of the tile of queries in `scratch` for the keys [begin, end) of the step that begins at `key`.
template <class C>
void differentiate_scores(const FlashAttentionParams& p, int64_t batch, const BackwardScratch<C>& scratch, int64_t step,
                          int64_t key, int64_t begin, int64_t end) {
  constexpr int kSize = kTileQueries<C>;
  const bool modified = scores_are_modified(p), masked = !scratch.rows->see_all(begin, end - begin);
  const auto score = masked && !modified ? score_panel<Fma<C>, true, false> : score_panel<Fma<C>, false, false>;
  const C* k = scratch.k.packed + (step * kTileKeys - key) * scratch.head_stride;
  const C* v = scratch.v + (step * kTileKeys - key) * scratch.value_stride;
  for (int64_t i = begin; i < end; i += kTileRows) {
    score(k + i * scratch.head_stride, scratch.head_stride, scratch.q_t, p.head_dim, *scratch.rows, i,
          scratch.s + (i - begin) * kSize, nullptr);
    score_panel<Fma<C>, false, false>(v + i * scratch.value_stride, scratch.value_stride, scratch.do_t, p.value_dim,
                                      *scratch.rows, i, scratch.dp + (i - begin) * kSize, nullptr);
  }
  if (modified) {
    Vec<C> unused[kTileVectors] = {};
    modify_scores<C>(p, batch, *scratch.rows, begin, end - begin, scratch.s, scratch.extra,
                     p.softcap > 0 ? scratch.cap : nullptr, unused);
  }
  if (p.dropout_p > 0)
    score_gradients<C, true>(p, batch, scratch, begin, end - begin);
  else
    score_gradients<C, false>(p, batch, scratch, begin, end - begin);
}

template <class C>
void multiply_by_slope_of_cap(const BackwardScratch<C>& scratch, int64_t keys) {
  for (int64_t i = 0; i < keys * kTileQueries<C>; i += kLanesOf<C>)
    store(scratch.dp + i, load(scratch.dp + i) * load(scratch.cap + i));
}

// The same three products for what is NaN or infinite in dO, Q and K, where it is seen. The keys begin with row `at` of
// K and lie at `key` of their sequence.
template <class C>
void add_nonfinite(const FlashAttentionParams& p, const BackwardScratch<C>& scratch, int64_t key, int64_t keys,
                   int64_t at, bool want_keys, C* dq) {
  constexpr int kSize = kTileQueries<C>;
  const TileRows<C>& rows = *scratch.rows;
  const bool has_bias = p.bias.data || p.mask.data;
  const auto visible = [&](int64_t lane, int64_t i) {
    return sees(rows, int(lane), key + i, has_bias ? scratch.extra + i * kSize : nullptr);
  };
  const auto add_to_keys = [&](const Contracted<Fma<C>>& matrix, int64_t dim, const C* factor, C* out) {
    for_each_nonfinite(matrix, 0, rows.count, dim, [&](int64_t lane, int64_t d, C value) {
      for (int64_t i = 0; i < keys; ++i)
        if (visible(lane, i)) out[(at + i) * matrix.stride + d] += factor[i * kSize + lane] * value;
    });
  };
  if (want_keys) {
    add_to_keys(scratch.dout, p.value_dim, scratch.s, scratch.dv);
    add_to_keys(scratch.q, p.head_dim, scratch.dp, scratch.dk);
  }
  if (dq)
    for_each_nonfinite(scratch.k, at, at + keys, p.head_dim, [&](int64_t row, int64_t d, C value) {
      for (int64_t lane = 0; lane < rows.count; ++lane)
        if (visible(lane, row - at))
          dq[lane * scratch.head_stride + d] += scratch.dp[(row - at) * kSize + lane] * value;
    });
}

// A tile of queries: Q, dO, the softmax's state and delta into the lanes.
template <class C, class T>
void load_tile(const FlashAttentionParams& p, int64_t batch, int64_t kv_head, int64_t row, int64_t row_end,
               BackwardScratch<C>& scratch) {
  TileRows<C>& rows = *scratch.rows;
  T* stage = static_cast<T*>(scratch.stage);
  rows.set(p, batch, kv_head, row, min_of<int64_t>(kTileQueries<C>, row_end - row));
  if (rows.most_last < 0) return;
  pack_queries<Fma<C>, T>(p, p.q, batch, rows, p.head_dim, scratch.q_t, stage);
  pack_queries<Fma<C>, T>(p, p.dout, batch, rows, p.value_dim, scratch.do_t, stage);
  pack_query_rows<C, T>(p, p.q, batch, rows, p.head_dim, scratch.q, stage);
  pack_query_rows<C, T>(p, p.dout, batch, rows, p.value_dim, scratch.dout, stage);
  for (int lane = 0; lane < kTileQueries<C>; ++lane) {
    const int64_t at = batch * p.lse_batch + rows.head[lane] * p.lse_head + p.query_begin(batch) + rows.query[lane];
    const RowState<C> state = row_state<C>(p, at);
    // past the last row, or without keys: every P is 0
    const bool idle = lane >= rows.count || state.max == -kInfinity<C>;
    scratch.max[lane] = idle ? kInfinity<C> : state.max;
    scratch.inverse[lane] = idle ? C(0) : state.inverse;
    scratch.delta[lane] = idle ? C(0) : reinterpret_cast<const C*>(p.delta)[at];
  }
}

// Keys [key, key + kBackwardKeys) of a head into scratch.k and scratch.v.
template <class C, class T>
void load_keys(const FlashAttentionParams& p, int64_t batch, int64_t kv_head, int64_t key,
               BackwardScratch<C>& scratch) {
  const int64_t count = min_of<int64_t>(kBackwardKeys, p.key_count(batch) - key), token = p.key_begin(batch) + key;
  T* stage = static_cast<T*>(scratch.stage);
  const bool finite =
      pack_rows<Fma<C>, T>(p.k, batch, token, count, kv_head, p.head_dim, scratch.k.packed, scratch.head_stride, stage);
  scratch.k.separate(finite, round_up(count, kKeyGroup));
  pack_rows<Fma<C>, T>(p.v, batch, token, count, kv_head, p.value_dim, scratch.v, scratch.value_stride, stage);
}

// f(step, key of the step, begin, end) for every step of the packed keys that the tile of queries sees part of.
template <class C, class F>
GK_INLINE void for_each_step(const FlashAttentionParams& p, int64_t batch, const TileRows<C>& rows, int64_t key,
                             F&& f) {
  for (int64_t step = 0; step < kSteps; ++step) {
    const int64_t from = key + step * kTileKeys, count = min_of<int64_t>(kTileKeys, p.key_count(batch) - from);
    if (count <= 0) return;
    int64_t begin = from, end = from + round_up(count, kKeyGroup);
    rows.clip(begin, end);
    if (begin < end) f(step, from, begin, end);
  }
}

// dst token = by * src, in the stored type.
template <class C, class T>
void store_gradient(const C* from, int64_t dim, C by, T* to) {
  for (int64_t d = 0; d < dim; d += kLanesOf<C>)
    store_first(to + d, load(from + d) * broadcast(by), min_of<int64_t>(kLanesOf<C>, dim - d));
}

// Rows of queries after which dK and dV are added to the sums of all before: the error grows with the root of their number
// over many tiles.
template <class C>
constexpr int64_t kFlushRows = 8 * kTileQueries<C>;

// sum += part, and part = 0.
template <class C>
void flush(C* part, C* sum, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanesOf<C>) {
    store(sum + i, load(sum + i) + load(part + i));
    store(part + i, Vec<C>{});
  }
}

template <class C, class T>
void backward(const FlashAttentionParams& p, Gradients which, int64_t batch, int64_t kv_head, int64_t begin_at,
              void* memory) {
  constexpr int kSize = kTileQueries<C>;
  const bool want_keys = which != Gradients::queries, want_queries = which != Gradients::keys_and_values;
  const int64_t all_rows = p.query_count(batch) * p.group, all_keys = p.key_count(batch);
  const int64_t row_begin = which == Gradients::queries ? begin_at : 0;
  const int64_t row_end = which == Gradients::queries ? min_of(all_rows, row_begin + kBackwardRows) : all_rows;
  const int64_t key_begin = which == Gradients::keys_and_values ? begin_at : 0;
  const int64_t key_end = which == Gradients::keys_and_values ? min_of(all_keys, key_begin + kBackwardKeys) : all_keys;

  BackwardScratch<C> scratch(p, want_queries ? max_of<int64_t>(0, row_end - row_begin) + kSize : 0, memory);
  const TileRows<C>& rows = *scratch.rows;
  const int64_t head_stride = scratch.head_stride, value_stride = scratch.value_stride;
  if (want_queries)
    for (int64_t i = 0; i < (row_end - row_begin + kSize) * head_stride; ++i) scratch.dq[i] = 0;
  for (int64_t key = key_begin; key < key_end; key += kBackwardKeys) {
    load_keys<C, T>(p, batch, kv_head, key, scratch);
    if (want_keys) {
      for (int64_t i = 0; i < kBackwardKeys * head_stride; ++i) scratch.dk[i] = scratch.dk_sum[i] = 0;
      for (int64_t i = 0; i < kBackwardKeys * value_stride; ++i) scratch.dv[i] = scratch.dv_sum[i] = 0;
    }
    int64_t flushed = -1;  // the run of kFlushRows that dk and dv hold
    const auto flush_all = [&] {
      flush(scratch.dk, scratch.dk_sum, kBackwardKeys * head_stride);
      flush(scratch.dv, scratch.dv_sum, kBackwardKeys * value_stride);
    };
    for (int64_t row = row_begin; row < row_end; row += kSize) {
      scratch.rows->set(p, batch, kv_head, row, min_of<int64_t>(kSize, row_end - row));
      if (rows.most_last < key || rows.least_first >= key + kBackwardKeys) continue;
      load_tile<C, T>(p, batch, kv_head, row, row_end, scratch);
      if (want_keys && row / kFlushRows<C> != flushed) {
        if (flushed >= 0) flush_all();
        flushed = row / kFlushRows<C>;
      }
      for_each_step(p, batch, rows, key, [&](int64_t step, int64_t from, int64_t begin, int64_t end) {
        const int64_t keys = end - begin, at = step * kTileKeys + begin - from;
        differentiate_scores(p, batch, scratch, step, from, begin, end);
        if (p.softcap > 0) multiply_by_slope_of_cap(scratch, keys);
        C* dq = scratch.dq + (row - row_begin) * head_stride;
        if (want_keys) {
          add_product<C>(scratch.s, kSize, 1, keys, scratch.dout.finite, value_stride, kSize,
                         scratch.dv + at * value_stride);
          add_product<C>(scratch.dp, kSize, 1, keys, scratch.q.finite, head_stride, kSize,
                         scratch.dk + at * head_stride);
        }
        if (want_queries)
          add_product<C>(scratch.dp, 1, kSize, kSize, scratch.k.finite + at * head_stride, head_stride, keys, dq);
        add_nonfinite<C>(p, scratch, begin, keys, at, want_keys, want_queries ? dq : nullptr);
      });
    }
    if (!want_keys) continue;
    flush_all();
    for (int64_t i = 0; i < min_of<int64_t>(kBackwardKeys, all_keys - key); ++i) {
      const int64_t token = p.key_begin(batch) + key + i;
      store_gradient<C, T>(scratch.dk_sum + i * head_stride, p.head_dim, C(p.scale),
                           token_of<T>(p.dk, batch, token, kv_head));
      store_gradient<C, T>(scratch.dv_sum + i * value_stride, p.value_dim, C(1),
                           token_of<T>(p.dv, batch, token, kv_head));
    }
  }
  if (!want_queries) return;
  for (int64_t row = row_begin; row < row_end; ++row)
    store_gradient<C, T>(
        scratch.dq + (row - row_begin) * head_stride, p.head_dim, C(p.scale),
        token_of<T>(p.dq, batch, p.query_begin(batch) + row / p.group, kv_head * p.group + row % p.group));
}

template <class C, class T, class Sum>
void bias_gradient(const FlashAttentionParams& p, const Range& range, void* memory) {
  constexpr int kSize = kTileQueries<C>;
  BackwardScratch<C> scratch(p, 0, memory);
  const TileRows<C>& rows = *scratch.rows;
  for (int64_t batch = range.batch_begin; batch < range.batch_end; ++batch)
    for (int64_t kv_head = range.kv_head_begin; kv_head < range.kv_head_end; ++kv_head) {
      const int64_t row_end = min_of(range.row_end, p.query_count(batch) * p.group);
      for (int64_t key = 0; key < p.key_count(batch); key += kBackwardKeys) {
        load_keys<C, T>(p, batch, kv_head, key, scratch);
        for (int64_t row = range.row_begin; row < row_end; row += kSize) {
          load_tile<C, T>(p, batch, kv_head, row, row_end, scratch);
          for_each_step(p, batch, rows, key, [&](int64_t step, int64_t from, int64_t begin, int64_t end) {
            differentiate_scores(p, batch, scratch, step, from, begin, end);
            for (int lane = 0; lane < rows.count; ++lane) {
              Sum* to = reinterpret_cast<Sum*>(p.dbias.data) + batch * p.dbias.batch + rows.head[lane] * p.dbias.head +
                        rows.query[lane] * p.dbias.query;
              for (int64_t i = begin; i < min_of(end, p.key_count(batch)); ++i)
                to[i * p.dbias.key] += scratch.dp[(i - begin) * kSize + lane];
            }
          });
        }
      }
    }
}

}  // namespace

int64_t flash_attention_bwd_scratch(const FlashAttentionParams& p, Gradients which) {
  GK_BASELINE_IF_F64(p, flash_attention_bwd_scratch(p, which))
  int64_t bytes = 0;
  with_stored_type(p.dtype, [&](auto type) {
    using C = Compute<typename decltype(type)::type>;
    const int64_t rows = which == Gradients::all ? p.queries * p.group : kBackwardRows;
    const BackwardScratch<C> scratch(p, which == Gradients::keys_and_values ? 0 : rows + kTileQueries<C>, nullptr);
    bytes = scratch.end - static_cast<char*>(nullptr);
  });
  return bytes;
}

void flash_attention_bwd_kernel(const FlashAttentionParams& p, Gradients which, int64_t batch, int64_t kv_head,
                                int64_t begin, void* scratch) {
  GK_BASELINE_IF_F64(p, flash_attention_bwd_kernel(p, which, batch, kv_head, begin, scratch))
  with_stored_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    backward<Compute<T>, T>(p, which, batch, kv_head, begin, scratch);
  });
}

void flash_attention_dbias_kernel(const FlashAttentionParams& p, const Range& range, void* scratch) {
  GK_BASELINE_IF_F64(p, flash_attention_dbias_kernel(p, range, scratch))
  with_stored_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.dbias.dtype == Dtype::f64)
      bias_gradient<Compute<T>, T, double>(p, range, scratch);
    else
      bias_gradient<Compute<T>, T, float>(p, range, scratch);
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(int64_t, flash_attention_bwd_scratch, (const FlashAttentionParams& p, Gradients which),
                           (p, which))
GENAI_KERNELS_ISA_DISPATCH(void, flash_attention_bwd_kernel,
                           (const FlashAttentionParams& p, Gradients which, int64_t batch, int64_t kv_head,
                            int64_t begin, void* scratch),
                           (p, which, batch, kv_head, begin, scratch))
GENAI_KERNELS_ISA_DISPATCH(void, flash_attention_dbias_kernel,
                           (const FlashAttentionParams& p, const Range& range, void* scratch), (p, range, scratch))

#endif
