// C = sum of terms A B on the CPU with the columns in the lanes: packed panels, one product of registers, sums in memory.
// See cpu/matmul.h.
//
// For each piece of the depth: the rows of A of an item are packed once, then for one panel of columns after the other B
// is packed and multiplied by all rows. A panel of 48 columns x 128 is 24 KiB, half of an L1; 256 rows of A and of C beside
// it stay in the L2. The lines of the next panel come into the L2 meanwhile, and the next rows of A are packed between
// the tiles: an L3 that is shared with others gives less than a product can take.
#include "cpu/matmul.h"

#include "cpu/region_headers.h"

#define GENAI_KERNELS_ISA_FILE "cpu/matmul.cpp"
#define GENAI_KERNELS_ISA_DOT_BF16
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

constexpr int64_t kFewRows = 8;
constexpr int64_t kRowsAheadOfSums = 8;

template <class C>
struct MatmulScratch {
  int64_t c_stride;
  C *c, *a[2], *b;  // words of two bf16 are as large as a float; a: this piece of the depth and the next
  char* end;
  static constexpr int64_t kAStride = kMatmulDepth + kLanesOf<C>;

  MatmulScratch(int64_t rows, int64_t columns, void* memory)
      : c_stride(round_up(columns, kMatmulColumns) + kLanesOf<C>) {
    Arena arena(memory);
    c = arena.take<C>(rows * c_stride);
    for (C*& piece : a) piece = arena.take<C>(round_up(rows, kLanesOf<C>) * kAStride);
    b = arena.take<C>(kMatmulDepth * kMatmulColumns);
    end = arena.end();
  }
};

// The part of C that a term adds to: the item's rows that have it, and the columns from `column` on.
template <class C>
struct Sums {
  const MatmulTerm& term;
  C* c;
  int64_t c_stride, row_begin, term_begin, column;
  bool first;  // nothing is there yet

  GK_INLINE int64_t row(int64_t r) const { return term.rows ? term.rows[term_begin + r] : row_begin + r; }
  template <int Rows, int Vectors>
  GK_INLINE void add(int64_t r, Vec<C> (&sum)[Rows][Vectors]) const {
    if (term.dropout)
      for (int i = 0; i < Rows; ++i) {
        C elements[Vectors * kLanesOf<C>];
        __builtin_memcpy(elements, sum[i], sizeof elements);
        drop(*term.dropout, row(r + i), column, elements, Vectors * kLanesOf<C>);
        __builtin_memcpy(sum[i], elements, sizeof elements);
      }
    GK_UNROLL for (int i = 0; i < Rows; ++i) GK_UNROLL for (int j = 0; j < Vectors; ++j) {
      C* to = at(r + i) + j * kLanesOf<C>;
      store(to, first ? sum[i][j] : load(to) + sum[i][j]);
    }
  }
  GK_INLINE C* at(int64_t r) const { return c + (row(r) - row_begin) * c_stride; }
};

// One panel of columns. `meanwhile(rows)` is called between the tiles, with the rows that are done.
template <class P, int Vectors, class Meanwhile>
void multiply_panel(const typename P::Word* a, int64_t rows, const typename P::Word* b, int64_t b_stride, int64_t words,
                    const Sums<typename P::Compute>& sums, const Meanwhile& meanwhile) {
  using C = typename P::Compute;
  constexpr int64_t kAStride = MatmulScratch<C>::kAStride;
  int64_t r = 0;
  const auto run = [&](auto size) GK_LAMBDA_INLINE {
    constexpr int kRows = decltype(size)::value;
    for (; r + kRows <= rows; r += kRows) {
      meanwhile(r + kRows);
      if (r + kRows + kRowsAheadOfSums <= rows)
        GK_UNROLL for (int i = 0; i < kRows; ++i) GK_UNROLL for (int j = 0; j < Vectors; ++j)
            __builtin_prefetch(sums.at(r + i + kRowsAheadOfSums) + j * kLanesOf<C>, 1, 3);
      Vec<C> sum[kRows][Vectors];
      multiply<P>(sum, a + r * kAStride, kAStride, 1, b, b_stride, words);
      sums.add(r, sum);
    }
  };
  if constexpr (kTileRows == 4) run(IntTag<4>{});
  run(IntTag<2>{});
  run(IntTag<1>{});
}

// The first of a term's rows from `row` of C on.
GK_INLINE int64_t first_from(const MatmulTerm& term, int64_t row) {
  if (!term.rows) return row;
  int64_t low = 0, high = term.row_count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (term.rows[middle] < row)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

template <class P>
void add_term(const MatmulTerm& term, const MatmulItem& item, const MatmulScratch<typename P::Compute>& scratch,
              bool first) {
  using C = typename P::Compute;
  using Word = typename P::Word;
  constexpr int64_t kAStride = MatmulScratch<C>::kAStride;
  const int64_t begin = first_from(term, item.row_begin), end = first_from(term, item.row_end), count = end - begin;
  if (count == 0) return;
  Word* b = reinterpret_cast<Word*>(scratch.b);
  const PackRows<P> pack_rows_of_a = row_packer<P>(term.a);
  const PackLanes<P> pack_panel = lane_packer<P>(term.b);
  const auto a_of = [&](int64_t k) { return reinterpret_cast<Word*>(scratch.a[k / kMatmulDepth % 2]); };
  const auto pack_a = [&](int64_t from, int64_t to, int64_t k) GK_LAMBDA_INLINE {
    pack_rows_of_a(term.a, begin + from, begin + to, end, k, min_of(term.depth, k + kMatmulDepth),
                   a_of(k) + from * kAStride, kAStride);
  };
  // With so few rows of A, a panel of B is read where it lies if its words lie as a tile reads them.
  const bool in_place = count <= kFewRows && is_same<Word, C> && !term.b.quantized && term.b.outer == 1 &&
                        !term.b.tokens && !term.b.dropout && (is_same<C, double> || term.b.dtype == Dtype::f32);
  const int64_t columns = item.column_end - item.column_begin;
  const int64_t panels = (columns + kMatmulColumns - 1) / kMatmulColumns;
  pack_a(0, count, 0);
  for (int64_t k = 0; k == 0 || k < term.depth; k += kMatmulDepth) {  // also where the sum is empty
    const int64_t until = min_of(term.depth, k + kMatmulDepth), words = (until - k + P::kPerWord - 1) / P::kPerWord;
    int64_t packed = until < term.depth ? 0 : count;  // rows of the next piece of A
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t j = item.column_begin + panel * kMatmulColumns, stop = min_of(item.column_end, j + kMatmulColumns);
      const Word* words_of_b = b;
      int64_t b_stride = kMatmulColumns;
      if (in_place && (stop - j) % kLanesOf<C> == 0) {
        words_of_b = static_cast<const Word*>(term.b.data) + k * term.b.depth + j;
        b_stride = term.b.depth;
      } else {
        pack_panel(term.b, j, stop, k, until, b, kMatmulColumns);
      }
      // what the next panel is packed from
      const bool last = panel + 1 == panels;
      const int64_t next_k = last ? until : k, next_j = last ? item.column_begin : stop;
      PanelLines lines(term.b, next_j, min_of(item.column_end, next_j + kMatmulColumns), next_k,
                       min_of(term.depth, next_k + kMatmulDepth));
      const auto meanwhile = [&](int64_t done) GK_LAMBDA_INLINE {
        lines.ask(done, count);
        if (packed == count) return;
        int64_t to = (panel * count + done) / panels;
        to = last && done == count ? count : to / kLanesOf<C> * kLanesOf<C>;
        if (to > packed) pack_a(packed, to, until), packed = to;
      };
      // whole groups of three registers, then what is left of them
      for (int64_t column = 0; column < stop - j;) {
        const int64_t vectors = min_of<int64_t>(3, (stop - j - column + kLanesOf<C> - 1) / kLanesOf<C>);
        const Sums<C> sums{term,
                           scratch.c + (j - item.column_begin) + column,
                           scratch.c_stride,
                           item.row_begin,
                           begin,
                           j + column,
                           first && k == 0};
        const auto run = vectors == 3   ? multiply_panel<P, 3, decltype(meanwhile)>
                         : vectors == 2 ? multiply_panel<P, 2, decltype(meanwhile)>
                                        : multiply_panel<P, 1, decltype(meanwhile)>;
        run(a_of(k), count, words_of_b + column, b_stride, words, sums, meanwhile);
        column += vectors * kLanesOf<C>;
      }
    }
  }
}

template <class C, class T>
void write_rows(const MatmulParams& p, const MatmulItem& item, const MatmulScratch<C>& scratch) {
  const int64_t columns = item.column_end - item.column_begin;
  const Vec<C> scale = broadcast(C(p.scale));
  for (int64_t r = item.row_begin; r < item.row_end; ++r) {
    const C* c = scratch.c + (r - item.row_begin) * scratch.c_stride;
    T* to = static_cast<T*>(p.out) + r * p.out_row + item.column_begin;
    for (int64_t j = 0; j < columns; j += kLanesOf<C>) {
      Vec<C> x = load(c + j);
      if (p.scale != 1) x = x * scale;
      const bool whole = j + kLanesOf<C> <= columns;
      if (p.accumulate) x = (whole ? load(to + j) : load_first(to + j, columns - j)) + x;
      if (whole)
        store(to + j, x);
      else
        store_first(to + j, x, columns - j);
    }
  }
}

template <class C>
void run_item(const MatmulParams& p, const MatmulItem& item, void* memory) {
  const int64_t columns = item.column_end - item.column_begin;
  MatmulScratch<C> scratch(item.row_end - item.row_begin, columns, memory);
  // The sums of one piece are the result, and are made where it lies.
  constexpr Dtype kOwn = is_same<C, double> ? Dtype::f64 : Dtype::f32;
  const bool finished = p.term_count == 1 && !p.terms[0].rows && p.terms[0].depth <= kMatmulDepth && p.scale == 1 &&
                        !p.accumulate && p.out_dtype == kOwn && columns % kLanesOf<C> == 0;
  if (finished) {
    scratch.c = static_cast<C*>(p.out) + item.row_begin * p.out_row + item.column_begin;
    scratch.c_stride = p.out_row;
  }
  for (int64_t t = 0; t < p.term_count; ++t) {
    const MatmulTerm& term = p.terms[t];
#if GENAI_KERNELS_ISA_BF16
    if constexpr (is_same<C, float>)
      if (multiplies_pairs(term.a, term.b)) {
        add_term<DotBf16>(term, item, scratch, t == 0);
        continue;
      }
#endif
    add_term<Fma<C>>(term, item, scratch, t == 0);
  }
  if (finished) return;
  switch_dtype(p.out_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (is_same<Compute<T>, C>) write_rows<C, T>(p, item, scratch);
  });
}

}  // namespace

int64_t matmul_scratch(const MatmulParams& p, int64_t rows, int64_t columns) {
  const bool wide = p.terms[0].a.dtype == Dtype::f64;
  return (wide ? MatmulScratch<double>(rows, columns, nullptr).end : MatmulScratch<float>(rows, columns, nullptr).end) -
         static_cast<char*>(nullptr);
}

void matmul_kernel(const MatmulParams& p, const MatmulItem& item, void* scratch) {
  if (p.terms[0].a.dtype == Dtype::f64)
    run_item<double>(p, item, scratch);
  else
    run_item<float>(p, item, scratch);
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(int64_t, matmul_scratch, (const MatmulParams& p, int64_t rows, int64_t columns),
                           (p, rows, columns))
GENAI_KERNELS_ISA_DISPATCH(void, matmul_kernel, (const MatmulParams& p, const MatmulItem& item, void* scratch),
                           (p, item, scratch))

#endif
