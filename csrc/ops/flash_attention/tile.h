// The pieces that forward and backward share: which keys the queries in the lanes see, packing, and scores.
// Included inside an instruction-set region after vec.h, exp.h, tanh.h, tile_gemm.h and transpose.h.
//
// Everything is transposed: the queries of a tile lie in the lanes of kTileVectors registers, the keys in rows. Softmax
// then needs no horizontal operation, and nothing that happens to a query depends on its neighbours.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// Keys of one step. 128 x 48 scores are 24 KiB of L1. Fixed positions (multiples from key 0), so that the sums of a row
// are grouped the same way whatever window, chunk or batch it comes with.
constexpr int kTileKeys = 128;

template <class C>
constexpr int kTileQueries = kTileVectors * kLanesOf<C>;

// The queries in the lanes of a tile: rows [row, row + count) of one sequence and key head, the last one repeated in the
// lanes beyond it (which are never stored).
template <class C>
struct TileRows {
  static constexpr int kSize = kTileQueries<C>;
  using Int = typename VecOf<C>::Scalar;

  int64_t row, count;
  int64_t least_first, most_first, least_last, most_last;  // over the lanes
  alignas(64) Int first[kSize], last[kSize];               // visible keys of a lane, inclusive
  int64_t query[kSize], head[kSize];                       // of a lane

  void set(const FlashAttentionParams& p, int64_t batch, int64_t kv_head, int64_t row_begin, int64_t rows) {
    row = row_begin;
    count = rows;
    const int64_t keys = p.key_count(batch), shift = keys - p.query_count(batch);
    least_first = least_last = keys;
    most_first = most_last = -1;
    int64_t at = row / p.group, in_group = row % p.group;
    for (int lane = 0; lane < kSize; ++lane) {
      if (0 < lane && lane < count && ++in_group == p.group) in_group = 0, ++at;
      query[lane] = at;
      head[lane] = kv_head * p.group + in_group;
      const int64_t diagonal = at + shift;
      int64_t from = p.left < 0 ? 0 : max_of<int64_t>(0, diagonal - p.left);
      int64_t to = p.right < 0 ? keys - 1 : min_of<int64_t>(keys - 1, diagonal + p.right);
      if (to < from) from = keys, to = -1;  // sees nothing; must not widen the range of the tile
      first[lane] = Int(from);
      last[lane] = Int(to);
      least_first = min_of(least_first, from);
      most_first = max_of(most_first, from);
      least_last = min_of(least_last, to);
      most_last = max_of(most_last, to);
    }
  }
  bool see_all(int64_t key, int64_t keys) const { return most_first <= key && key + keys - 1 <= least_last; }
  // The part of keys [begin, end) that some lane sees, cut to whole groups.
  void clip(int64_t& begin, int64_t& end) const {
    const int64_t origin = begin;
    if (least_first > begin) begin = origin + (least_first - origin) / kKeyGroup * kKeyGroup;
    if (most_last + 1 < end) end = max_of(begin, origin + round_up(most_last + 1 - origin, kKeyGroup));
  }
};

// Element 0 of token `t` of a sequence and head.
template <class T>
GK_INLINE T* token_of(const HeadsView& view, int64_t batch, int64_t token, int64_t head) {
  return reinterpret_cast<T*>(view.data) + batch * view.batch + token * view.token + head * view.head;
}

// Asks for the cache lines of a token; nothing is read.
template <class T>
GK_INLINE void prefetch_row(const HeadsView& view, int64_t batch, int64_t token, int64_t head, int64_t dim) {
  if (view.dim != 1) return;
  const T* row = token_of<T>(view, batch, token, head);
  for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d, 0, 2);
}

// out[words][kTileQueries] = the rows of a tile, transposed; lanes past the last row are zero.
template <class P, class T>
void pack_queries(const FlashAttentionParams& p, const HeadsView& view, int64_t batch,
                  const TileRows<typename P::Compute>& rows, int64_t dim, typename P::Word* out, T* stage) {
  using C = typename P::Compute;
  constexpr int kStep = kLanesOf<C>, kSize = kTileQueries<C>;
  const int64_t words = (dim + P::kPerWord - 1) / P::kPerWord, begin = p.query_begin(batch);
  for (int j = 0; j < kTileVectors; ++j) {
    const T* lanes[kStep];
    for (int l = 0; l < kStep; ++l) {
      const int lane = j * kStep + l;
      lanes[l] = lane < rows.count ? contiguous(token_of<T>(view, batch, begin + rows.query[lane], rows.head[lane]),
                                                view.dim, dim, stage + l * dim)
                                   : nullptr;
    }
    for (int64_t w = 0; w < words; w += kStep) {
      Vec<C> x[kStep];
      for (int l = 0; l < kStep; ++l) x[l] = lanes[l] ? load_row_words<P>(lanes[l], w, dim) : Vec<C>{};
      transpose(x);
      const int64_t left = min_of<int64_t>(kStep, words - w);
      for (int64_t i = 0; i < left; ++i) __builtin_memcpy(out + (w + i) * kSize + j * kStep, &x[i], sizeof x[i]);
    }
  }
}

// out[keys][stride] = tokens [begin, begin + keys) of a head as they are, zeros past the end of a row; zero rows up to a
// whole group. False if an element is NaN or infinite.
template <class P, class T>
bool pack_rows(const HeadsView& view, int64_t batch, int64_t begin, int64_t count, int64_t head, int64_t dim,
               typename P::Word* out, int64_t stride, T* stage) {
  using C = typename P::Compute;
  Finiteness<C> finite;
  const int64_t words = (dim + P::kPerWord - 1) / P::kPerWord;
  for (int64_t key = 0; key < round_up(count, kKeyGroup); ++key, out += stride) {
    const T* row =
        key < count ? contiguous(token_of<T>(view, batch, begin + key, head), view.dim, dim, stage) : nullptr;
    for (int64_t w = 0; w < words; w += kLanesOf<C>) {
      const Vec<C> x = row ? load_row_words<P>(row, w, dim) : Vec<C>{};
      if constexpr (P::kPerWord == 1) finite.see(x);
      __builtin_memcpy(out + w, &x, sizeof x);
    }
  }
  return finite.all_finite();
}

// The same for V, to be multiplied over the keys: where a word holds two keys, they are interleaved.
template <class P, class T>
bool pack_values(const HeadsView& view, int64_t batch, int64_t begin, int64_t count, int64_t head, int64_t dim,
                 typename P::Word* out, int64_t stride, T* stage) {
  if constexpr (P::kPerWord == 1) {
    return pack_rows<P, T>(view, batch, begin, count, head, dim, out, stride, stage);
  } else {
    Finiteness<float> finite;
    for (int64_t key = 0; key < round_up(count, kKeyGroup); key += 2, out += stride) {
      const T* row[2];
      for (int h = 0; h < 2; ++h)
        row[h] = key + h < count
                     ? contiguous(token_of<T>(view, batch, begin + key + h, head), view.dim, dim, stage + h * dim)
                     : nullptr;
      for (int64_t d = 0; d < dim; d += kLanes) {
        const VecF x = row[0] ? load_at(row[0], d, dim) : VecF{}, y = row[1] ? load_at(row[1], d, dim) : VecF{};
        finite.see(x);
        finite.see(y);
        const VecU words = (bit_cast<VecU>(x) >> 16) | (bit_cast<VecU>(y) & 0xffff0000);  // exact: they were bf16
        __builtin_memcpy(out + d, &words, sizeof words);
      }
    }
    return finite.all_finite();
  }
}

// True if the query of a lane sees a key; `bias` is that key's row of fetch_bias, or null.
template <class C>
GK_INLINE bool sees(const TileRows<C>& rows, int lane, int64_t key, const C* bias) {
  return rows.first[lane] <= key && key <= rows.last[lane] && !(bias && bias[lane] == -kInfinity<C>);
}

// Words of the contraction, more than most heads have, after which forward begins a new pair of chains.
constexpr int64_t kDeep = 128;

// s[kTileRows][kTileQueries] = K Q^T for one panel of keys. Masked: -inf where a lane does not see a key. Max: also
// tile_max = max(tile_max, s).
template <class P, bool Masked, bool Max>
[[gnu::noinline]] void score_panel(const typename P::Word* k, int64_t k_stride, const typename P::Word* q_t,
                                   int64_t depth, const TileRows<typename P::Compute>& rows, int64_t key,
                                   typename P::Compute* s, Vec<typename P::Compute>* tile_max) {
  using C = typename P::Compute;
  constexpr int kStep = kLanesOf<C>, kSize = kTileQueries<C>;
  Vec<C> c[kTileRows][kTileVectors];
  if constexpr (Max)
    multiply_folded<P, kDeep>(c, k, k_stride, 1, q_t, kSize, depth);
  else
    multiply_folded<P>(c, k, k_stride, 1, q_t, kSize, depth);
  GK_UNROLL for (int j = 0; j < kTileVectors; ++j) {
    Vec<C> most;
    if constexpr (Max) most = tile_max[j];
    IntVec<C> first, last;
    if constexpr (Masked) {
      __builtin_memcpy(&first, rows.first + j * kStep, sizeof first);
      __builtin_memcpy(&last, rows.last + j * kStep, sizeof last);
    }
    GK_UNROLL for (int i = 0; i < kTileRows; ++i) {
      Vec<C> x = c[i][j];
      if constexpr (Masked) {
        const IntVec<C> at = broadcast_int<C>(key + i);
        x = ((at < first) | (at > last)) ? broadcast(-kInfinity<C>) : x;
      }
      if constexpr (Max) most = max(most, x);
      store(s + i * kSize + j * kStep, x);
    }
    if constexpr (Max) tile_max[j] = most;
  }
}

// Bias and mask of keys [key, key + keys) for every lane, transposed: tile[key][lane] = bias, -inf where masked out.
template <class C>
[[gnu::noinline]] void fetch_bias(const FlashAttentionParams& p, int64_t batch, const TileRows<C>& rows, int64_t key,
                                  int64_t keys, C* tile) {
  constexpr int kSize = kTileQueries<C>;
  const int64_t present = max_of<int64_t>(0, min_of(keys, p.key_count(batch) - key));
  for (int64_t i = 0; i < keys * kSize; ++i) tile[i] = 0;
  if (p.bias.data)
    switch_dtype(p.bias.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      for (int lane = 0; lane < kSize; ++lane) {
        const T* from = reinterpret_cast<const T*>(p.bias.data) + batch * p.bias.batch + rows.head[lane] * p.bias.head +
                        rows.query[lane] * p.bias.query + key * p.bias.key;
        for (int64_t i = 0; i < present; ++i) tile[i * kSize + lane] = C(to_compute(from[i * p.bias.key]));
      }
    });
  if (p.mask.data)
    for (int lane = 0; lane < kSize; ++lane) {
      const char* from = p.mask.data + batch * p.mask.batch + rows.head[lane] * p.mask.head +
                         rows.query[lane] * p.mask.query + key * p.mask.key;
      for (int64_t i = 0; i < present; ++i)
        if (!from[i * p.mask.key]) tile[i * kSize + lane] = -kInfinity<C>;
    }
}

// True if a score is more than scale * q.k under an interval: then modify_scores runs over the raw products.
GK_INLINE bool scores_are_modified(const FlashAttentionParams& p) {
  return p.softcap > 0 || p.slopes || p.bias.data || p.mask.data || !(p.scale > 0);
}

// Raw products to scores, in place: scale, softcap, ALiBi, bias, and -inf where hidden; tile_max as in score_panel.
// `slope_of_cap` receives d(score)/d(scaled product), 1 - tanh^2, or is null. `extra` is room for a tile.
template <class C>
[[gnu::noinline]] void modify_scores(const FlashAttentionParams& p, int64_t batch, const TileRows<C>& rows, int64_t key,
                                     int64_t keys, C* s, C* extra, C* slope_of_cap, Vec<C>* tile_max) {
  constexpr int kStep = kLanesOf<C>, kSize = kTileQueries<C>;
  const bool has_extra = p.bias.data || p.mask.data;
  if (has_extra) fetch_bias(p, batch, rows, key, keys, extra);
  alignas(64) C slope[kSize] = {}, diagonal[kSize];
  const int64_t shift = p.key_count(batch) - p.query_count(batch);
  for (int lane = 0; lane < kSize; ++lane) {
    if (p.slopes) slope[lane] = reinterpret_cast<const C*>(p.slopes)[batch * p.slopes_batch + rows.head[lane]];
    diagonal[lane] = C(rows.query[lane] + shift);
  }
  const Vec<C> scale = broadcast(C(p.scale)), cap = broadcast(C(p.softcap)), per_cap = broadcast(C(1 / p.softcap));
  const Vec<C> hidden = broadcast(-kInfinity<C>);
  for (int j = 0; j < kTileVectors; ++j) {
    IntVec<C> first, last;
    __builtin_memcpy(&first, rows.first + j * kStep, sizeof first);
    __builtin_memcpy(&last, rows.last + j * kStep, sizeof last);
    Vec<C> most = tile_max[j];
    for (int64_t i = 0; i < keys; ++i) {
      const int64_t at = i * kSize + j * kStep;
      Vec<C> x = load(s + at) * scale;
      if (p.softcap > 0) {
        const Vec<C> t = tanh(x * per_cap);
        if (slope_of_cap) store(slope_of_cap + at, broadcast(C(1)) - t * t);
        x = cap * t;
      }
      if (p.slopes) {
        const Vec<C> distance = load(diagonal + j * kStep) - broadcast(C(key + i));
        x = x - load(slope + j * kStep) * max(distance, -distance);
      }
      if (has_extra) {
        const Vec<C> added = load(extra + at);
        x = added == hidden ? hidden : x + added;
      }
      const IntVec<C> position = broadcast_int<C>(key + i);
      x = ((position < first) | (position > last)) ? hidden : x;
      most = max(most, x);
      store(s + at, x);
    }
    tile_max[j] = most;
  }
}

// keep[4 keys][lane] of dropout: the factor 0 or 1 / (1 - p) for keys [key, key + 4), key a multiple of 4.
template <class C>
GK_INLINE void dropout_factors(const FlashAttentionParams& p, int64_t batch, const TileRows<C>& rows, int64_t key,
                               C (&factor)[4][kTileQueries<C>]) {
  constexpr int kSize = kTileQueries<C>;
  uint32_t query[kSize], row[kSize], words[4][kSize];
  for (int lane = 0; lane < kSize; ++lane) {
    query[lane] = uint32_t(rows.query[lane]);
    row[lane] = uint32_t(batch * p.heads + rows.head[lane]);
  }
  philox<kSize>(uint32_t(key / 4), query, row, p.offset, p.seed, words);
  const uint32_t threshold = dropout_threshold(p.dropout_p);
  const C kept = C(1 / (1 - p.dropout_p));
  for (int i = 0; i < 4; ++i)
    for (int lane = 0; lane < kSize; ++lane) factor[i][lane] = words[i][lane] >= threshold ? kept : C(0);
}

// f(product, stored type): how this instruction set multiplies what is stored as `p.dtype`.
template <class F>
GK_INLINE void with_product(const FlashAttentionParams& p, F&& f) {
#if GENAI_KERNELS_ISA_BF16
  // Dropout needs the probabilities apart after they were summed, which the product of pairs has packed already.
  if (p.dtype == Dtype::bf16 && p.dropout_p == 0) return f(TypeTag<DotBf16>{}, TypeTag<bf16>{});
#endif
  switch (p.dtype) {
    case Dtype::f32:
      return f(TypeTag<Fma<float>>{}, TypeTag<float>{});
    case Dtype::bf16:
      return f(TypeTag<Fma<float>>{}, TypeTag<bf16>{});
    case Dtype::f16:
      return f(TypeTag<Fma<float>>{}, TypeTag<fp16>{});
    case Dtype::f64:
#if GENAI_KERNELS_ISA_LANES == 4
      return f(TypeTag<Fma<double>>{}, TypeTag<double>{});
#endif
      return;
  }
}

// What forward kept of a row's softmax; without it (its op was another one's) lse has to do.
template <class C>
struct RowState {
  C max, inverse;
};
template <class C>
GK_INLINE RowState<C> row_state(const FlashAttentionParams& p, int64_t at) {
  if (const C* state = reinterpret_cast<const C*>(p.softmax_state)) return {state[2 * at], state[2 * at + 1]};
  const C lse = reinterpret_cast<const C*>(p.lse)[at];
  return {scores_are_modified(p) ? lse : C(double(lse) / p.scale), C(lse == -kInfinity<C> ? 0 : 1)};
}

// f(stored type): gradients are summed in float32 whatever is stored.
template <class F>
GK_INLINE void with_stored_type(Dtype dtype, F&& f) {
  if (dtype == Dtype::f32) return f(TypeTag<float>{});
  if (dtype == Dtype::bf16) return f(TypeTag<bf16>{});
  if (dtype == Dtype::f16) return f(TypeTag<fp16>{});
#if GENAI_KERNELS_ISA_LANES == 4
  f(TypeTag<double>{});
#endif
}

// float64 is for gradcheck: one copy, the baseline's, serves every instruction set and saves a quarter of the build.
#undef GK_BASELINE_IF_F64
#if GENAI_KERNELS_ISA_LANES == 4
#define GK_BASELINE_IF_F64(p, call)
#else
#define GK_BASELINE_IF_F64(p, call) \
  if ((p).dtype == Dtype::f64) return baseline::call;
#endif

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
