// A step of AdamW on the CPU, and the norm of gradients. Every operation is one that IEEE rounds, in one fixed order and
// without fused multiply-add: the same bits on every instruction set, and in PyTorch's own operations in the reference.
#include "core/rows.h"
#include "core/switch.h"
#include "cpu/region_headers.h"
#include "ops/fused_adamw/fused_adamw.h"

#define GENAI_KERNELS_ISA_FILE "ops/fused_adamw/fused_adamw_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/staged_row.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

template <class P, class G>
void step_elements(const AdamwTensor& t, const AdamwStep& s, int64_t begin, int64_t end) {
  P* p = static_cast<P*>(t.param) + begin;
  const G* g = static_cast<const G*>(t.grad) + begin;
  float *m = t.exp_avg + begin, *v = t.exp_avg_sq + begin;
  float *master = t.master ? t.master + begin : nullptr, *ema = t.ema ? t.ema + begin : nullptr;
  for_each_register<float>(end - begin, [&](int64_t i, auto part) GK_LAMBDA_INLINE {
    const VecF gradient = part.load_from(g + i) * broadcast(s.clip);
    VecF x = master ? part.load_from(master + i) : part.load_from(p + i);
    x = x * broadcast(s.keep);
    const VecF old_m = part.load_from(m + i);
    const VecF new_m = old_m + (gradient - old_m) * broadcast(s.new_share);
    const VecF new_v = part.load_from(v + i) * broadcast(s.keep_sq) + gradient * gradient * broadcast(s.new_share_sq);
    const VecF denominator = sqrt(new_v) * broadcast(s.root_scale) + broadcast(s.eps);
    x = x - new_m / denominator * broadcast(s.rate);
    part.store_to(m + i, new_m);
    part.store_to(v + i, new_v);
    part.store_to(p + i, x);
    if (master) part.store_to(master + i, x);
    if (ema) {
      const VecF old = part.load_from(ema + i);
      part.store_to(ema + i, old + (x - old) * broadcast(s.ema_share));
    }
  });
}

constexpr int kSums = 16;  // side by side, whatever the registers hold: element i goes to sum i % 16
typedef float HalfF __attribute__((vector_size(kRegisterBytes / 2)));

template <class T>
double squares(const T* x, int64_t count) {
  constexpr int kDoubles = kLanesOf<double>, kRegisters = kSums / kDoubles;
  VecD sums[kRegisters] = {};
  const auto add = [&](const T* from) GK_LAMBDA_INLINE {
    GK_UNROLL for (int r = 0; r < kRegisters; r += 2) {
      HalfF half[2];
      const VecF wide = load(from + r * kDoubles);
      __builtin_memcpy(half, &wide, sizeof half);
      GK_UNROLL for (int h = 0; h < 2; ++h) {
        const VecD d = __builtin_convertvector(half[h], VecD);
        sums[r + h] += d * d;  // a square of 24 bits is exact
      }
    }
  };
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) add(x + i);
  if (i < count) {
    T rest[kSums] = {};
    __builtin_memcpy(rest, x + i, size_t(count - i) * sizeof(T));
    add(rest);
  }
  double lanes[kSums];
  __builtin_memcpy(lanes, sums, sizeof lanes);
  for (int width = kSums / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

// f(x) with x as what it points to; the host admits no float64.
template <class F>
GK_INLINE void as_stored(Dtype dtype, const F& f) {
  if (dtype == Dtype::f32) return f(TypeTag<float>{});
  if (dtype == Dtype::bf16) return f(TypeTag<bf16>{});
  f(TypeTag<fp16>{});
}

}  // namespace

void fused_adamw_kernel(const AdamwTensor& t, const AdamwStep& step, int64_t begin, int64_t end) {
  as_stored(t.dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    if (t.grad_dtype == t.dtype)
      step_elements<P, P>(t, step, begin, end);
    else
      step_elements<P, float>(t, step, begin, end);
  });
}

double sum_of_squares_kernel(Dtype dtype, const void* x, int64_t begin, int64_t end) {
  double sum = 0;
  as_stored(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    sum = squares(static_cast<const T*>(x) + begin, end - begin);
  });
  return sum;
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, fused_adamw_kernel,
                           (const AdamwTensor& t, const AdamwStep& step, int64_t begin, int64_t end),
                           (t, step, begin, end))
GENAI_KERNELS_ISA_DISPATCH(double, sum_of_squares_kernel, (Dtype dtype, const void* x, int64_t begin, int64_t end),
                           (dtype, x, begin, end))

#endif
