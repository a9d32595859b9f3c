// A tile of dot products: rows of A times rows of B with the contraction in the lanes, and the sums over lanes.
// Included inside an instruction-set region after vec.h, tile_gemm.h and transpose.h.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// Registers that hold the partial sums of one element: 64 bytes whatever the instruction set, so that all have the same
// order of additions.
constexpr int kDotRegisters = 64 / kRegisterBytes;
// 4 x 6 accumulators + 4 + 1 registers are 29 of AVX-512's 32, and (4 + 6) / 24 loads a multiply-add; 2 x 3 x 2 of AVX2.
constexpr int kDotRows = GENAI_KERNELS_ISA_LANES == 16 ? 4 : 2;
constexpr int kDotColumns = GENAI_KERNELS_ISA_LANES == 16 ? 6 : 3;

// sums[i] = x[i][0] + x[i][1] + ... as a tree: halves are added to each other. Count <= lanes.
template <class C, int Count>
GK_INLINE Vec<C> add_lanes(Vec<C> (&x)[Count]) {
  constexpr int kStep = kLanesOf<C>;
#if GENAI_KERNELS_ISA_LANES == 16
  if constexpr (sizeof(C) == 4 && (Count == 16 || Count == 8)) {
    // Each round adds the halves of every group of lanes, and puts the groups of two registers side by side; the last
    // round of 8 has no second register.
    const auto round = [](VecF a, VecF b, __m512i low, __m512i high) GK_LAMBDA_INLINE {
      return (VecF)_mm512_permutex2var_ps((__m512)a, low, (__m512)b) +
             (VecF)_mm512_permutex2var_ps((__m512)a, high, (__m512)b);
    };
    const __m512i low8 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const __m512i low4 = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    const __m512i low2 = _mm512_setr_epi32(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    const __m512i low1 = _mm512_setr_epi32(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    const auto high = [](__m512i low, int by) GK_LAMBDA_INLINE { return _mm512_add_epi32(low, _mm512_set1_epi32(by)); };
    constexpr int kHalf = Count / 2;
    VecF y[kHalf];
    GK_UNROLL for (int i = 0; i < kHalf; ++i) y[i] = round(x[i], x[i + kHalf], low8, high(low8, 8));
    GK_UNROLL for (int i = 0; i < kHalf / 2; ++i) y[i] = round(y[i], y[i + kHalf / 2], low4, high(low4, 4));
    GK_UNROLL for (int i = 0; i < kHalf / 4; ++i) y[i] = round(y[i], y[i + kHalf / 4], low2, high(low2, 2));
    if constexpr (Count == 16) return round(y[0], y[1], low1, high(low1, 1));
    const VecF sum = round(y[0], y[0], low1, high(low1, 1));  // every sum twice
    return (VecF)_mm512_maskz_compress_ps(0x5555, (__m512)sum);
  }
#endif
  Vec<C> square[kStep] = {};
  GK_UNROLL for (int i = 0; i < Count; ++i) square[i] = x[i];
  transpose(square);
  GK_UNROLL for (int width = kStep / 2; width > 0; width /= 2) GK_UNROLL for (int i = 0; i < width; ++i) square[i] =
      square[i] + square[i + width];
  return square[0];
}

// sum[r * Columns + c] += the products of row r of A, packed, and row c of B, `depth` elements of each; a sum in each lane.
template <class P, int Rows, int Columns, class T>
GK_INLINE void dot_tile(const typename P::Word* a, int64_t a_stride, const T* const (&b)[Columns], int64_t depth,
                        Vec<typename P::Compute> (&sum)[Rows * Columns][kDotRegisters]) {
  using C = typename P::Compute;
  constexpr int kStep = kLanesOf<C> * kDotRegisters;  // words in a step
  const auto step = [&](int64_t word, int64_t depth, auto load_b) GK_LAMBDA_INLINE {
    GK_UNROLL for (int h = 0; h < kDotRegisters; ++h) {
      const int64_t at = word + h * kLanesOf<C>;
      if (at * P::kPerWord >= depth) continue;  // nothing was packed there
      decltype(P::load_words(a)) x[Rows];
      GK_UNROLL for (int r = 0; r < Rows; ++r) x[r] = P::load_words(a + r * a_stride + at);
      GK_UNROLL for (int c = 0; c < Columns; ++c) {
        const auto y = bit_cast<decltype(P::load_words(a))>(load_b(b[c], at));
        GK_UNROLL for (int r = 0; r < Rows; ++r) sum[r * Columns + c][h] =
            P::multiply_add(sum[r * Columns + c][h], x[r], y);
      }
    }
  };
  int64_t word = 0;
  for (; (word + kStep) * P::kPerWord <= depth; word += kStep)
    step(word, (word + kStep) * P::kPerWord, [](const T* row, int64_t at) GK_LAMBDA_INLINE {
      return load_row_words<P>(row, at, (at + kLanesOf<C>)*P::kPerWord);
    });
  if (word * P::kPerWord < depth)
    step(word, depth, [&](const T* row, int64_t at) GK_LAMBDA_INLINE { return load_row_words<P>(row, at, depth); });
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
