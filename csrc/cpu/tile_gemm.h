// The one matrix product of the attention kernels: a tile of registers
//
//     C[Rows][Vectors registers] = A[Rows][depth] * B[depth][Vectors registers]
//
// with the elements of A broadcast from memory in whatever layout they lie, and B in rows of registers. Every element of
// C is the same two chains of multiply-adds in the order of depth, whatever Rows, Vectors and the place in the tile: the
// bits of a result do not depend on how a product is cut into tiles. Included inside an instruction-set region after vec.h.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// A tile keeps two chains for each element, the even and the odd words of the contraction: half the rounding error, at
// no cost. 2 x 4 x 3 accumulators + 3 registers of B + 1 of A are 28 of AVX-512's 32 registers and more than hide the
// latency of the multiply-add (4 cycles, two a cycle); (3 + 4) / 12 loads a multiply-add stay under what two load ports
// give. With 16 registers 2 x 2 x 3 does the same.
constexpr int kTileRows = GENAI_KERNELS_ISA_LANES == 16 ? 4 : 2;
constexpr int kTileVectors = 3;

// How a product multiplies: a Word of the contraction is what one lane of a multiply-add takes in.
template <class C>
struct Fma {
  using Compute = C;
  using Word = C;
  static constexpr int kPerWord = 1;
  GK_INLINE static Vec<C> load_words(const Word* p) { return load(p); }
  GK_INLINE static Vec<C> broadcast_word(Word w) { return broadcast(w); }
  // Two rows of B as words, `stride` elements of C apart where they stay apart.
  GK_INLINE static void store_pair(C* to, int64_t stride, const Vec<C> (&rows)[2]) {
    store(to, rows[0]);
    store(to + stride, rows[1]);
  }
  GK_INLINE static Vec<C> multiply_add(Vec<C> c, Vec<C> a, Vec<C> b) { return fma(a, b, c); }
};

#if GENAI_KERNELS_ISA_BF16
// Two bf16 a word: vdpbf16ps adds both products to an fp32 lane.
struct DotBf16 {
  using Compute = float;
  using Word = uint32_t;
  static constexpr int kPerWord = 2;
  GK_INLINE static VecU load_words(const Word* p) {
    VecU v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  GK_INLINE static VecU broadcast_word(Word w) { return w | VecU{}; }
  GK_INLINE static void store_pair(float* to, int64_t, const VecF (&rows)[2]) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]);
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  GK_INLINE static VecF multiply_add(VecF c, VecU a, VecU b) {
    return (VecF)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// c = a * b over `depth` words, in two chains, or in one where a tile needs all registers. Element (row, k) of A is
// a[row * row_stride + k * depth_stride]; row k of B begins at b + k * b_stride.
template <class P, int Chains = 2, int Rows, int Vectors>
GK_INLINE void multiply(Vec<typename P::Compute> (&c)[Rows][Vectors], const typename P::Word* a, int64_t row_stride,
                        int64_t depth_stride, const typename P::Word* b, int64_t b_stride, int64_t depth) {
  constexpr int kStep = kLanesOf<typename P::Compute>;
  Vec<typename P::Compute> sum[Chains][Rows][Vectors] = {};
  const auto step = [&](int chain, const typename P::Word* a_k, const typename P::Word* b_k) GK_LAMBDA_INLINE {
    decltype(P::load_words(b)) row[Vectors];
    GK_UNROLL for (int j = 0; j < Vectors; ++j) row[j] = P::load_words(b_k + j * kStep);
    GK_UNROLL for (int i = 0; i < Rows; ++i) {
      const auto a_ik = P::broadcast_word(a_k[i * row_stride]);
      GK_UNROLL for (int j = 0; j < Vectors; ++j) sum[chain][i][j] = P::multiply_add(sum[chain][i][j], a_ik, row[j]);
    }
  };
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2, a += 2 * depth_stride, b += 2 * b_stride) {
    step(0, a, b);
    step(Chains - 1, a + depth_stride, b + b_stride);
  }
  if (k < depth) step(0, a, b);
  GK_UNROLL for (int i = 0; i < Rows; ++i) GK_UNROLL for (int j = 0; j < Vectors; ++j) c[i][j] =
      Chains == 2 ? sum[0][i][j] + sum[Chains - 1][i][j] : sum[0][i][j];
}

// The same as a sum over pieces of kFold words: chains of 16, at the price of one addition in 32. For backward, whose
// probabilities and dP carry the rounding of one such product each.
constexpr int64_t kFold = 32;
template <class P, int64_t Fold = kFold, int Rows, int Vectors>
GK_INLINE void multiply_folded(Vec<typename P::Compute> (&c)[Rows][Vectors], const typename P::Word* a,
                               int64_t row_stride, int64_t depth_stride, const typename P::Word* b, int64_t b_stride,
                               int64_t depth) {
  multiply<P>(c, a, row_stride, depth_stride, b, b_stride, depth < Fold ? depth : Fold);
  for (int64_t k = Fold; k < depth; k += Fold) {
    Vec<typename P::Compute> piece[Rows][Vectors];
    multiply<P>(piece, a + k * depth_stride, row_stride, depth_stride, b + k * b_stride, b_stride,
                depth - k < Fold ? depth - k : Fold);
    GK_UNROLL for (int i = 0; i < Rows; ++i) GK_UNROLL for (int j = 0; j < Vectors; ++j) c[i][j] =
        c[i][j] + piece[i][j];
  }
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
