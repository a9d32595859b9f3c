// One step of a diffusion sampler on the CPU. With c and u the model's outputs with and without the condition,
//
//   m    = factor (u + guidance (c - u))
//   x0   = clip(x0_from_x x + x0_from_model m)
//   next = x x + model m + x0 x0 + previous_x0 p + noise z,  in the known part known k + known_noise z'
//
// everything read once and written once; z and z' are made where they are used. The numbers are doubles, applied as two
// floats each: rounded to one, they would err alike in every element.
#include "cpu/region_headers.h"
#include "core/rows.h"
#include "ops/cfg_step/cfg_step.h"

#define GENAI_KERNELS_ISA_FILE "ops/cfg_step/cfg_step_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/staged_row.h"
#include "cpu/row_sums.h"
#include "cpu/normal.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// The factor is for the sums not yet known, and for them not needed.
template <class M>
struct Guided {
  using C = Compute<M>;
  const M *model, *uncond;
  Vec<C> guidance, factor;
  bool scaled;

  Guided(const CfgStepParams& p, int64_t n)
      : model(p.model.sample<M>(n)),
        uncond(p.uncond ? p.uncond.sample<M>(n) : nullptr),
        guidance(broadcast(C(p.guidance))),
        factor(broadcast(C(p.factors ? p.factors[n] : 1))),
        scaled(p.factors) {}
  template <class Part>
  GK_INLINE Vec<C> operator()(int64_t i, Part part) const {
    Vec<C> m = part.load_from(model + i);
    if (uncond) {
      const Vec<C> u = part.load_from(uncond + i);
      m = fma(guidance, m - u, u);
    }
    return scaled ? m * factor : m;
  }
};

template <class M>
void sums_of(const CfgStepParams& p, double* sums, int64_t begin, int64_t end) {
  using C = Compute<M>;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t from = p.pieces.begin(item), count = p.pieces.end(item) - from;
    const Guided<M> guided(p, p.pieces.sample(item));
    const Vec<C> first_model = broadcast(C(to_compute(guided.model[0])));
    const Vec<C> first_guided = broadcast(guided(0, End{1})[0]);
    double sums_of_piece[4];
    sum_row<C>(count, sums_of_piece, [&](int64_t i, auto part, Vec<C>* acc) {
      const Vec<C> a = part.or_zero(part.load_from(guided.model + from + i) - first_model);
      const Vec<C> b = part.or_zero(guided(from + i, part) - first_guided);
      acc[0] = acc[0] + a;
      acc[1] = fma(a, a, acc[1]);
      acc[2] = acc[2] + b;
      acc[3] = fma(b, b, acc[3]);
    });
    for (int s = 0; s < 4; ++s) sums[4 * item + s] = sums_of_piece[s];
  }
}

// `count` numbers of a mask from element `at` of a sample on, channel by channel.
template <class T>
void read_mask(const CfgStepParams& p, int64_t n, int64_t at, int64_t count, Compute<T>* to) {
  const StepMask& mask = p.mask;
  for (int64_t i = 0; i < count;) {
    const int64_t channel = (at + i) / mask.pixels, pixel = (at + i) % mask.pixels;
    const int64_t run = mask.pixels - pixel < count - i ? mask.pixels - pixel : count - i;
    const int64_t from = n * mask.batch_stride + channel * mask.channel_stride + pixel;
    if (mask.is_bool) {
      const uint8_t* flags = static_cast<const uint8_t*>(mask.data) + from;
      for (int64_t j = 0; j < run; ++j) to[i + j] = Compute<T>(flags[j]);
    } else {
      const T* shares = static_cast<const T*>(mask.data) + from;
      for_each_register<Compute<T>>(
          run, [&](int64_t j, auto part) { part.store_to(to + i + j, part.load_from(shares + j)); });
    }
    i += run;
  }
}

// A number as what C holds of it and what that leaves, which is 0 for double. Both have its sign and neither is 0: so that
// an infinity times the two is one.
template <class C>
struct Number {
  bool is_there;
  Vec<C> high, low;

  explicit Number(double number) : is_there(number != 0) {
    C near = C(number);
    if (__builtin_fabs(double(near)) > __builtin_fabs(number))  // the next towards zero
      near = C(bit_cast<float>(bit_cast<uint32_t>(float(near)) - 1));
    const double left = number - double(near);
    high = broadcast(near);
    low = broadcast(sizeof(C) == 8 ? C(0) : C(left - left == 0 && left != 0 ? left : number * 0x1p-60));
  }
};

// x0 = scale (a + ratio b), of x and m that with the larger number as a, or x where its number is 1. Where x0 is a small
// difference the sum is exact to its own last bit, which a sum of two rounded products is not.
template <class C>
struct OriginOf {
  bool x_leads;
  Number<C> scale, ratio;
  Vec<C> lost;  // what the ratio's high part leaves, times the scale

  explicit OriginOf(const StepNumbers& c)
      : x_leads(c.x0_from_x == 1 || __builtin_fabs(c.x0_from_x) >= __builtin_fabs(c.x0_from_model)),
        scale(x_leads ? c.x0_from_x : c.x0_from_model),
        ratio(!scale.is_there ? 0
              : x_leads       ? c.x0_from_model / c.x0_from_x
                              : c.x0_from_x / c.x0_from_model),
        lost(scale.high * ratio.low) {}
  GK_INLINE Vec<C> operator()(Vec<C> x, Vec<C> m) const {
    if (!scale.is_there) return Vec<C>{};
    const Vec<C> a = x_leads ? x : m, b = x_leads ? m : x;
    if constexpr (sizeof(C) == 8) return scale.high * (ratio.is_there ? fma(ratio.high, b, a) : a);
    if (!ratio.is_there) return fma(scale.high, a, scale.low * a);
    const Vec<C> sum = fma(ratio.high, b, a);
    return fma(scale.high, sum, fma(scale.low, sum, lost * b));
  }
};

// The parts of a step that few steps have are left out by a branch that is always taken alike.
template <class T, class M>
void step_piece(const CfgStepParams& p, int64_t n, int64_t begin, int64_t end) {
  using C = Compute<T>;
  using V = Vec<C>;
  const StepNumbers& c = p.numbers;
  const OriginOf<C> origin(c);
  const V clip = broadcast(C(c.clip));
  const Number<C> of_x(c.x), of_model(c.model), of_x0(c.x0), of_previous(c.previous_x0), of_noise(c.noise),
      of_known(c.known), of_known_noise(c.known_noise);
  const Guided<M> guided(p, n);
  const auto optional = [n](const Samples& s) { return s ? s.sample<T>(n) : nullptr; };
  const T *x = p.x.sample<T>(n), *previous = optional(p.previous_x0), *noise = optional(p.noise),
          *known = optional(p.known), *known_noise = optional(p.known_noise);
  T *next = p.next.sample<T>(n), *x0_out = optional(p.x0);
  const uint64_t seed = p.seeds ? uint64_t(p.seeds[n * p.seed_stride]) : 0;
  const bool wants_x0 = c.x0 != 0 || x0_out, clips = c.clip < __builtin_inf();
  const bool draws = c.noise != 0 && !noise, draws_known = known && c.known_noise != 0 && !known_noise;
  alignas(64) C z[kNormalBlock], z_known[kNormalBlock], mask[kNormalBlock];
  for (int64_t at = begin; at < end; at += kNormalBlock) {
    const int64_t count = end - at < kNormalBlock ? end - at : kNormalBlock;
    if (draws) normal_block<C>(seed, p.offset, NoiseStream::step, at / kNormalBlock, z);
    if (draws_known) normal_block<C>(seed, p.offset, NoiseStream::known, at / kNormalBlock, z_known);
    if (known) read_mask<T>(p, n, at, count, mask);
    for_each_register<C>(count, [&](int64_t i, auto part) {
      const V x_i = part.load_from(x + at + i), m = guided(at + i, part);
      V x0{}, z_i{}, previous_i{};
      if (wants_x0) {
        x0 = origin(x_i, m);
        if (clips) x0 = min(clip, max(-clip, x0));  // a NaN stays
        if (x0_out) part.store_to(x0_out + at + i, x0);
      }
      if (of_noise.is_there) z_i = draws ? load(z + i) : part.load_from(noise + at + i);
      if (of_previous.is_there) previous_i = part.load_from(previous + at + i);
      V y{};
      // The low parts first, and x last: where a step is short it is most of the result.
      const auto add = [&](V Number<C>::* half) GK_LAMBDA_INLINE {
        if (of_previous.is_there) y = fma(of_previous.*half, previous_i, y);
        if (of_noise.is_there) y = fma(of_noise.*half, z_i, y);
        if (of_x0.is_there) y = fma(of_x0.*half, x0, y);
        if (of_model.is_there) y = fma(of_model.*half, m, y);
        if (of_x.is_there) y = fma(of_x.*half, x_i, y);
      };
      if constexpr (sizeof(C) == 4) add(&Number<C>::low);
      add(&Number<C>::high);
      if (known) {
        const V known_i = part.load_from(known + at + i);
        V k{}, z_known_i{};
        if (of_known_noise.is_there) z_known_i = draws_known ? load(z_known + i) : part.load_from(known_noise + at + i);
        const auto add_known = [&](V Number<C>::* half) GK_LAMBDA_INLINE {
          if (of_known.is_there) k = fma(of_known.*half, known_i, k);
          if (of_known_noise.is_there) k = fma(of_known_noise.*half, z_known_i, k);
        };
        if constexpr (sizeof(C) == 4) add_known(&Number<C>::low);
        add_known(&Number<C>::high);
        const V share = load(mask + i);
        // selected, so that nothing of the part that is not wanted comes through
        y = share == V{} ? k : (share == broadcast(C(1)) ? y : fma(share, y - k, k));
      }
      part.store_to(next + at + i, y);
    });
  }
}

template <class F>
GK_INLINE void switch_dtypes(const CfgStepParams& p, F&& f) {
  if (p.model_dtype == p.dtype) return switch_dtype(p.dtype, [&](auto type) { f(type, type); });
  if (p.model_dtype == Dtype::bf16) return f(TypeTag<float>{}, TypeTag<bf16>{});
  return f(TypeTag<float>{}, TypeTag<fp16>{});
}

}  // namespace

void cfg_step_sums_kernel(const CfgStepParams& p, double* sums, int64_t begin, int64_t end) {
  switch_dtype(p.model_dtype, [&](auto model) { sums_of<typename decltype(model)::type>(p, sums, begin, end); });
}

void cfg_step_kernel(const CfgStepParams& p, int64_t begin, int64_t end) {
  switch_dtypes(p, [&](auto type, auto model) {
    for (int64_t item = begin; item < end; ++item)
      step_piece<typename decltype(type)::type, typename decltype(model)::type>(
          p, p.pieces.sample(item), p.pieces.begin(item), p.pieces.end(item));
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, cfg_step_sums_kernel,
                           (const CfgStepParams& p, double* sums, int64_t begin, int64_t end), (p, sums, begin, end))
GENAI_KERNELS_ISA_DISPATCH(void, cfg_step_kernel, (const CfgStepParams& p, int64_t begin, int64_t end), (p, begin, end))

#endif
