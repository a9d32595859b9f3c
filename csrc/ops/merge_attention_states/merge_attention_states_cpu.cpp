// Merging two attention states on the CPU, one row (a head of a token) at a time; genai_kernels/ops/
// merge_attention_states/README.md derives the formulas.
#include "cpu/region_headers.h"
#include "ops/merge_attention_states/merge_attention_states.h"

#define GENAI_KERNELS_ISA_FILE "ops/merge_attention_states/merge_attention_states_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/staged_row.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

constexpr double kEmpty = -__builtin_inf();  // the lse of a row that saw no key

struct Weights {
  double a, b, lse;
};

// The shares of two sums of exponentials e^lse_a and e^lse_b, neither empty, in their total, and its logarithm. The
// exponential of the smaller relative to the larger can neither overflow nor cancel; two infinities share evenly. In
// double and by the library's functions: a few numbers per row cost less than the row's memory.
GK_INLINE Weights weights_of(double lse_a, double lse_b) {
  const bool a_larger = lse_a > lse_b;
  const double large = a_larger ? lse_a : lse_b, small = a_larger ? lse_b : lse_a;
  const double ratio = large == small ? 1 : __builtin_exp(small - large);
  const double larger = 1 / (1 + ratio), smaller = ratio / (1 + ratio);
  return {a_larger ? larger : smaller, a_larger ? smaller : larger, large + __builtin_log1p(ratio)};
}

// The place of each row's number, row by row, without a division for each.
struct RowCursor {
  int64_t batch, token, head;
  RowCursor(const MergeAttentionStatesParams& p, int64_t row)
      : batch(row / (p.heads * p.tokens)), token(row / p.heads % p.tokens), head(row % p.heads) {}
  GK_INLINE void advance(const MergeAttentionStatesParams& p) {
    if (++head < p.heads) return;
    head = 0;
    if (++token < p.tokens) return;
    token = 0;
    ++batch;
  }
  template <class C>
  GK_INLINE C& in(const PerRow& values) const {
    return static_cast<C*>(values.data)[batch * values.batch + head * values.head + token * values.token];
  }
};

// Bit for bit, which a load and a store would not be for a signalling NaN.
template <class T>
GK_INLINE void copy_row(const Rows& from, const Rows& to, int64_t r, T* scratch) {
  const T* x = read_row<T>(from, r, scratch);
  T* y = begin_row<T>(to, r, scratch + from.length);
  __builtin_memcpy(y, x, from.length * sizeof(T));
  finish_row<T>(to, r, y);
}

template <class T>
GK_INLINE void zero_row(const Rows& to, int64_t r, T* scratch) {
  T* y = begin_row<T>(to, r, scratch);
  __builtin_memset(y, 0, to.length * sizeof(T));
  finish_row<T>(to, r, y);
}

template <class T>
void merge_rows(const MergeAttentionStatesParams& p, int64_t begin, int64_t end, T* scratch) {
  using C = Compute<T>;
  const int64_t n = p.o.length;
  RowCursor at(p, begin);
  for (int64_t r = begin; r < end; ++r, at.advance(p)) {
    const double lse_a = at.in<C>(p.lse_a), lse_b = at.in<C>(p.lse_b);
    const bool a_empty = lse_a == kEmpty, b_empty = lse_b == kEmpty;
    if (a_empty || b_empty) {  // what an empty side holds is not looked at
      at.in<C>(p.lse) = at.in<C>(a_empty ? p.lse_b : p.lse_a);
      if (a_empty && b_empty)
        zero_row<T>(p.o, r, scratch);
      else
        copy_row<T>(a_empty ? p.o_b : p.o_a, p.o, r, scratch);
      continue;
    }
    const Weights weights = weights_of(lse_a, lse_b);
    at.in<C>(p.lse) = C(weights.lse);
    const Vec<C> weight_a = broadcast(C(weights.a)), weight_b = broadcast(C(weights.b));
    const T *a = read_row<T>(p.o_a, r, scratch), *b = read_row<T>(p.o_b, r, scratch + n);
    T* o = begin_row<T>(p.o, r, scratch);
    for_each_register<C>(n, [&](int64_t i, auto part) {
      part.store_to(o + i, fma(weight_a, part.load_from(a + i), weight_b * part.load_from(b + i)));
    });
    finish_row<T>(p.o, r, o);
  }
}

// One register of the stored type as registers of doubles.
struct Doubles {
  VecD part[2];
};
GK_INLINE Doubles to_doubles(VecF v) {
  typedef float HalfF __attribute__((vector_size(kRegisterBytes / 2)));
  HalfF halves[2];
  __builtin_memcpy(halves, &v, sizeof v);
  return {{__builtin_convertvector(halves[0], VecD), __builtin_convertvector(halves[1], VecD)}};
}
GK_INLINE Doubles to_doubles(VecD v) { return {{v, VecD{}}}; }

// sum_i d_o[i] * (a[i] - b[i]), in a fixed order, in double: it decides the gradient of lse, often by cancellation, and
// the rows' memory is what takes the time.
template <class T>
GK_INLINE double dot_with_difference(const T* d_o, const T* a, const T* b, int64_t n) {
  VecD sum[2] = {};
  for_each_register<Compute<T>>(n, [&](int64_t i, auto part) {
    const Doubles d = to_doubles(part.load_from(d_o + i));
    const Doubles x = to_doubles(part.load_from(a + i)), y = to_doubles(part.load_from(b + i));
    GK_UNROLL for (int j = 0; j < 2; ++j) sum[j] = fma(d.part[j], x.part[j] - y.part[j], sum[j]);
  });
  return horizontal_sum<double>(sum[0] + sum[1]);
}

template <class T>
void backward_rows(const MergeAttentionStatesParams& p, int64_t begin, int64_t end, T* scratch) {
  using C = Compute<T>;
  const int64_t n = p.o_a.length;
  RowCursor at(p, begin);
  for (int64_t r = begin; r < end; ++r, at.advance(p)) {
    const double lse_a = at.in<C>(p.lse_a), lse_b = at.in<C>(p.lse_b);
    const C dlse = p.dlse.data ? at.in<C>(p.dlse) : C(0);
    const bool a_empty = lse_a == kEmpty, b_empty = lse_b == kEmpty;
    if (a_empty || b_empty) {  // the gradient passes to the side that is not empty, if any
      at.in<C>(p.dlse_a) = a_empty ? C(0) : dlse;
      at.in<C>(p.dlse_b) = b_empty ? C(0) : dlse;
      if (a_empty)
        zero_row<T>(p.d_o_a, r, scratch);
      else
        copy_row<T>(p.d_o, p.d_o_a, r, scratch);
      if (b_empty)
        zero_row<T>(p.d_o_b, r, scratch);
      else
        copy_row<T>(p.d_o, p.d_o_b, r, scratch);
      continue;
    }
    const Weights weights = weights_of(lse_a, lse_b);
    const T* d_o = read_row<T>(p.d_o, r, scratch);
    const T *a = read_row<T>(p.o_a, r, scratch + n), *b = read_row<T>(p.o_b, r, scratch + 2 * n);
    // where lse is +inf the weights do not change with it
    const double dot = weights.lse == __builtin_inf() ? 0 : dot_with_difference(d_o, a, b, n);
    at.in<C>(p.dlse_a) = C(weights.a * (dlse + weights.b * dot));
    at.in<C>(p.dlse_b) = C(weights.b * (dlse - weights.a * dot));
    const Vec<C> weight_a = broadcast(C(weights.a)), weight_b = broadcast(C(weights.b));
    T* d_o_a = begin_row<T>(p.d_o_a, r, scratch + 3 * n);
    T* d_o_b = begin_row<T>(p.d_o_b, r, scratch + 4 * n);
    for_each_register<C>(n, [&](int64_t i, auto part) {
      const Vec<C> d = part.load_from(d_o + i);
      part.store_to(d_o_a + i, weight_a * d);
      part.store_to(d_o_b + i, weight_b * d);
    });
    finish_row<T>(p.d_o_a, r, d_o_a);
    finish_row<T>(p.d_o_b, r, d_o_b);
  }
}

}  // namespace

void merge_attention_states_fwd_kernel(const MergeAttentionStatesParams& p, int64_t begin, int64_t end, void* scratch) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    merge_rows<T>(p, begin, end, static_cast<T*>(scratch));
  });
}

void merge_attention_states_bwd_kernel(const MergeAttentionStatesParams& p, int64_t begin, int64_t end, void* scratch) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    backward_rows<T>(p, begin, end, static_cast<T*>(scratch));
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(void, merge_attention_states_fwd_kernel,
                           (const MergeAttentionStatesParams& p, int64_t begin, int64_t end, void* scratch),
                           (p, begin, end, scratch))
GENAI_KERNELS_ISA_DISPATCH(void, merge_attention_states_bwd_kernel,
                           (const MergeAttentionStatesParams& p, int64_t begin, int64_t end, void* scratch),
                           (p, begin, end, scratch))

#endif
