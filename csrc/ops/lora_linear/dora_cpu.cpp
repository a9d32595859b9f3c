// DoRA on the CPU: the norms of the rows of W + scaling B A without that matrix, and backward of a factor for each column.
#include "cpu/region_headers.h"
#include "ops/lora_linear/dora.h"

#define GENAI_KERNELS_ISA_FILE "ops/lora_linear/dora_cpu.cpp"
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/exp.h"
#include "cpu/tile_gemm.h"
#include "cpu/transpose.h"
#include "cpu/attention_pack.h"
#include "cpu/quantized.h"
#include "cpu/pack_operand.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

constexpr int64_t kPiece = 1024;  // columns of a row at once: an L1 has room for a few
// Where what is added cancels W so far that the expansion has lost 6 bits, the row is built after all.
constexpr double kCancelled = 1.0 / 64;

template <class C>
struct NormScratch {
  C *sum, *row;  // pieces of rows
  char* end;
  explicit NormScratch(void* memory) {
    Arena arena(memory);
    sum = arena.take<C>(kPiece + 16);
    row = arena.take<C>(kPiece + 16);
    end = arena.end();
  }
};

// to[0, until - k) = elements [k, until) of a row; zeros up to a whole register.
template <class C>
void load_piece(const MatmulOperand& m, int64_t row, int64_t k, int64_t until, C* to) {
  const auto load_as = [&](auto type) {
    pack_rows<Fma<C>, typename decltype(type)::type>(m, row, row + 1, row + 1, k, until, to, kPiece);
  };
  if (m.quantized) return load_as(TypeTag<QuantizedElement>{});
  switch_dtype(m.dtype, [&](auto type) {
    if constexpr (is_same<Compute<typename decltype(type)::type>, C>) load_as(type);
  });
}

// Sixteen chains, whatever the instruction set, added in order. `x` is a piece with room behind it.
template <class C>
double sum_of_squares(C* x, int64_t n) {
  constexpr int kChains = 16;
  for (int64_t i = n; i % kChains; ++i) x[i] = 0;
  C chains[kChains] = {};
  for (int64_t i = 0; i < n; i += kChains)
    for (int c = 0; c < kChains; c += kLanesOf<C>)
      store(chains + c, fma(load(x + i + c), load(x + i + c), load(chains + c)));
  double sum = 0;
  for (const C chain : chains) sum += double(chain);
  return sum;
}

template <class C>
double element(const MatmulOperand& m, int64_t row, int64_t k) {
  C x = 0;
  switch_dtype(m.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (is_same<Compute<T>, C>) x = to_compute(static_cast<const T*>(m.data)[row * m.outer + k * m.depth]);
  });
  return double(x);
}

template <class C>
double norm_of_row(const DoraNormParams& p, int64_t row, const NormScratch<C>& scratch) {
  double of_w = 0, mixed = 0, of_ba = 0;
  for (int64_t k = 0; k < p.in; k += kPiece) {
    const int64_t until = min_of(p.in, k + kPiece);
    load_piece<C>(p.weight, row, k, until, scratch.row);
    of_w += sum_of_squares(scratch.row, until - k);
  }
  for (int64_t r = 0; r < p.rank; ++r) {
    const double b = element<C>(p.b, row, r) * p.scaling;
    mixed += double(static_cast<const C*>(p.wa)[r * p.out + row]) * b;
    of_ba += double(static_cast<const C*>(p.baa)[row * p.rank + r]) * b * p.scaling;
  }
  const double square = of_w + 2 * mixed + of_ba;
  // the rows added up without signs are at most twice as large as the larger of them
  if (!(square < kCancelled * (of_w > of_ba ? of_w : of_ba))) return square;
  double built = 0;
  for (int64_t k = 0; k < p.in; k += kPiece) {
    const int64_t until = min_of(p.in, k + kPiece);
    load_piece<C>(p.weight, row, k, until, scratch.sum);
    for (int64_t r = 0; r < p.rank; ++r) {
      load_piece<C>(p.a, r, k, until, scratch.row);
      const Vec<C> b = broadcast(C(element<C>(p.b, row, r) * p.scaling));
      for (int64_t i = 0; i < until - k; i += kLanesOf<C>)
        store(scratch.sum + i, fma(b, load(scratch.row + i), load(scratch.sum + i)));
    }
    built += sum_of_squares(scratch.sum, until - k);
  }
  return built;
}

template <class C>
void norms(const DoraNormParams& p, int64_t begin, int64_t end, void* memory) {
  const NormScratch<C> scratch(memory);
  for (int64_t row = begin; row < end; ++row)
    static_cast<C*>(p.norm)[row] = C(__builtin_sqrt(norm_of_row<C>(p, row, scratch)));
}

template <class T, class Inner>
void scale_columns(const ScaleColumnsParams& p, int64_t column_begin, int64_t column_end) {
  using C = Compute<T>;
  constexpr int64_t kColumns = 256, kRows = 16;  // of a piece; the pieces are added in order, in double
  const C* scale = static_cast<const C*>(p.column_scale);
  for (int64_t j = column_begin; j < column_end; j += kColumns) {
    const int64_t n = min_of(column_end - j, kColumns);
    double total[kColumns] = {};
    C factor[kColumns] = {};
    for (int64_t i = 0; i < n; ++i) factor[i] = scale[j + i];
    for (int64_t begin = 0; begin < p.rows; begin += kRows) {
      C sum[kColumns] = {};
      for (int64_t r = begin; r < min_of(p.rows, begin + kRows); ++r) {
        const T* dy = static_cast<const T*>(p.dy) + r * p.dy_row + j;
        const Inner* inner = static_cast<const Inner*>(p.inner) + r * p.columns + j;
        T* to = static_cast<T*>(p.d_inner) + r * p.columns + j;
        for (int64_t i = 0; i < n; i += kLanesOf<C>) {
          const bool whole = i + kLanesOf<C> <= n;
          const Vec<C> d = whole ? load(dy + i) : load_first(dy + i, n - i);
          const Vec<C> x = whole ? load(inner + i) : load_first(inner + i, n - i);
          store(sum + i, fma(d, x, load(sum + i)));
          if (whole)
            store(to + i, d * load(factor + i));
          else
            store_first(to + i, d * load(factor + i), n - i);
        }
      }
      for (int64_t i = 0; i < n; ++i) total[i] += sum[i];
    }
    for (int64_t i = 0; i < n; ++i) static_cast<C*>(p.d_scale)[j + i] = C(total[i]);
  }
}

}  // namespace

int64_t dora_norm_scratch(const DoraNormParams&) {
  return NormScratch<double>(nullptr).end - static_cast<char*>(nullptr);
}

void dora_norm_kernel(const DoraNormParams& p, int64_t begin, int64_t end, void* scratch) {
  p.wide ? norms<double>(p, begin, end, scratch) : norms<float>(p, begin, end, scratch);
}

void scale_columns_bwd_kernel(const ScaleColumnsParams& p, int64_t column_begin, int64_t column_end) {
  switch_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    switch_dtype(p.inner_dtype, [&](auto kept) {
      using Inner = typename decltype(kept)::type;
      if constexpr (is_same<Compute<T>, Compute<Inner>>) scale_columns<T, Inner>(p, column_begin, column_end);
    });
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(int64_t, dora_norm_scratch, (const DoraNormParams& p), (p))
GENAI_KERNELS_ISA_DISPATCH(void, dora_norm_kernel, (const DoraNormParams& p, int64_t begin, int64_t end, void* scratch),
                           (p, begin, end, scratch))
GENAI_KERNELS_ISA_DISPATCH(void, scale_columns_bwd_kernel,
                           (const ScaleColumnsParams& p, int64_t column_begin, int64_t column_end),
                           (p, column_begin, column_end))

#endif
