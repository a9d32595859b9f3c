// Hyperbolic tangent of one register. Included inside an instruction-set region after vec.h and exp.h.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// Below 0.625 an odd polynomial (x + x^3 P(x^2), minimax in relative error, 4.4e-9: 1 - 2 / (e^2x + 1) would cancel),
// above it the exponential.
GK_INLINE VecF tanh(VecF x) {
  const VecF magnitude = max(x, -x), square = x * x;
  VecF p = broadcast(-0x1.75e1a8p-8f);
  p = fma(p, square, broadcast(0x1.522692p-6f));
  p = fma(p, square, broadcast(-0x1.b83c58p-5f));
  p = fma(p, square, broadcast(0x1.110726p-3f));
  p = fma(p, square, broadcast(-0x1.555532p-2f));
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
