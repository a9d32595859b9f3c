// One vector register of floats or doubles, and the loads and stores that convert from and to the stored types.
// Included INSIDE an instruction-set region (foreach_isa.h), hence without an include guard; include core/dtype.h,
// <cstdint> and, on x86, <immintrin.h> before the region (cpu/region_headers.h does).
//
// The types are the compiler's vector extensions: + - * / < and ?: work lane by lane on every instruction set. Only what
// they cannot say is a function here. Nothing contracts a * b + c by itself; fma() is one where the set has it.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

constexpr int kLanes = GENAI_KERNELS_ISA_LANES;  // floats in a register
constexpr int kRegisterBytes = 4 * kLanes;

typedef float VecF __attribute__((vector_size(kRegisterBytes)));
typedef double VecD __attribute__((vector_size(kRegisterBytes)));
typedef int32_t VecI __attribute__((vector_size(kRegisterBytes)));
typedef uint32_t VecU __attribute__((vector_size(kRegisterBytes)));
typedef int64_t VecL __attribute__((vector_size(kRegisterBytes)));
typedef uint16_t VecHalves __attribute__((vector_size(kRegisterBytes / 2)));

template <class C>
struct VecOf;
template <>
struct VecOf<float> {
  using type = VecF;
  using Int = VecI;  // lane-wise integers and comparison results
  using Scalar = int32_t;
};
template <>
struct VecOf<double> {
  using type = VecD;
  using Int = VecL;
  using Scalar = int64_t;
};
template <class C>
using Vec = typename VecOf<C>::type;
template <class C>
using IntVec = typename VecOf<C>::Int;
template <class C>
constexpr int kLanesOf = kRegisterBytes / int(sizeof(C));

#define GK_INLINE [[gnu::always_inline]] inline
#define GK_LAMBDA_INLINE __attribute__((always_inline))
// GCC leaves small arrays of registers in memory unless every loop over them is unrolled.
#define GK_UNROLL _Pragma("GCC unroll 64")

template <class To, class From>
GK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class C>
GK_INLINE Vec<C> broadcast(C x) {
  return x - Vec<C>{};
}
template <class C>
GK_INLINE IntVec<C> broadcast_int(int64_t x) {
  return typename VecOf<C>::Scalar(x) - IntVec<C>{};
}

GK_INLINE VecF fma(VecF a, VecF b, VecF c) {
#if GENAI_KERNELS_ISA_LANES == 16
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif GENAI_KERNELS_ISA_LANES == 8
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
GK_INLINE VecD fma(VecD a, VecD b, VecD c) {
#if GENAI_KERNELS_ISA_LANES == 16
  return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif GENAI_KERNELS_ISA_LANES == 8
  return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// a > b ? a : b, so b where either is NaN.
GK_INLINE VecF max(VecF a, VecF b) {
#if GENAI_KERNELS_ISA_LANES == 16
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif GENAI_KERNELS_ISA_LANES == 8
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
GK_INLINE VecD max(VecD a, VecD b) { return a > b ? a : b; }
template <class V>
GK_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
#if GENAI_KERNELS_ISA_LANES == 16
template <>
GK_INLINE VecF min(VecF a, VecF b) {
  return (VecF)_mm512_min_ps((__m512)a, (__m512)b);
}
#endif

// 1 / d of a finite normal d, at most 1 ULP: on AVX-512 an approximation of 14 bits and a Newton step, a quarter of a
// division's time.
GK_INLINE VecF reciprocal(VecF d) {
#if GENAI_KERNELS_ISA_LANES == 16
  const VecF r = (VecF)_mm512_rcp14_ps((__m512)d);
  return fma(r, fma(-d, r, broadcast(1.0f)), r);
#else
  return 1.0f / d;
#endif
}

GK_INLINE VecF sqrt(VecF x) {
#if GENAI_KERNELS_ISA_LANES == 16
  return (VecF)_mm512_sqrt_ps((__m512)x);
#elif GENAI_KERNELS_ISA_LANES == 8
  return (VecF)_mm256_sqrt_ps((__m256)x);
#else
  VecF y;
  for (int i = 0; i < kLanes; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
#endif
}

// ---- stored types: load and store one register of the compute type ----

GK_INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
GK_INLINE VecD load(const double* p) {
  VecD v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
GK_INLINE void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof v); }
GK_INLINE void store(double* p, VecD v) { __builtin_memcpy(p, &v, sizeof v); }

GK_INLINE VecF widen_bf16(VecHalves h) {
#if GENAI_KERNELS_ISA_LANES == 16
  return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif GENAI_KERNELS_ISA_LANES == 8
  return (VecF)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
  return bit_cast<VecF>(__builtin_convertvector(h, VecU) << 16);
#endif
}
GK_INLINE VecHalves narrow_bf16(VecF v) {  // round to nearest even; NaN stays NaN (its quiet bit is set)
#if GENAI_KERNELS_ISA_BF16
  // vcvtneps2bf16 flushes denormals to zero, unlike every other instruction set here; those lanes are rare.
  const __mmask16 denormal = _mm512_fpclass_ps_mask((__m512)v, 0x20);
  if (__builtin_expect(denormal == 0, 1)) {
    const auto h = _mm512_cvtneps_pbh((__m512)v);
    return bit_cast<VecHalves>(h);
  }
#endif
  const VecU u = bit_cast<VecU>(v);
  const VecU rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const VecU quiet = (u >> 16) | 0x40;
  const VecU is_nan = (VecU)(v != v);
  const VecU out = (rounded & ~is_nan) | (quiet & is_nan);
#if GENAI_KERNELS_ISA_LANES == 16
  return (VecHalves)_mm512_cvtepi32_epi16((__m512i)out);
#else
  return __builtin_convertvector(out, VecHalves);
#endif
}

GK_INLINE float widen_fp16(uint16_t h) {  // exact; for tails and the baseline
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x0400) return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000));
  const float denormal = float(magnitude) * 0x1p-24f;
  return sign ? -denormal : denormal;
}
GK_INLINE uint16_t narrow_fp16(float x) {  // round to nearest even
  const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return uint16_t(sign | 0x7e00 | (a >> 13 & 0x3ff));  // NaN
  if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);                     // rounds to infinity
  if (a >= 0x38800000) return uint16_t(sign | ((a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13));
  const float shifted = bit_cast<float>(a) + 0.5f;  // denormal: the addition rounds at 2^-24
  return uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000));
}
GK_INLINE VecF widen_fp16(VecHalves h) {
#if GENAI_KERNELS_ISA_LANES == 16
  return (VecF)_mm512_cvtph_ps((__m256i)h);
#elif GENAI_KERNELS_ISA_LANES == 8
  return (VecF)_mm256_cvtph_ps((__m128i)h);
#else
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen_fp16(uint16_t(h[i]));
  return v;
#endif
}
GK_INLINE VecHalves narrow_fp16(VecF v) {
#if GENAI_KERNELS_ISA_LANES == 16
  return (VecHalves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif GENAI_KERNELS_ISA_LANES == 8
  return (VecHalves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  VecHalves h;
  for (int i = 0; i < kLanes; ++i) h[i] = narrow_fp16(float(v[i]));
  return h;
#endif
}

GK_INLINE VecF load(const bf16* p) {
  VecHalves h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen_bf16(h);
}
GK_INLINE VecF load(const fp16* p) {
  VecHalves h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen_fp16(h);
}
GK_INLINE void store(bf16* p, VecF v) {
  const VecHalves h = narrow_bf16(v);
  __builtin_memcpy(p, &h, sizeof h);
}
GK_INLINE void store(fp16* p, VecF v) {
  const VecHalves h = narrow_fp16(v);
  __builtin_memcpy(p, &h, sizeof h);
}

// The first `count` lanes (0 <= count <= lanes); the others are zero. Never touches memory beyond the elements: a masked
// access reads and writes nothing where the mask is off, and faults nowhere there.
template <class T>
GK_INLINE Vec<Compute<T>> load_first(const T* p, int64_t count) {
#if GENAI_KERNELS_ISA_LANES == 16
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) return (VecD)_mm512_maskz_loadu_pd(__mmask8(mask), p);
  if constexpr (sizeof(T) == 4) return (VecF)_mm512_maskz_loadu_ps(__mmask16(mask), p);
  if constexpr (sizeof(T) == 2) {
    T padded[kLanes];
    const __m256i halves = _mm256_maskz_loadu_epi16(__mmask16(mask), p);
    __builtin_memcpy(padded, &halves, sizeof padded);
    return load(padded);
  }
#else
  T padded[kLanesOf<Compute<T>>] = {};
  __builtin_memcpy(padded, p, count * sizeof(T));
  return load(padded);
#endif
}
template <class T>
GK_INLINE void store_first(T* p, Vec<Compute<T>> v, int64_t count) {
#if GENAI_KERNELS_ISA_LANES == 16
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, __mmask8(mask), (__m512d)v);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, __mmask16(mask), (__m512)v);
  if constexpr (sizeof(T) == 2) {
    T padded[kLanes];
    __m256i halves;
    store(padded, v);
    __builtin_memcpy(&halves, padded, sizeof halves);
    _mm256_mask_storeu_epi16(p, __mmask16(mask), halves);
  }
#else
  T padded[kLanesOf<Compute<T>>];
  store(padded, v);
  __builtin_memcpy(p, padded, count * sizeof(T));
#endif
}

// Single elements.
GK_INLINE float to_compute(float x) { return x; }
GK_INLINE double to_compute(double x) { return x; }
GK_INLINE float to_compute(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
GK_INLINE float to_compute(fp16 x) { return widen_fp16(x.bits); }
template <class T>
GK_INLINE T from_compute(Compute<T> x) {
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    return x;
  } else {
    T out;
    store_first(&out, broadcast(x), 1);
    return out;
  }
}

// Sum of the lanes in a fixed order (halves are added to each other), the same for every count of rows or threads.
template <class C>
GK_INLINE C horizontal_sum(Vec<C> v) {
  C lanes[kLanesOf<C>];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int width = kLanesOf<C> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
