// Transposes a square of registers. Included inside an instruction-set region after vec.h.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// The lower (upper) halves of a and b, interleaved: a0 b0 a1 b1 ...
GK_INLINE VecF interleave_low(VecF a, VecF b) {
#if GENAI_KERNELS_ISA_LANES == 16
  const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  return (VecF)_mm512_permutex2var_ps((__m512)a, from, (__m512)b);
#elif GENAI_KERNELS_ISA_LANES == 8
  const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b), high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  return (VecF)_mm256_permute2f128_ps(low, high, 0x20);
#else
  return VecF{a[0], b[0], a[1], b[1]};
#endif
}
GK_INLINE VecF interleave_high(VecF a, VecF b) {
#if GENAI_KERNELS_ISA_LANES == 16
  const __m512i from = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return (VecF)_mm512_permutex2var_ps((__m512)a, from, (__m512)b);
#elif GENAI_KERNELS_ISA_LANES == 8
  const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b), high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  return (VecF)_mm256_permute2f128_ps(low, high, 0x31);
#else
  return VecF{a[2], b[2], a[3], b[3]};
#endif
}

// x[i] lane j <-> x[j] lane i. Each round interleaves the two halves of the rows, which rotates the bits of the index
// (row, lane) by one; after log2(lanes) rounds row and lane have changed places.
GK_INLINE void transpose(VecF (&x)[kLanes]) {
  GK_UNROLL for (int round = 1; round < kLanes; round *= 2) {
    VecF y[kLanes];
    GK_UNROLL for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + kLanes / 2]);
      y[2 * i + 1] = interleave_high(x[i], x[i + kLanes / 2]);
    }
    GK_UNROLL for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}
GK_INLINE void transpose(VecD (&x)[kLanes / 2]) {
  for (int i = 0; i < kLanes / 2; ++i)
    for (int j = 0; j < i; ++j) {
      const double upper = x[j][i];
      x[j][i] = x[i][j];
      x[i][j] = upper;
    }
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
