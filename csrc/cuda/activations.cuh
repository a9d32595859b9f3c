// SiLU and both GELUs of one number, and their derivatives, by the formulas of cpu/activations.h.
//
// The three gates are x * S(x) with S a sigmoid: S(-a) = 1 - S(a). With a = |x| and the tail T(a) = S(-a), which decays,
//   value = max(x, 0) - a T(a),   slope = S(x) + x S'(a),
// so that large |x| overflows nowhere. Where the results go into 16-bit numbers (kFine = false) the card's own ex2 and
// rcp are used, 2 ULP of float: the arithmetic must cost less than the memory, about 50 instructions an element.
#pragma once
#include "cuda/ptx.cuh"

namespace genai_kernels {

// T(a) = fraction * 2^exponent for 0 <= a, and the density S'(a).
struct Tail {
  float fraction;
  int exponent;
  float density;
};

// y * 2^n, rounded once, -252 <= n <= 254: in two factors, of which the first is exact.
GK_DEVICE float times_power(float y, int n) {
  const int half = n >> 1;
  return y * __int_as_float((half + 127) << 23) * __int_as_float((n - half + 127) << 23);
}

// e^x = fraction * 2^exponent with fraction in [0.7, 1.42], for -150 <= x <= 150; NaN stays NaN. x = n ln2 + r in two
// pieces of ln2, e^r by a minimax polynomial of degree 6.
struct ExpParts {
  float fraction;
  int exponent;
};
GK_DEVICE ExpParts exp_parts(float x) {
  const float shifted = __fmaf_rn(x, 0x1.715476p+0f, 0x1.8p23f), n = __fadd_rn(shifted, -0x1.8p23f);
  float r = __fmaf_rn(n, -0x1.62e4p-1f, x);
  r = __fmaf_rn(n, -0x1.7f7d1cp-20f, r);
  float p = 0x1.6ae68ep-10f;
  p = __fmaf_rn(p, r, 0x1.12682ep-7f);
  p = __fmaf_rn(p, r, 0x1.555826p-5f);
  p = __fmaf_rn(p, r, 0x1.555418p-3f);
  p = __fmaf_rn(p, r, 0x1.fffffcp-2f);
  p = __fmaf_rn(p * r, r, r);
  return {p + 1.0f, __float_as_int(shifted) - 0x4b400000};
}

// a / b for 1 <= b <= 2^24, to half a unit in the last place or hardly more.
GK_DEVICE float quotient(float a, float b) {
  const float r = reciprocal_approx(b), q = a * r;
  return __fmaf_rn(__fmaf_rn(-q, b, a), r, q);
}

GK_DEVICE float at_most(float limit, float x) { return x > limit ? limit : x; }  // NaN stays NaN

// T of the logistic function at u >= 0: e^-u / (1 + e^-u).
template <bool kFine>
GK_DEVICE Tail logistic_tail(float u) {
  if constexpr (kFine) {
    const ExpParts e = exp_parts(-u);
    const float fraction = quotient(e.fraction, 1.0f + times_power(e.fraction, e.exponent));
    const float tail = times_power(fraction, e.exponent);
    return {fraction, e.exponent, tail - tail * tail};
  } else {
    const float e = exp2_approx(u * -0x1.715476p+0f), r = reciprocal_approx(1.0f + e), tail = e * r;
    return {tail, 0, tail * r};
  }
}

struct Silu {
  template <bool kFine>
  GK_DEVICE static Tail tail(float a) {
    return logistic_tail<kFine>(at_most(110.0f, a));
  }
};

// x * S(x), S(x) = (1 + tanh(u / 2)) / 2 = 1 / (1 + e^-u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  template <bool kFine>
  GK_DEVICE static Tail tail(float a) {
    constexpr float kLinear = 1.5957691216057308f, kCubic = float(1.5957691216057308 * 0.044715);
    a = at_most(11.0f, a);  // the tail is 0 from here on
    const float square = a * a;
    Tail t = logistic_tail<kFine>(a * __fmaf_rn(square, kCubic, kLinear));
    t.density *= __fmaf_rn(square, 3 * kCubic, kLinear);
    return t;
  }
};

// x * S(x), S the normal distribution: T(a) = erfc(a / sqrt 2) / 2 = e^(-a^2/2) h(a). h is a polynomial of degree 9 in
// t = 1 / (1 + 0.35 a), minimax in relative error (3.2e-8) over the a of which the tail is not 0. Up to 1.25, where most
// values are, 1/2 - a q(a^2) rounds less often.
struct GeluErf {
  template <bool kFine>
  GK_DEVICE static Tail tail(float a) {
    a = at_most(14.6f, a);
    const float square = a * a, divisor = __fmaf_rn(a, 0.35f, 1.0f);
    const float t = kFine ? quotient(1.0f, divisor) : reciprocal_approx(divisor);
    float h = -0x1.ddb9a4p-6f;
    h = __fmaf_rn(h, t, 0x1.26fa0cp-3f);
    h = __fmaf_rn(h, t, -0x1.05fb06p-2f);
    h = __fmaf_rn(h, t, 0x1.464a38p-3f);
    h = __fmaf_rn(h, t, -0x1.7c5408p-6f);
    h = __fmaf_rn(h, t, 0x1.b05844p-4f);
    h = __fmaf_rn(h, t, 0x1.eac99ep-4f);
    h = __fmaf_rn(h, t, 0x1.1e70c6p-3f);
    h = __fmaf_rn(h, t, 0x1.1df1c6p-3f);
    if constexpr (kFine) {
      const ExpParts e = exp_parts(square * -0.5f);
      // what the rounding of a^2 lost; e^x multiplies it by a^2 / 2
      const float fraction = __fmaf_rn(e.fraction, __fmaf_rn(a, a, -square) * -0.5f, e.fraction);
      float q = -0x1.b5742cp-18f;
      q = __fmaf_rn(q, square, 0x1.cc6194p-14f);
      q = __fmaf_rn(q, square, -0x1.35cc1cp-10f);
      q = __fmaf_rn(q, square, 0x1.46b952p-7f);
      q = __fmaf_rn(q, square, -0x1.105796p-4f);
      q = __fmaf_rn(q, square, 0x1.988450p-2f);
      const bool central = a < 1.25f;
      return {central ? __fmaf_rn(-a, q, 0.5f) : fraction * (h * t), central ? 0 : e.exponent,
              times_power(fraction, e.exponent) * 0.3989422804f};
    } else {
      const float e = exp2_approx(square * -0x1.715476p-1f);
      return {e * (h * t), 0, e * 0.3989422804f};
    }
  }
};

// x S(x); NaN at -inf as in PyTorch, where it is -inf * 0.
template <class Gate, bool kFine>
GK_DEVICE float gate_value(float x) {
  const float a = fabsf(x), positive = x > 0 ? x : 0;
  const Tail t = Gate::template tail<kFine>(a);
  const float product = at_most(110.0f, a) * t.fraction;
  const float y = positive - (kFine ? times_power(product, t.exponent) : product);
  return x == -INFINITY ? NAN : y;
}

// The same and its derivative.
template <class Gate, bool kFine>
GK_DEVICE void gate_value_and_slope(float x, float& value, float& slope) {
  const float a = fabsf(x), clamped = at_most(110.0f, a), positive = x > 0 ? x : 0;
  const Tail t = Gate::template tail<kFine>(a);
  const float tail = kFine ? times_power(t.fraction, t.exponent) : t.fraction;
  value = positive - clamped * tail;
  slope = __fmaf_rn(x < 0 ? -clamped : clamped, t.density, x < 0 ? tail : 1.0f - tail);
}

}  // namespace genai_kernels
