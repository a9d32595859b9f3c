// Hyperbolic tangent of one register. Included inside an instruction-set region after vec.h and exp.h.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// Below 0.625 an odd polynomial (x + x^3 P(x^2): 1 - 2 / (e^2x + 1) would cancel), above it the exponential.
GK_INLINE VecF tanh(VecF x) {
  const VecF magnitude = max(x, -x), square = x * x;
  VecF p = broadcast(-5.70498872745e-3f);
  p = fma(p, square, broadcast(2.06390887954e-2f));
  p = fma(p, square, broadcast(-5.37397155531e-2f));
  p = fma(p, square, broadcast(1.33314422036e-1f));
  p = fma(p, square, broadcast(-3.33332819422e-1f));
  const VecF near_zero = fma(p * square, x, x);
  const VecF far = broadcast(1.0f) - broadcast(2.0f) / (exp(magnitude + magnitude) + broadcast(1.0f));
  const VecF signed_far = x < VecF{} ? -far : far;
  const VecF y = magnitude < broadcast(0.625f) ? near_zero : signed_far;
  return x == x ? y : x;
}
GK_INLINE VecD tanh(VecD x) {
  VecD y;
  for (int i = 0; i < kLanesOf<double>; ++i) y[i] = __builtin_tanh(x[i]);
  return y;
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
