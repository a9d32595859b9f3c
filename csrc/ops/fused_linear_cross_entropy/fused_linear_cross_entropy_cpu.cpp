// Cross entropy of rows of logits, and its gradients in their place. See fused_linear_cross_entropy.h.
//
// A row is read three times: for its largest logit, for the sum of exponentials, for the gradients. It lies in the L2.
#include "ops/fused_linear_cross_entropy/fused_linear_cross_entropy.h"

#include "core/rows.h"
#include "cpu/region_headers.h"

#define GENAI_KERNELS_ISA_FILE "ops/fused_linear_cross_entropy/fused_linear_cross_entropy_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/exp.h"
#include "cpu/tanh.h"
#include "cpu/staged_row.h"
#include "cpu/row_sums.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// The logits capped, where they are to be, and the largest of them. A NaN is not seen here, but in the sum.
template <class C>
C capped_and_largest(C* x, int64_t n, C cap) {
  constexpr C kLeast = -__builtin_huge_val();
  Vec<C> most = broadcast(kLeast);
  for_each_register<C>(n, [&](int64_t i, auto part) GK_LAMBDA_INLINE {
    Vec<C> v = part.load_from(x + i);
    if (cap > 0) {
      v = cap * tanh(v / cap);
      part.store_to(x + i, v);
    }
    if constexpr (is_end<decltype(part)>)
      for (int lane = 0; lane < kLanesOf<C>; ++lane)
        if (lane >= part.count) v[lane] = kLeast;
    most = max(v, most);
  });
  C largest = kLeast;
  for (int lane = 0; lane < kLanesOf<C>; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  return largest;
}

template <class C, class G>
void run_rows(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.vocabulary;
  const C cap = C(p.softcap);
  const double smoothing = p.label_smoothing, uniform = smoothing / double(n);
  for (int64_t r = begin; r < end; ++r) {
    C* x = static_cast<C*>(p.logits) + r * p.row_stride;
    const C largest = capped_and_largest(x, n, cap), hit = x[p.targets[r]];
    double sums[2];  // of e^(x - largest), and of x
    sum_row<C>(n, sums, [&](int64_t i, auto part, Vec<C>(&acc)[2]) GK_LAMBDA_INLINE {
      const Vec<C> v = part.load_from(x + i);
      acc[0] = acc[0] + part.or_zero(exp_nonpositive(v - largest));
      acc[1] = acc[1] + v;
    });
    const double lse = double(largest) + log(sums[0]);
    double loss = lse - double(hit);
    if (smoothing != 0) loss = (1 - smoothing) * loss + smoothing * (lse - sums[1] / double(n));
    p.z_losses[r] = p.z_loss != 0 ? p.z_loss * lse * lse : 0;
    p.loss[r] = loss + p.z_losses[r];
    if (!p.gradient) continue;

    const double weight = p.row_weights ? p.row_weights[r] : 1;
    const double share = p.z_loss != 0 ? (1 + 2 * p.z_loss * lse) / sums[0] : 1 / sums[0];
    const Vec<C> of_exp = broadcast(C(weight * share)), of_all = broadcast(C(weight * uniform));
    G* gradients = reinterpret_cast<G*>(x);  // never wider than the logits, so never ahead of what is still to be read
    for_each_register<C>(n, [&](int64_t i, auto part) GK_LAMBDA_INLINE {
      const Vec<C> v = part.load_from(x + i);
      Vec<C> d = exp_nonpositive(v - largest) * of_exp;
      if (smoothing != 0) d = d - of_all;
      if (cap > 0) {
        const Vec<C> t = v / cap;
        d = d * (C(1) - t * t);
      }
      part.store_to(gradients + i, d);
    });
    // the wanted class: in double, since its probability is near 1 where the model is good
    double d = weight * (double(exp_nonpositive(broadcast(C(hit - largest)))[0]) * share - uniform - (1 - smoothing));
    if (cap > 0) d *= 1 - double(hit / cap) * double(hit / cap);
    gradients[p.targets[r]] = from_compute<G>(C(d));
  }
}

// f(type of the logits, type of the gradients): the stored types that are computed in float, or double and double.
template <class F>
GK_INLINE void with_types(const CrossEntropyParams& p, F&& f) {
  switch_dtype(p.gradient_dtype, [&](auto type) {
    using G = typename decltype(type)::type;
    f(TypeTag<Compute<G>>{}, TypeTag<G>{});
  });
}

}  // namespace

void cross_entropy_rows_kernel(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  with_types(p, [&](auto compute, auto gradient) {
    run_rows<typename decltype(compute)::type, typename decltype(gradient)::type>(p, begin, end);
  });
}

void cross_entropy_columns_kernel(const CrossEntropyParams& p, int64_t rows, double* sums, int64_t begin, int64_t end) {
  with_types(p, [&](auto compute, auto gradient) {
    using C = typename decltype(compute)::type;
    using G = typename decltype(gradient)::type;
    const G* first = static_cast<const G*>(p.logits);
    const int64_t row_stride = p.row_stride * int64_t(sizeof(C) / sizeof(G));
    for_each_register<C>(end - begin, [&](int64_t i, auto part) GK_LAMBDA_INLINE {
      ColumnSums<C> column;
      for (int64_t r = 0; r < rows; ++r) column.add(part.load_from(first + r * row_stride + begin + i));
      column.add_to(sums + begin + i, part);
    });
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, cross_entropy_rows_kernel, (const CrossEntropyParams& p, int64_t begin, int64_t end),
                           (p, begin, end))
GENAI_KERNELS_ISA_DISPATCH(void, cross_entropy_columns_kernel,
                           (const CrossEntropyParams& p, int64_t rows, double* sums, int64_t begin, int64_t end),
                           (p, rows, sums, begin, end))

#endif
