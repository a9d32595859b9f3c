// Of flash attention's backward what belongs to a row of queries alone: delta = sum(dO O) - dlse, and the sink's gradient.
#include "cpu/region_headers.h"
#include "ops/flash_attention/flash_attention.h"

#define GENAI_KERNELS_ISA_FILE "ops/flash_attention/flash_attention_delta_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/exp.h"
#include "cpu/tanh.h"
#include "cpu/tile_gemm.h"
#include "cpu/transpose.h"
#include "cpu/attention_pack.h"
#include "ops/flash_attention/tile.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// a * b + c as the products of this instruction set round it.
GK_INLINE float multiply_add(float a, float b, float c) {
#if GENAI_KERNELS_ISA_LANES > 4
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
GK_INLINE double multiply_add(double a, double b, double c) { return a * b + c; }

// The share of the sink in a row: all of it where there is no key.
template <class C>
double sink_probability(const FlashAttentionParams& p, int64_t head, const RowState<C>& row) {
  if (row.max == -kInfinity<C>) return 1;
  const double max = double(row.max) * (scores_are_modified(p) ? 1 : p.scale);
  return __builtin_exp(double(reinterpret_cast<const C*>(p.sink)[head]) - max) * double(row.inverse);
}

// sum(dO O) of one row in float64.
template <class C, class T>
double exact_product(const FlashAttentionParams& p, const T* o, const T* dout) {
  double sum = 0;
  int64_t d = 0;
  if (p.out.dim == 1 && p.dout.dim == 1) {
    VecD sums[2] = {};
    for (; d + kLanesOf<C> <= p.value_dim; d += kLanesOf<C>) {
      const Vec<C> a = load(o + d), b = load(dout + d);
      if constexpr (sizeof(C) == 8) {
        sums[0] = sums[0] + a * b;
      } else {
        typedef float Half __attribute__((vector_size(kRegisterBytes / 2)));
        Half x[2], y[2];
        __builtin_memcpy(x, &a, sizeof a);
        __builtin_memcpy(y, &b, sizeof b);
        for (int h = 0; h < 2; ++h)
          sums[h] = sums[h] + __builtin_convertvector(x[h], VecD) * __builtin_convertvector(y[h], VecD);
      }
    }
    sum = horizontal_sum<double>(sums[0] + sums[1]);
  }
  for (; d < p.value_dim; ++d) sum += double(to_compute(o[d * p.out.dim])) * double(to_compute(dout[d * p.dout.dim]));
  return sum;
}

// The same as the product dO V^T sums it. A row with one key has out = v: with this, dP - delta is exactly 0.
template <class C, class T>
C product_with(const FlashAttentionParams& p, const T* o, const T* dout) {
  C sum = 0;
  for (int64_t fold = 0; fold < p.value_dim; fold += kFold) {
    C chain[2] = {0, 0};
    for (int64_t d = fold; d < min_of(p.value_dim, fold + kFold); ++d)
      chain[d % 2] = multiply_add(C(to_compute(o[d * p.out.dim])), C(to_compute(dout[d * p.dout.dim])), chain[d % 2]);
    sum = fold ? sum + (chain[0] + chain[1]) : chain[0] + chain[1];
  }
  return sum;
}

template <class C, class T>
void delta_of_head(const FlashAttentionParams& p, int64_t batch, int64_t head) {
  double dsink = 0;
  for (int64_t i = 0; i < p.query_count(batch); ++i) {
    const int64_t token = p.query_begin(batch) + i, at = batch * p.lse_batch + head * p.lse_head + token;
    const T *o = token_of<T>(p.out, batch, token, head), *dout = token_of<T>(p.dout, batch, token, head);
    const RowState<C> state = row_state<C>(p, at);
    double sum = state.inverse == 1 ? double(product_with<C>(p, o, dout)) : exact_product<C>(p, o, dout);
    if (state.max == -kInfinity<C>) sum = 0;  // no key: out is 0 whatever dout
    const C lse = reinterpret_cast<const C*>(p.lse)[at];
    if (lse == -kInfinity<C>) {
      reinterpret_cast<C*>(p.delta)[at] = 0;  // no key: no gradient, whatever dlse
      continue;
    }
    if (p.dlse)
      sum -= reinterpret_cast<const C*>(p.dlse)[batch * p.dlse_batch + head * p.dlse_head + token * p.dlse_token];
    reinterpret_cast<C*>(p.delta)[at] = C(sum);
    if (p.dsink) dsink -= sink_probability(p, head, state) * sum;
  }
  if (p.dsink) reinterpret_cast<C*>(p.dsink)[batch * p.heads + head] = C(dsink);
}

}  // namespace

void flash_attention_delta_kernel(const FlashAttentionParams& p, int64_t batch, int64_t head) {
  GK_BASELINE_IF_F64(p, flash_attention_delta_kernel(p, batch, head))
  with_stored_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    delta_of_head<Compute<T>, T>(p, batch, head);
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, flash_attention_delta_kernel,
                           (const FlashAttentionParams& p, int64_t batch, int64_t head), (p, batch, head))

#endif
