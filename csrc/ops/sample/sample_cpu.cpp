// Passes over logits on the CPU. The weights are the same integers on every instruction set: double precision, nothing
// but + - * and comparisons in one fixed order, no fused multiply-add (the baseline has none), no library function.
#include "cpu/region_headers.h"
#include "ops/sample/sample.h"

#define GENAI_KERNELS_ISA_FILE "ops/sample/sample_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

typedef float HalfF __attribute__((vector_size(kRegisterBytes / 2)));
typedef int32_t HalfI __attribute__((vector_size(kRegisterBytes / 2)));
constexpr int kDoubles = kLanesOf<double>;
constexpr float kInfinity = __builtin_inff();

// (y - largest) rate, not below -64, whose weight is 0 as that of -infinity is.
GK_INLINE VecD exponent_of(VecD y, const SampleScale& scale) {
  return max((y - broadcast(scale.largest)) * broadcast(scale.rate), broadcast(-64.0));
}

// 2^t in units of 2^-kSampleBits, rounded to an integer, for -64 <= t <= 0; exactly 2^kSampleBits at 0. t = n + r with
// |r| <= 1/2; n is read off the low mantissa bits of t + 1.5 * 2^52; 2^r is an interpolating polynomial of degree 10
// with p(0) = 1: relative error 2^-50.
GK_INLINE VecD weight_of(VecD t) {
  const VecD shifter = broadcast(0x1.8p52);
  const VecD shifted = t + shifter;
  const VecD r = t - (shifted - shifter);
  VecD p = broadcast(0x1.e5e9f548e5725p-28);
  p = p * r + broadcast(0x1.b6571de2f2351p-24);
  p = p * r + broadcast(0x1.62bfe46117445p-20);
  p = p * r + broadcast(0x1.ffcb76789860fp-17);
  p = p * r + broadcast(0x1.4309130378460p-13);
  p = p * r + broadcast(0x1.5d87fe908f88ap-10);
  p = p * r + broadcast(0x1.3b2ab6fba385fp-7);
  p = p * r + broadcast(0x1.c6b08d7044119p-5);
  p = p * r + broadcast(0x1.ebfbdff82c590p-3);
  p = p * r + broadcast(0x1.62e42fefa39f7p-1);
  p = p * r + broadcast(1.0);
  const VecL power = (bit_cast<VecL>(shifted) << 52) + (int64_t(kSampleBits) << 52);
  return (bit_cast<VecD>(bit_cast<VecL>(p) + power) + shifter) - shifter;
}

// f(i, y) for the doubles of x, kDoubles at a time; past the end they are -infinity.
template <class T, class F>
GK_INLINE void for_each_doubles(const T* x, int64_t count, const F& f) {
  const auto both = [&](int64_t i, VecF v) GK_LAMBDA_INLINE {
    HalfF half[2];
    __builtin_memcpy(half, &v, sizeof v);
    f(i, __builtin_convertvector(half[0], VecD));
    f(i + kDoubles, __builtin_convertvector(half[1], VecD));
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) both(i, load(x + i));
  if (i == count) return;
  float rest[kLanes];
  store(rest, load_first(x + i, count - i));
  for (int64_t lane = count - i; lane < kLanes; ++lane) rest[lane] = -kInfinity;
  both(i, load(rest));
}

template <class T>
bool maxima(const T* x, int64_t count, float* out) {
  VecI ordinary = broadcast_int<float>(-1);
  for (int64_t begin = 0; begin < count; begin += kSampleBlock, x += kSampleBlock) {
    const int64_t n = count - begin < kSampleBlock ? count - begin : kSampleBlock;
    VecF most = broadcast(-kInfinity);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const VecF v = load(x + i);
      ordinary &= v < broadcast(kInfinity);
      most = max(v, most);
    }
    float lanes[kLanes];
    store(lanes, most);
    if (i < n) {
      float rest[kLanes];
      const VecF v = load_first(x + i, n - i);  // 0 past the end
      ordinary &= v < broadcast(kInfinity);
      store(rest, v);
      for (int64_t lane = 0; lane < n - i; ++lane) lanes[lane] = rest[lane] > lanes[lane] ? rest[lane] : lanes[lane];
    }
    float largest = lanes[0];
    for (int lane = 1; lane < kLanes; ++lane) largest = lanes[lane] > largest ? lanes[lane] : largest;
    *out++ = largest;
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (!ordinary[lane]) return false;
  return true;
}

template <class T>
int64_t weigh(const T* x, int64_t count, const SampleScale& scale, double low, double least, int64_t* weights) {
  const VecD shifter = broadcast(0x1.8p52);
  VecL sum = {};
  for_each_doubles(x, count, [&](int64_t i, VecD y) GK_LAMBDA_INLINE {
    const VecD w = weight_of(exponent_of(y, scale));
    const VecL kept = (VecL)(y >= broadcast(low)) & (VecL)(w >= broadcast(least));
    const VecL integers = (bit_cast<VecL>(w + shifter) - bit_cast<VecL>(shifter)) & kept;
    __builtin_memcpy(weights + i, &integers, sizeof integers);
    sum += integers;
  });
  int64_t total = 0;
  for (int lane = 0; lane < kDoubles; ++lane) total += sum[lane];
  return total;
}

template <class T>
void classify(const T* x, int64_t count, const SampleScale& scale, int32_t* classes) {
  for_each_doubles(x, count, [&](int64_t i, VecD y) GK_LAMBDA_INLINE {
    const VecD t = max(exponent_of(y, scale), broadcast(-double(kSampleClasses / 32)));
    const HalfI found = __builtin_convertvector(t * broadcast(-32.0), HalfI);
    __builtin_memcpy(classes + i, &found, sizeof found);
  });
}

template <class T>
void widen(const T* x, int64_t stride, int64_t count, float* out) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i));
  for (; i < count; ++i) out[i] = float(load_first(x + i * stride, 1)[0]);
}

// f(x) with x as what it points to; the host admits no float64.
template <class F>
GK_INLINE void as_stored(Dtype dtype, const void* x, const F& f) {
  if (dtype == Dtype::f32) return f(static_cast<const float*>(x));
  if (dtype == Dtype::bf16) return f(static_cast<const bf16*>(x));
  f(static_cast<const fp16*>(x));
}

}  // namespace

bool sample_maxima_kernel(Dtype dtype, const void* x, int64_t count, float* out) {
  bool ordinary = false;
  as_stored(dtype, x, [&](auto* p) { ordinary = maxima(p, count, out); });
  return ordinary;
}

int64_t sample_weights_kernel(Dtype dtype, const void* x, int64_t count, const SampleScale& scale, double low,
                              double least, int64_t* weights) {
  int64_t total = 0;
  as_stored(dtype, x, [&](auto* p) { total = weigh(p, count, scale, low, least, weights); });
  return total;
}

void sample_classes_kernel(Dtype dtype, const void* x, int64_t count, const SampleScale& scale, int32_t* classes) {
  as_stored(dtype, x, [&](auto* p) { classify(p, count, scale, classes); });
}

void sample_widen_kernel(Dtype dtype, const void* x, int64_t stride, int64_t count, float* out) {
  as_stored(dtype, x, [&](auto* p) { widen(p, stride, count, out); });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(bool, sample_maxima_kernel, (Dtype dtype, const void* x, int64_t count, float* maxima),
                           (dtype, x, count, maxima))
GENAI_KERNELS_ISA_DISPATCH(int64_t, sample_weights_kernel,
                           (Dtype dtype, const void* x, int64_t count, const SampleScale& scale, double low,
                            double least, int64_t* weights),
                           (dtype, x, count, scale, low, least, weights))
GENAI_KERNELS_ISA_DISPATCH(void, sample_classes_kernel,
                           (Dtype dtype, const void* x, int64_t count, const SampleScale& scale, int32_t* classes),
                           (dtype, x, count, scale, classes))
GENAI_KERNELS_ISA_DISPATCH(void, sample_widen_kernel,
                           (Dtype dtype, const void* x, int64_t stride, int64_t count, float* out),
                           (dtype, x, stride, count, out))

#endif
