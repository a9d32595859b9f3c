// sigmoid, SiLU and both GELUs of one register, and their derivatives.
// Included inside an instruction-set region after exp.h. Errors: tests/kernels/exp_check.cpp, over every bfloat16.
//
// The three gates are x * S(x) with S a sigmoid: S(-a) = 1 - S(a). With a = |x| and the tail T(a) = S(-a), which decays,
//   value = max(x, 0) - a T(a),   slope = S(x) + x S'(a),
// so that large |x| overflows nowhere, and T's power of two is multiplied last: a T(a) underflows only where it must.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

template <class V>
GK_INLINE V absolute(V x) {
  return x < V{} ? -x : x;
}
template <>
GK_INLINE VecF absolute(VecF x) {
  return bit_cast<VecF>(bit_cast<VecI>(x) & 0x7fffffff);
}

// T(a) = fraction * 2^exponent for 0 <= a, and the density S'(a).
struct Tail {
  VecF fraction;
  Exponent exponent;
  VecF density;
};
struct TailD {
  VecD tail, density;
};

// T of the logistic function at u >= 0: e^-u / (1 + e^-u).
GK_INLINE Tail logistic_tail(VecF u) {
  const ExpParts e = exp_parts(-u);
  const VecF fraction = e.fraction * reciprocal(broadcast(1.0f) + times_power(e.fraction, e.exponent));
  const VecF tail = times_power(fraction, e.exponent);
  return {fraction, e.exponent, tail - tail * tail};
}
GK_INLINE TailD logistic_tail(VecD u) {
  const VecD e = exp(-u), tail = e / (broadcast(1.0) + e);
  return {tail, tail - tail * tail};
}

struct Silu {
  GK_INLINE static Tail tail(VecF a) { return logistic_tail(min(broadcast(110.0f), a)); }
  GK_INLINE static TailD tail(VecD a) { return logistic_tail(a); }
};

// x * S(x), S(x) = (1 + tanh(u / 2)) / 2 = 1 / (1 + e^-u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  template <class C, class R>
  GK_INLINE static R tail_of(Vec<C> a) {
    constexpr C kLinear = C(1.5957691216057308), kCubic = C(1.5957691216057308 * 0.044715);
    a = min(broadcast(C(sizeof(C) == 8 ? 25 : 11)), a);  // the tail is 0 from here on
    const Vec<C> square = a * a;
    R t = logistic_tail(a * fma(square, broadcast(kCubic), broadcast(kLinear)));
    t.density = t.density * fma(square, broadcast(3 * kCubic), broadcast(kLinear));
    return t;
  }
  GK_INLINE static Tail tail(VecF a) { return tail_of<float, Tail>(a); }
  GK_INLINE static TailD tail(VecD a) { return tail_of<double, TailD>(a); }
};

// x * S(x), S the normal distribution: T(a) = erfc(a / sqrt 2) / 2 = e^(-a^2/2) h(a). h is a polynomial of degree 9 in
// t = 1 / (1 + 0.35 a), minimax in relative error (3.2e-8) over the a of which the tail is not 0. Up to 1.25, where most
// values are, 1/2 - a q(a^2) rounds less often.
struct GeluErf {
  GK_INLINE static Tail tail(VecF a) {
    a = min(broadcast(14.6f), a);
    const VecF square = a * a;
    const ExpParts e = exp_parts(square * -0.5f);
    // what the rounding of a^2 lost; e^x multiplies it by a^2 / 2
    const VecF fraction = fma(e.fraction, fma(a, a, -square) * -0.5f, e.fraction);
    const VecF t = 1.0f / fma(a, broadcast(0.35f), broadcast(1.0f));
    VecF h = broadcast(-0x1.ddb9a4p-6f);
    h = fma(h, t, broadcast(0x1.26fa0cp-3f));
    h = fma(h, t, broadcast(-0x1.05fb06p-2f));
    h = fma(h, t, broadcast(0x1.464a38p-3f));
    h = fma(h, t, broadcast(-0x1.7c5408p-6f));
    h = fma(h, t, broadcast(0x1.b05844p-4f));
    h = fma(h, t, broadcast(0x1.eac99ep-4f));
    h = fma(h, t, broadcast(0x1.1e70c6p-3f));
    h = fma(h, t, broadcast(0x1.1df1c6p-3f));
    VecF q = broadcast(-0x1.b5742cp-18f);
    q = fma(q, square, broadcast(0x1.cc6194p-14f));
    q = fma(q, square, broadcast(-0x1.35cc1cp-10f));
    q = fma(q, square, broadcast(0x1.46b952p-7f));
    q = fma(q, square, broadcast(-0x1.105796p-4f));
    q = fma(q, square, broadcast(0x1.988450p-2f));
    const VecI central = a < broadcast(1.25f);
    return {central ? fma(-a, q, broadcast(0.5f)) : fraction * (h * t), central ? Exponent{} : e.exponent,
            times_power(fraction, e.exponent) * 0.3989422804f};
  }
  GK_INLINE static TailD tail(VecD a) {
    TailD t;
    t.density = exp(a * a * -0.5) * 0.3989422804014326779;
    for (int i = 0; i < kLanesOf<double>; ++i) t.tail[i] = 0.5 * __builtin_erfc(a[i] * 0.70710678118654752440);
    return t;
  }
};

// x S(x); NaN at -inf as in PyTorch, where it is -inf * 0.
template <class Gate>
GK_INLINE VecF gate_value(VecF x) {
  const VecF a = absolute(x);
  const Tail t = Gate::tail(a);
  const VecF clamped = min(broadcast(110.0f), a);
  const VecF y = max(VecF{}, x) - times_power(clamped * t.fraction, t.exponent);
  return x == broadcast(-__builtin_inff()) ? broadcast(__builtin_nanf("")) : y;
}
template <class Gate>
GK_INLINE VecD gate_value(VecD x) {
  const VecD a = absolute(x);
  const VecD y = max(VecD{}, x) - min(broadcast(1e4), a) * Gate::tail(a).tail;
  return x == broadcast(-__builtin_inf()) ? broadcast(__builtin_nan("")) : y;
}

// The same and its derivative.
template <class Gate>
GK_INLINE void gate_value_and_slope(VecF x, VecF& value, VecF& slope) {
  const VecF a = absolute(x);
  const Tail t = Gate::tail(a);
  const VecF clamped = min(broadcast(110.0f), a), tail = times_power(t.fraction, t.exponent);
  value = max(VecF{}, x) - clamped * tail;
  slope = fma(x < VecF{} ? -clamped : clamped, t.density, x < VecF{} ? tail : 1.0f - tail);
}
template <class Gate>
GK_INLINE void gate_value_and_slope(VecD x, VecD& value, VecD& slope) {
  const VecD a = absolute(x);
  const TailD t = Gate::tail(a);
  const VecD clamped = min(broadcast(1e4), a);
  value = max(VecD{}, x) - clamped * t.tail;
  slope = fma(x < VecD{} ? -clamped : clamped, t.density, x < VecD{} ? t.tail : 1.0 - t.tail);
}

GK_INLINE VecF sigmoid(VecF x) {
  const Tail t = Silu::tail(absolute(x));
  const VecF tail = times_power(t.fraction, t.exponent);
  return x < VecF{} ? tail : 1.0f - tail;
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
