// Normal numbers from Philox by Box and Muller's transform, in blocks of kNormalBlock.
// Included inside an instruction-set region after vec.h; include core/noise.h before the region.
//
// The words of counters 16 b ... 16 b + 15 make block b: numbers l and 16 + l from words 0 and 1 of counter 16 b + l,
// 32 + l and 48 + l from words 2 and 3,
//
//   radius = sqrt(-2 ln((w0 >> 9) 2^-23 + 2^-24)),   angle = 2 pi (w1 >> 8) 2^-24,   radius cos(angle), radius sin(angle)
//
// Both fractions are floats, exactly; the largest radius is 5.77.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

template <class V>
struct SinCos {
  V sin, cos;
};

// Of 2 pi (quarters / 4 + s), |s| <= 1/8: below 1 ULP of each, 1.5 without fma. sin(2 pi s) is minimax to 3.8e-9 in
// relative error, cos(2 pi s) to 6.4e-11. tests/ops/test_seeded_normal.py measures both.
GK_INLINE SinCos<VecF> sincos_of_quarters(VecI quarters, VecF s) {
  const VecF square = s * s;
  VecF p = broadcast(-0x1.2dc84cp+6f);
  p = fma(p, square, broadcast(0x1.466004p+6f));
  p = fma(p, square, broadcast(-0x1.4abbbep+5f));
  p = fma(p, square, broadcast(-0x1.777a5cp-23f));  // what 2 pi is short of the float below
  const VecF sine = fma(s, broadcast(0x1.921fb6p+2f), s * p);
  VecF q = broadcast(0x1.d9d57ep+5f);
  q = fma(q, square, broadcast(-0x1.55c5e0p+6f));
  q = fma(q, square, broadcast(0x1.03c1dep+6f));
  q = fma(q, square, broadcast(-0x1.3bd3ccp+4f));
  const VecF cosine = fma(q, square, broadcast(1.0f));
  const VecI swapped = (quarters & 1) != 0;
  const VecI sine_sign = (quarters & 2) << 30, cosine_sign = ((quarters + 1) & 2) << 30;
  return {bit_cast<VecF>(bit_cast<VecI>(swapped ? cosine : sine) ^ sine_sign),
          bit_cast<VecF>(bit_cast<VecI>(swapped ? sine : cosine) ^ cosine_sign)};
}

// Of 2 pi turns, |turns| <= 2^20.
GK_INLINE SinCos<VecF> sincos_of_turns(VecF turns) {
  const VecF shifter = broadcast(0x1.8p23f);
  const VecF shifted = fma(turns, broadcast(4.0f), shifter);
  return sincos_of_quarters(bit_cast<VecI>(shifted) - 0x4b400000, fma(shifted - shifter, broadcast(-0.25f), turns));
}
GK_INLINE SinCos<VecD> sincos_of_turns(VecD turns) {
  SinCos<VecD> y;
  for (int i = 0; i < kLanesOf<double>; ++i) {
    const double quarters = __builtin_rint(4 * turns[i]), angle = 6.283185307179586477 * (turns[i] - quarters / 4);
    const double sine = __builtin_sin(angle), cosine = __builtin_cos(angle);
    const int quarter = quarters == quarters ? int(quarters) & 3 : 0;
    y.sin[i] = quarter == 0 ? sine : quarter == 1 ? cosine : quarter == 2 ? -sine : -cosine;
    y.cos[i] = quarter == 0 ? cosine : quarter == 1 ? -sine : quarter == 2 ? -cosine : sine;
  }
  return y;
}

// sqrt(-2 ln u) for 2^-24 <= u < 1. u = m 2^e with m in [sqrt 1/2, sqrt 2], so that the logarithm keeps its relative
// accuracy near 1; log(1 + f) = f - f^2 / 2 + f^3 P(f), minimax to 5.8e-9.
GK_INLINE VecF normal_radius(VecF u) {
  const VecI bits = bit_cast<VecI>(u), exponent = (bits - 0x3f3504f3) >> 23;
  const VecF e = __builtin_convertvector(exponent, VecF), f = bit_cast<VecF>(bits - (exponent << 23)) - 1.0f;
  VecF p = broadcast(-0x1.38b54cp-4f);
  p = fma(p, f, broadcast(0x1.055d6ap-3f));
  p = fma(p, f, broadcast(-0x1.0d8638p-3f));
  p = fma(p, f, broadcast(0x1.22d9eap-3f));
  p = fma(p, f, broadcast(-0x1.547228p-3f));
  p = fma(p, f, broadcast(0x1.99a00ap-3f));
  p = fma(p, f, broadcast(-0x1.000228p-2f));
  p = fma(p, f, broadcast(0x1.555554p-2f));
  p = fma(p, f, broadcast(-0.5f));
  VecF y = fma(e, broadcast(0x1.7f7d1cp-20f), f * f * p);
  y = fma(e, broadcast(0x1.62e4p-1f), f + y);  // e times this is exact
  return sqrt(y * -2.0f);
}
GK_INLINE VecD normal_radius(VecD u) {
  VecD y;
  for (int i = 0; i < kLanesOf<double>; ++i) y[i] = __builtin_sqrt(-2 * __builtin_log(u[i]));
  return y;
}

template <class C>
GK_INLINE Vec<C> to_fractions(const uint32_t* words, int drop) {
  Vec<C> u;
  if constexpr (sizeof(C) == 4) {
    VecU w;
    __builtin_memcpy(&w, words, sizeof w);
    u = __builtin_convertvector(VecI(w >> drop), VecF);
  } else {
    for (int i = 0; i < kLanesOf<C>; ++i) u[i] = double(words[i] >> drop);
  }
  return u;
}

// z[kNormalBlock] = block `block` of the numbers of a seed, offset and stream. Not inlined: in some callers GCC would then
// not vectorise Philox, which doubles the time.
template <class C>
[[gnu::noinline]] void normal_block(uint64_t seed, uint32_t offset, NoiseStream stream, int64_t block, C* z) {
  constexpr int kCounters = kNormalBlock / 4;
  uint32_t low[kCounters], high[kCounters], words[4][kCounters];
  for (int l = 0; l < kCounters; ++l) {
    low[l] = uint32_t(block * kCounters + l);
    high[l] = uint32_t(uint64_t(block * kCounters) >> 32);
  }
  philox<kCounters>(offset, low, high, uint32_t(stream), seed, words);
  for (int w = 0; w < 4; w += 2)
    for (int l = 0; l < kCounters; l += kLanesOf<C>) {
      const Vec<C> u = (to_fractions<C>(words[w] + l, 9) + C(0.5)) * C(0x1p-23);
      const Vec<C> radius = normal_radius(u);
      const auto angle = sincos_of_turns(to_fractions<C>(words[w + 1] + l, 8) * C(0x1p-24));
      store(z + w * kCounters + l, radius * angle.cos);
      store(z + (w + 1) * kCounters + l, radius * angle.sin);
    }
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
