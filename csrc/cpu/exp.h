// Exponentials of one register. Included inside an instruction-set region after vec.h.
// The errors stated are checked over every float by tests/kernels/exp_check.cpp.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLn2 = 0x1.62e430p-1f;

// e^x for x <= 0, for softmax: exactly 1 at 0, exactly 0 below -87.3 (where it would be denormal), NaN stays NaN. x = n
// ln2 + r in two pieces of ln2; n is read off the low mantissa bits of x log2(e) + 1.5 * 2^23 (the bias 127 is in the
// constant), e^r is a minimax polynomial of degree 6 with p(0) = 1: relative error 2.0e-9 before rounding.
GK_INLINE VecF exp_nonpositive(VecF x) {
  const VecF shifter = broadcast(0x1.8000fep23f);  // 1.5 * 2^23 + 127
  const VecF shifted = fma(x, broadcast(kLog2E), shifter);
  const VecF n = shifted - shifter;
  VecF r = fma(n, broadcast(-0x1.62e4p-1f), x);
  r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
  VecF p = broadcast(0x1.6ae68ep-10f);
  p = fma(p, r, broadcast(0x1.12682ep-7f));
  p = fma(p, r, broadcast(0x1.555826p-5f));
  p = fma(p, r, broadcast(0x1.555418p-3f));
  p = fma(p, r, broadcast(0x1.fffffcp-2f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  const VecF power = bit_cast<VecF>(bit_cast<VecI>(shifted) << 23);
#if GENAI_KERNELS_ISA_LANES == 16
  const __mmask16 representable = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
  return (VecF)_mm512_maskz_mul_ps(representable, (__m512)p, (__m512)power);
#else
  const VecF y = p * power;
  return x < broadcast(-87.3f) ? VecF{} : y;
#endif
}
GK_INLINE VecD exp_nonpositive(VecD x) {
  VecD y;
  for (int i = 0; i < kLanesOf<double>; ++i) y[i] = __builtin_exp(x[i]);
  return y;
}

// e^x: exactly 1 at 0, 0 below -87.3365 (where the result would be denormal), infinity above 88.7228, NaN stays NaN;
// at most 2 ULP elsewhere. x = n ln2 + r in two pieces of ln2 (the first has 15 bits, so that n times it is exact),
// e^r by a minimax polynomial of degree 6; 2^n in two factors, since 2^128 is not a float.
GK_INLINE VecF exp(VecF x) {
  const VecF shifter = broadcast(0x1.8p23f);
  const VecF clamped = min(max(broadcast(-88.0f), x), broadcast(89.0f));  // max keeps a NaN of its second operand
  const VecF shifted = fma(clamped, broadcast(kLog2E), shifter);
  const VecF n = shifted - shifter;
  VecF r = fma(n, broadcast(-0x1.62e4p-1f), clamped);
  r = fma(n, broadcast(-0x1.7f7d1cp-20f), r);
  VecF p = broadcast(0x1.6ae68ep-10f);
  p = fma(p, r, broadcast(0x1.12682ep-7f));
  p = fma(p, r, broadcast(0x1.555826p-5f));
  p = fma(p, r, broadcast(0x1.555418p-3f));
  p = fma(p, r, broadcast(0x1.fffffcp-2f));
  p = fma(p * r, r, r);
  p = p + broadcast(1.0f);
  const VecI exponent = bit_cast<VecI>(shifted) - 0x4b400000;
  const VecI half = exponent >> 1;
  const VecF power0 = bit_cast<VecF>((half + 127) << 23), power1 = bit_cast<VecF>((exponent - half + 127) << 23);
  const VecF y = p * power0 * power1;
  return x < broadcast(-87.3365f) ? VecF{} : (x == x ? y : x);
}
GK_INLINE VecD exp(VecD x) {
  VecD y;
  for (int i = 0; i < kLanesOf<double>; ++i) y[i] = __builtin_exp(x[i]);
  return y;
}

// Natural logarithm, for one number per row: not worth a vector form.
GK_INLINE float log(float x) { return __builtin_logf(x); }
GK_INLINE double log(double x) { return __builtin_log(x); }

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
