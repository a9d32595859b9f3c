// The exponential in two parts, for results whose power of two must be multiplied last: they may be far below e^x's own
// smallest number. Included inside an instruction-set region after exp.h.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// y * 2^n, rounded once, -252 <= n <= 254. On AVX-512 one instruction; elsewhere in two factors, of which the first is
// exact: neither 2^128 nor a denormal power is a float.
GK_INLINE VecF times_power(VecF y, VecI n) {
#if GENAI_KERNELS_ISA_LANES == 16
  return (VecF)_mm512_scalef_ps((__m512)y, _mm512_cvtepi32_ps((__m512i)n));
#else
  const VecI half = n >> 1;
  return y * bit_cast<VecF>((half + 127) << 23) * bit_cast<VecF>((n - half + 127) << 23);
#endif
}

// e^x = fraction * 2^exponent with fraction in [0.7, 1.42], for -150 <= x <= 150; NaN stays NaN. x = n ln2 + r in two
// pieces of ln2 (the first has 15 bits, so that n times it is exact), e^r by a minimax polynomial of degree 6.
struct ExpParts {
  VecF fraction;
  VecI exponent;
};
GK_INLINE ExpParts exp_parts(VecF x) {
  const VecF shifter = broadcast(0x1.8p23f);
  const VecF shifted = fma(x, broadcast(kLog2E), shifter);
  const VecF n = shifted - shifter;
  VecF r = fma(n, broadcast(-0x1.62e4p-1f), x);
  r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
  VecF p = broadcast(0x1.6ae68ep-10f);
  p = fma(p, r, broadcast(0x1.12682ep-7f));
  p = fma(p, r, broadcast(0x1.555826p-5f));
  p = fma(p, r, broadcast(0x1.555418p-3f));
  p = fma(p, r, broadcast(0x1.fffffcp-2f));
  p = fma(p * r, r, r);
  return {p + broadcast(1.0f), bit_cast<VecI>(shifted) - 0x4b400000};
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
