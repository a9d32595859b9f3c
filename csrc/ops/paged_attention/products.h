// The two products of paged_attention, each in two forms with the same bits: for few rows straight from the pages, bound
// by how fast they are read; for many, from a packed step, bound by the multiply-adds. Included inside an instruction-set
// region after item.h.
//
// A score is kSumLanes chains, one for each word of the head dimension modulo kSumLanes, and the sum of their results by
// halves. For few rows the chains of a score are the lanes that a row of K has anyway; for many they are pieces of the
// product with K^T, whose lanes are keys.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// f(first, IntTag<Rows>) for all of `rows`, some at a time.
template <class F>
GK_INLINE void for_row_blocks(int64_t rows, F&& f) {
  int64_t r = 0;
  if constexpr (kTileRows == 4)
    for (; r + 4 <= rows; r += 4) f(r, IntTag<4>{});
  for (; r + 2 <= rows; r += 2) f(r, IntTag<2>{});
  if (r < rows) f(r, IntTag<1>{});
}

// ---- scores ----

// Lane l: of each group of 2 M lanes the sums of its halves, from a in the lower half and from b in the upper one.
template <int M>
GK_INLINE VecF add_halves(VecF a, VecF b) {
#if GENAI_KERNELS_ISA_LANES == 16
  constexpr auto from = [](int l) { return (l ^ M) + (l & M ? 16 : 0); };
  const __m512i crossed =
      _mm512_setr_epi32(from(0), from(1), from(2), from(3), from(4), from(5), from(6), from(7), from(8), from(9),
                        from(10), from(11), from(12), from(13), from(14), from(15));
  constexpr __mmask16 upper = M == 8 ? 0xff00 : M == 4 ? 0xf0f0 : M == 2 ? 0xcccc : 0xaaaa;
  return (VecF)_mm512_mask_blend_ps(upper, (__m512)a, (__m512)b) +
         (VecF)_mm512_permutex2var_ps((__m512)a, crossed, (__m512)b);
#elif GENAI_KERNELS_ISA_LANES == 8
  constexpr int upper = M == 4 ? 0xf0 : M == 2 ? 0xcc : 0xaa;
  const __m256 x = (__m256)a, y = (__m256)b;
  __m256 crossed;
  if constexpr (M == 4) crossed = _mm256_permute2f128_ps(x, y, 0x21);
  if constexpr (M == 2) crossed = _mm256_shuffle_ps(x, y, 0x4e);
  if constexpr (M == 1) crossed = _mm256_permute_ps(_mm256_blend_ps(x, y, 0x55), 0xb1);
  return (VecF)_mm256_blend_ps(x, y, upper) + (VecF)crossed;
#else
  VecF straight, crossed;
  for (int l = 0; l < kLanes; ++l) {
    straight[l] = l & M ? b[l] : a[l];
    crossed[l] = l & M ? b[l ^ M] : a[l ^ M];
  }
  return straight + crossed;
#endif
}

// Lane l: the sum of the lanes of x[l], by halves.
template <int M = kLanes / 2>
GK_INLINE VecF sums_of_lanes(VecF (&x)[kLanes]) {
  GK_UNROLL for (int i = 0; i < M; ++i) x[i] = add_halves<M>(x[i], x[i + M]);
  if constexpr (M > 1)
    return sums_of_lanes<M / 2>(x);
  else
    return x[0];
}

// s[Rows][kLanes keys] of the rows of K as they lie. Those further on are asked for meanwhile, if `ask`.
template <class P, class T, int Rows>
GK_INLINE void scores_of_rows(const typename P::Word* q, int64_t q_stride, const char* const* k, int64_t head_dim,
                              const Ahead& ahead, bool ask, float* s) {
  constexpr int kParts = kSumLanes / kLanes;
  // as many chains as hide the latency of the multiply-add and leave registers for the operands
  constexpr int kKeys = kLanes == 16 ? 4 : kLanes == 8 ? (Rows == 1 ? 4 : 2) : (Rows == 1 ? 2 : 1);
  VecF sums[Rows][kLanes];
  for (int i = 0; i < kLanes; i += kKeys) {
    VecF c[kParts][Rows][kKeys] = {};
    const auto add = [&](int64_t word, auto load_words) GK_LAMBDA_INLINE {
      if (ask) GK_UNROLL
      for (int j = 0; j < kKeys; ++j) ahead.ask(k + i + j, word * P::kPerWord * int64_t(sizeof(T)));
      GK_UNROLL for (int part = 0; part < kParts; ++part) {
        const int64_t w = word + part * kLanes;
        decltype(P::load_words(q)) x[kKeys];
        GK_UNROLL for (int j = 0; j < kKeys; ++j) x[j] =
            bit_cast<decltype(P::load_words(q))>(load_words(reinterpret_cast<const T*>(k[i + j]), w));
        GK_UNROLL for (int r = 0; r < Rows; ++r) {
          const auto q_words = P::load_words(q + r * q_stride + w);
          GK_UNROLL for (int j = 0; j < kKeys; ++j) c[part][r][j] = P::multiply_add(c[part][r][j], q_words, x[j]);
        }
      }
    };
    int64_t w = 0;
    for (; (w + kSumLanes) * P::kPerWord <= head_dim; w += kSumLanes)
      add(w, [](const T* row, int64_t at)
                 GK_LAMBDA_INLINE { return row_words<P>(row + at * P::kPerWord, 0, kLanes * P::kPerWord); });
    if (w * P::kPerWord < head_dim)
      add(w, [&](const T* row, int64_t at)
                 GK_LAMBDA_INLINE { return at * P::kPerWord < head_dim ? row_words<P>(row, at, head_dim) : VecF{}; });
    GK_UNROLL for (int parts = kParts; parts > 1; parts /= 2) GK_UNROLL for (int part = 0; part < parts / 2; ++part)
        GK_UNROLL for (int r = 0; r < Rows; ++r) GK_UNROLL for (int j = 0; j < kKeys; ++j) c[part][r][j] =
            c[part][r][j] + c[part + parts / 2][r][j];
    GK_UNROLL for (int r = 0; r < Rows; ++r) GK_UNROLL for (int j = 0; j < kKeys; ++j) sums[r][i + j] = c[0][r][j];
  }
  GK_UNROLL for (int r = 0; r < Rows; ++r) store(s + r * kStepKeys, sums_of_lanes(sums[r]));
}

// s[Rows][kPackedKeys] of a tile of packed keys: the same sums, with a key in each lane.
template <class P, int Rows>
GK_INLINE void scores_of_tile(const typename P::Word* q, int64_t q_stride, const typename P::Word* k_t, int64_t words,
                              float* s) {
  constexpr int kVectors = kPackedKeys / kLanes;
  static_assert(kSumLanes == 16);
  VecF c[Rows][kVectors], waiting[4][Rows][kVectors];
  for (int i = 0; i < kSumLanes; ++i) {
    const int lane = (i & 1) << 3 | (i & 2) << 1 | (i & 4) >> 1 | (i & 8) >> 3;  // so that halves meet
    multiply<P, 1>(c, q + lane, q_stride, kSumLanes, k_t + lane * kPackedKeys, kSumLanes * kPackedKeys,
                   words / kSumLanes);
    int level = 0;
    for (int done = i; done & 1; done >>= 1, ++level)
      GK_UNROLL for (int r = 0; r < Rows; ++r) GK_UNROLL for (int v = 0; v < kVectors; ++v) c[r][v] =
          waiting[level][r][v] + c[r][v];
    if (level < 4) __builtin_memcpy(waiting[level], c, sizeof c);
  }
  GK_UNROLL for (int r = 0; r < Rows; ++r) GK_UNROLL for (int v = 0; v < kVectors; ++v)
      store(s + r * kStepKeys + v * kLanes, c[r][v]);
}

// ---- probabilities times values ----

// Where the words of V are taken from: words(i, d, ask) are those of keys [i * kPerWord, ...) and dimensions [d, ...).
template <class P>
struct PackedValues {
  const typename P::Word* packed;
  int64_t stride;
  template <bool Whole>
  GK_INLINE auto words(int64_t i, int64_t d, bool) const {
    return P::load_words(packed + i * stride + d);
  }
};
template <class P, class T>
struct ValueRows {
  const char* const* rows;
  int64_t value_dim;
  Ahead ahead;
  template <bool Whole>
  GK_INLINE auto words(int64_t i, int64_t d, bool ask) const {
    if (ask) GK_UNROLL
    for (int h = 0; h < P::kPerWord; ++h) ahead.ask(rows + i * P::kPerWord + h, d * int64_t(sizeof(T)));
    const auto values = [&](const char* row) GK_LAMBDA_INLINE {
      const T* from = reinterpret_cast<const T*>(row);
      return Whole ? row_values(from + d, 0, kLanes) : row_values(from, d, value_dim);
    };
    if constexpr (P::kPerWord == 1)
      return values(rows[i]);
    else
      return pair_words(values(rows[2 * i]), values(rows[2 * i + 1]));
  }
};

// c[Rows][Vectors registers] += P V of words [begin, end) of keys, whole pieces: of each two chains, and folded in order.
template <class P, int Rows, int Vectors, bool Whole, class Values>
GK_INLINE void add_products(const typename P::Word* p, const Values& values, int64_t d, int64_t begin, int64_t end,
                            bool ask, float* c, int64_t c_stride) {
  VecF total[Rows][Vectors];
  GK_UNROLL for (int r = 0; r < Rows; ++r) GK_UNROLL for (int v = 0; v < Vectors; ++v) total[r][v] =
      load(c + r * c_stride + d + v * kLanes);
  for (int64_t piece = begin; piece < end; piece += kPieceWords) {
    VecF sum[2][Rows][Vectors] = {};
    GK_UNROLL for (int i = 0; i < kPieceWords; ++i) {
      decltype(values.template words<Whole>(0, 0, false)) x[Vectors];
      GK_UNROLL for (int v = 0; v < Vectors; ++v) x[v] = values.template words<Whole>(piece + i, d + v * kLanes, ask);
      GK_UNROLL for (int r = 0; r < Rows; ++r) {
        const auto a = P::broadcast_word(p[r * kStepKeys + piece + i]);
        GK_UNROLL for (int v = 0; v < Vectors; ++v) sum[i % 2][r][v] = P::multiply_add(sum[i % 2][r][v], a, x[v]);
      }
    }
    GK_UNROLL for (int r = 0; r < Rows; ++r) GK_UNROLL for (int v = 0; v < Vectors; ++v) total[r][v] =
        total[r][v] + (sum[0][r][v] + sum[1][r][v]);
  }
  GK_UNROLL for (int r = 0; r < Rows; ++r) GK_UNROLL for (int v = 0; v < Vectors; ++v)
      store(c + r * c_stride + d + v * kLanes, total[r][v]);
}

// The same for all of `dims` dimensions: as many registers at a time as two chains and the total leave room for.
template <class P, int Rows, class Values>
GK_INLINE void add_products(const typename P::Word* p, const Values& values, int64_t dims, int64_t begin, int64_t end,
                            bool ask, float* c, int64_t c_stride) {
  constexpr int kVectors = (kLanes == 16 ? 8 : 4) / Rows;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= dims; d += kVectors * kLanes)
    add_products<P, Rows, kVectors, true>(p, values, d, begin, end, ask, c, c_stride);
  for (; d + kLanes <= dims; d += kLanes) add_products<P, Rows, 1, true>(p, values, d, begin, end, ask, c, c_stride);
  if (d < dims) add_products<P, Rows, 1, false>(p, values, d, begin, end, ask, c, c_stride);
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
