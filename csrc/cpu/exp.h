// Exponentials of one register. Included inside an instruction-set region after vec.h.
// The errors stated are checked over every float by tests/kernels/exp_check.cpp.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLn2 = 0x1.62e430p-1f;

// 2^t for t <= 0, for softmax: exactly 1 at 0, exactly 0 below -126, NaN stays NaN. t = n + r with |r| <= 1/2; n is read
// off the low mantissa bits of t + 1.5 * 2^23 (the bias 127 is in the constant); 2^r is a minimax polynomial with p(0) =
// 1: relative error before rounding 2.0e-9 (degree 6), 2.9e-6 where the results go into 16-bit numbers (degree 4).
template <bool Fine>
GK_INLINE VecF exp2_nonpositive(VecF t) {
  const VecF shifter = broadcast(0x1.8000fep23f);  // 1.5 * 2^23 + 127
  const VecF shifted = t + shifter;
  const VecF r = t - (shifted - shifter);
  VecF p;
  if constexpr (Fine) {
    p = broadcast(0x1.41fb2cp-13f);
    p = fma(p, r, broadcast(0x1.5f3f30p-10f));
    p = fma(p, r, broadcast(0x1.3b2d50p-7f));
    p = fma(p, r, broadcast(0x1.c6aee6p-5f));
    p = fma(p, r, broadcast(0x1.ebfbdcp-3f));
    p = fma(p, r, broadcast(0x1.62e430p-1f));
  } else {
    p = broadcast(0x1.3a0228p-7f);
    p = fma(p, r, broadcast(0x1.c9fdecp-5f));
    p = fma(p, r, broadcast(0x1.ec0380p-3f));
    p = fma(p, r, broadcast(0x1.62e12ap-1f));
  }
  p = fma(p, r, broadcast(1.0f));
  const VecF power = bit_cast<VecF>(bit_cast<VecI>(shifted) << 23);
#if GENAI_KERNELS_ISA_LANES == 16
  const __mmask16 representable = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return (VecF)_mm512_maskz_mul_ps(representable, (__m512)p, (__m512)power);
#else
  const VecF y = p * power;
  return t < broadcast(-126.0f) ? VecF{} : y;
#endif
}
template <bool Fine>
GK_INLINE VecD exp2_nonpositive(VecD t) {
  VecD y;
  for (int i = 0; i < kLanesOf<double>; ++i) y[i] = __builtin_exp2(t[i]);
  return y;
}

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

// y * 2^n, rounded once, -252 <= n <= 254. On AVX-512 one instruction, which takes n as a float; elsewhere in two
// factors, of which the first is exact: neither 2^128 nor a denormal power is a float.
#if GENAI_KERNELS_ISA_LANES == 16
using Exponent = VecF;
#else
using Exponent = VecI;
#endif
GK_INLINE VecF times_power(VecF y, Exponent n) {
#if GENAI_KERNELS_ISA_LANES == 16
  return (VecF)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  const VecI half = n >> 1;
  return y * bit_cast<VecF>((half + 127) << 23) * bit_cast<VecF>((n - half + 127) << 23);
#endif
}

// e^x = fraction * 2^exponent with fraction in [0.7, 1.42], for -150 <= x <= 150; NaN stays NaN. x = n ln2 + r in two
// pieces of ln2 (the first has 15 bits, so that n times it is exact), e^r by a minimax polynomial of degree 6.
struct ExpParts {
  VecF fraction;
  Exponent exponent;
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
#if GENAI_KERNELS_ISA_LANES == 16
  return {p + broadcast(1.0f), n};
#else
  return {p + broadcast(1.0f), bit_cast<VecI>(shifted) - 0x4b400000};
#endif
}

// e^x, at most 2 ULP, denormal results included: exactly 1 at 0, infinity above 88.7228, NaN stays NaN.
GK_INLINE VecF exp(VecF x) {
  // min and max keep a NaN of their second operand
  const ExpParts e = exp_parts(min(broadcast(89.0f), max(broadcast(-105.0f), x)));
  return times_power(e.fraction, e.exponent);
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
