// The one matrix product of the attention kernels: a tile of registers
//
//     C[Rows][Vectors registers] += A[Rows][depth] * B[depth][Vectors registers]
//
// with the elements of A broadcast from memory in whatever layout they lie, and B in rows of registers. Every element of
// C is one chain of multiply-adds in the order of depth, whatever Rows, Vectors and the place in the tile: the bits of
// a result do not depend on how a product is cut into tiles. Included inside an instruction-set region after vec.h.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// 8 x 3 accumulators + 3 registers of B + 1 of A are 28 of AVX-512's 32 registers; 24 independent chains hide the latency
// of the multiply-add (4 cycles, two a cycle), and (3 + 8) / 24 loads a multiply-add stay under what two load ports give.
// With 16 registers 4 x 3 does the same.
constexpr int kTileRows = GENAI_KERNELS_ISA_LANES == 16 ? 8 : 4;
constexpr int kTileVectors = 3;

// How a product multiplies: a Word of the contraction is what one lane of a multiply-add takes in.
template <class C>
struct Fma {
  using Compute = C;
  using Word = C;
  static constexpr int kPerWord = 1;
  static GK_INLINE Vec<C> load_words(const Word* p) { return load(p); }
  static GK_INLINE Vec<C> broadcast_word(Word w) { return broadcast(w); }
  static GK_INLINE Vec<C> multiply_add(Vec<C> c, Vec<C> a, Vec<C> b) { return fma(a, b, c); }
};

#if GENAI_KERNELS_ISA_BF16
// Two bf16 a word: vdpbf16ps adds both products to an fp32 lane.
struct DotBf16 {
  using Compute = float;
  using Word = uint32_t;
  static constexpr int kPerWord = 2;
  static GK_INLINE VecU load_words(const Word* p) {
    VecU v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static GK_INLINE VecU broadcast_word(Word w) { return w | VecU{}; }
  static GK_INLINE VecF multiply_add(VecF c, VecU a, VecU b) {
    return (VecF)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// c += a * b over `depth` words. Element (row, k) of A is a[row * row_stride + k * depth_stride]; row k of B begins at
// b + k * b_stride.
template <class P, int Rows, int Vectors>
GK_INLINE void multiply_add(Vec<typename P::Compute> (&c)[Rows][Vectors], const typename P::Word* a, int64_t row_stride,
                            int64_t depth_stride, const typename P::Word* b, int64_t b_stride, int64_t depth) {
  constexpr int kStep = kLanesOf<typename P::Compute>;
  for (int64_t k = 0; k < depth; ++k, a += depth_stride, b += b_stride) {
    decltype(P::load_words(b)) b_k[Vectors];
    GK_UNROLL for (int j = 0; j < Vectors; ++j) b_k[j] = P::load_words(b + j * kStep);
    GK_UNROLL for (int i = 0; i < Rows; ++i) {
      const auto a_ik = P::broadcast_word(a[i * row_stride]);
      GK_UNROLL for (int j = 0; j < Vectors; ++j) c[i][j] = P::multiply_add(c[i][j], a_ik, b_k[j]);
    }
  }
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
