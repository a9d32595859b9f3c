// C = A B' on the CPU with the contraction in the lanes. See cpu/matmul.h.
//
// The rows of A of an item are packed for one piece of the depth (converted, side by side), then six rows of B after the
// other are multiplied with all of them, read where they lie (24 KiB, half of an L1) unless they must be converted for
// many rows; the next six come into the L2 meanwhile. So a product with few rows runs at the speed at which B comes from
// memory. The adapters of a row go on in the sums of its last piece, before these are added over the lanes.
#include "cpu/matmul.h"
#include "cpu/region_headers.h"

#define GENAI_KERNELS_ISA_FILE "cpu/dot_matmul.cpp"
#define GENAI_KERNELS_ISA_DOT_BF16
#include "cpu/foreach_isa.h"

#ifdef GENAI_KERNELS_ISA_NAME
#include "cpu/vec.h"
#include "cpu/exp.h"
#include "cpu/activations.h"
#include "cpu/tile_gemm.h"
#include "cpu/transpose.h"
#include "cpu/attention_pack.h"
#include "cpu/quantized.h"
#include "cpu/pack_operand.h"
#include "cpu/dot_tile.h"
#include "cpu/quantized_tile.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

constexpr int64_t kDotStride = kDotDepth + 16;  // rows that do not share the sets of an L1
// With so few rows of A, reading those of B as they lie costs less than to pack them.
constexpr int64_t kFewRows = 8;
constexpr int kLinesAhead = 16;
// A row of few bits is short: the L1 has not enough lines under way for the next six, but the L2 has for those after.
constexpr int kQuantizedAhead = 2;
// The baseline has one way: B is packed unless it is made of words. Its conversions, unrolled in every product, would be
// half of this file.
constexpr bool kManyWays = GENAI_KERNELS_ISA_LANES > 4;

template <class C>
struct DotScratch {
  int64_t stride;  // of a part: whole groups of columns, and whole registers
  C *c, *a, *b;    // c [parts][groups of columns][rows][columns of a group]: the sums of a tile lie side by side
  C *bias, *column_scale, *row;  // [parts][stride]
  char* end;

  DotScratch(int parts, int64_t rows, int64_t columns, void* memory)
      : stride(round_up(columns, kDotColumns * kLanesOf<C>)) {
    Arena arena(memory);
    c = arena.take<C>(parts * rows * stride);
    a = arena.take<C>(round_up(rows, kDotRows) * kDotStride);
    b = arena.take<C>(kDotColumns * kDotStride);
    bias = arena.take<C>(parts * stride);
    column_scale = arena.take<C>(parts * stride);
    row = arena.take<C>(parts * stride);
    end = arena.end();
  }
};

// c[0, Count) += or = sums.
template <int Count, class C>
GK_INLINE void add_first(C* c, Vec<C> sums, bool first) {
  if constexpr (Count == kLanesOf<C>) {
    store(c, first ? sums : load(c) + sums);
  } else if constexpr (2 * Count == kLanesOf<C>) {
    typedef C Half __attribute__((vector_size(kRegisterBytes / 2)));
    Half half, old;
    __builtin_memcpy(&half, &sums, sizeof half);
    __builtin_memcpy(&old, c, sizeof old);
    if (!first) half = half + old;
    __builtin_memcpy(c, &half, sizeof half);
  } else {
    for (int i = 0; i < Count; ++i) c[i] = first ? sums[i] : c[i] + sums[i];
  }
}

// sum += what the adapters of a row of C add to columns [column, column + kDotColumns).
template <class C>
[[gnu::nothrow]] void add_adapters(const DotMatmulParams& p, int64_t row, int64_t column,
                                   Vec<C> (*sum)[kDotRegisters]) {
  for (int64_t i = p.adapters_begin[row]; i < p.adapters_begin[row + 1]; ++i) {
    const AdapterB& b = *p.adapters[i].b;
    const C* s = static_cast<const C*>(p.adapters[i].s);
    switch_dtype(b.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if constexpr (is_same<Compute<T>, C>)
        for (int j = 0; j < kDotColumns; ++j) {
          const int64_t at = column + j;
          if (at < b.column_begin || at >= b.column_end) continue;
          const T* data = static_cast<const T*>(b.data) + (at - b.column_begin) * b.outer;
          for (int64_t k = 0; k < b.rank; k += kLanesOf<C>) {
            Vec<C>& to = sum[j][k / kLanesOf<C> % kDotRegisters];
            if (b.depth == 1) {
              to = fma(load(s + k), load_at(data, k, b.rank), to);
            } else {
              T part[kLanesOf<C>] = {};
              for (int l = 0; l < kLanesOf<C> && k + l < b.rank; ++l) part[l] = data[(k + l) * b.depth];
              to = fma(load(s + k), load(part), to);
            }
          }
        }
    });
  }
}

// What the rows of a tile share: one adapter for all its columns, and parts of S that lie evenly. The same additions as
// add_adapters makes, without leaving the registers.
template <class C>
struct SharedAdapter {
  const AdapterB* b = nullptr;
  const C* s = nullptr;
  int64_t stride = 0;
};
template <class C, int Rows>
GK_INLINE SharedAdapter<C> shared_adapter(const DotMatmulParams& p, int64_t row, int64_t column, int64_t end) {
  const int64_t* begin = p.adapters_begin + row;
  const RowAdapter* first = p.adapters + begin[0];
  if constexpr (!kManyWays && is_same<C, float>)
    if (begin[1] - begin[0] != 1 || first->b->dtype != Dtype::f32) return {};
  if (begin[1] - begin[0] != 1 || first->b->depth != 1 || column < first->b->column_begin || end > first->b->column_end)
    return {};
  const C* s = static_cast<const C*>(first->s);
  const int64_t stride = Rows > 1 && begin[2] - begin[1] == 1 ? static_cast<const C*>(first[1].s) - s : 0;
  for (int r = 1; r < Rows; ++r)
    if (begin[r + 1] - begin[r] != 1 || first[r].b != first->b || static_cast<const C*>(first[r].s) != s + r * stride)
      return {};
  return {first->b, s, stride};
}

// Columns of C, at most kDotColumns, to which the adapters of a row come now; or none, at -1.
struct AdapterColumns {
  int64_t begin, end;
};

// C[rows][columns of one group] += or = A B' over one piece. `row` is where that is in C.
template <class P, int Rows, class B>
GK_INLINE void multiply_rows(const DotMatmulParams& p, int64_t row, AdapterColumns columns, const typename P::Word* a,
                             const B& b, int64_t depth, typename P::Compute* c, bool first) {
  using C = typename P::Compute;
  constexpr int kCount = Rows * kDotColumns, kLanesC = kLanesOf<C>;
  Vec<C> sum[kCount][kDotRegisters] = {};
  dot_tile<P, Rows, kDotColumns>(a, kDotStride, b, depth, sum);
  const int64_t column = columns.begin;
  if (const auto shared = column >= 0 ? shared_adapter<C, Rows>(p, row, column, columns.end) : SharedAdapter<C>{};
      shared.b) {
    const int64_t last = columns.end - 1;
    const auto add = [&](auto type) GK_LAMBDA_INLINE {
      using Stored = typename decltype(type)::type;
      const Stored* rows[kDotColumns];
      for (int j = 0; j < kDotColumns; ++j)
        rows[j] = static_cast<const Stored*>(shared.b->data) +
                  (min_of(column + j, last) - shared.b->column_begin) * shared.b->outer;
      dot_tile<Fma<C>, Rows, kDotColumns>(shared.s, shared.stride, rows, shared.b->rank, sum);
    };
    if constexpr (!kManyWays || sizeof(C) == 8)
      add(TypeTag<C>{});
    else if (shared.b->dtype == Dtype::f32)
      add(TypeTag<float>{});
    else if (shared.b->dtype == Dtype::bf16)
      add(TypeTag<bf16>{});
    else
      add(TypeTag<fp16>{});
  } else if (column >= 0) {
    // a copy: the sums have no address, or they would not stay in registers
    Vec<C> with_adapters[kCount][kDotRegisters];
    GK_UNROLL for (int i = 0; i < kCount; ++i) GK_UNROLL for (int h = 0; h < kDotRegisters; ++h) with_adapters[i][h] =
        sum[i][h];
    for (int r = 0; r < Rows; ++r) add_adapters<C>(p, row + r, column, with_adapters + r * kDotColumns);
    GK_UNROLL for (int i = 0; i < kCount; ++i) GK_UNROLL for (int h = 0; h < kDotRegisters; ++h) sum[i][h] =
        with_adapters[i][h];
  }
  const auto add = [&](auto at, auto size) GK_LAMBDA_INLINE {
    constexpr int kAt = decltype(at)::value, kSize = decltype(size)::value;
    Vec<C> x[kSize];
    GK_UNROLL for (int l = 0; l < kSize; ++l) {
      x[l] = sum[kAt + l][0];
      if constexpr (kDotRegisters == 2) x[l] = x[l] + sum[kAt + l][1];
      if constexpr (kDotRegisters == 4) x[l] = (x[l] + sum[kAt + l][2]) + (sum[kAt + l][1] + sum[kAt + l][3]);
    }
    const Vec<C> sums = add_lanes<C, kSize>(x);
    add_first<kSize>(c + kAt, sums, first);
  };
  constexpr int kWhole = kCount / kLanesC * kLanesC;
  if constexpr (kWhole > 0) add(IntTag<0>{}, IntTag<kLanesC>{});
  if constexpr (kWhole > kLanesC) add(IntTag<kLanesC>{}, IntTag<kLanesC>{});
  if constexpr (kWhole > 2 * kLanesC) add(IntTag<2 * kLanesC>{}, IntTag<kLanesC>{});
  static_assert(kWhole <= 3 * kLanesC);
  if constexpr (kWhole < kCount) add(IntTag<kWhole>{}, IntTag<kCount - kWhole>{});
}

template <class P, class B>
[[gnu::nothrow]] void multiply_group(const DotMatmulParams& p, int64_t row, int64_t rows, AdapterColumns columns,
                                     const typename P::Word* a, const B& b, int64_t depth, typename P::Compute* c,
                                     bool first, PanelLines lines) {
  int64_t r = 0;
  const auto run = [&](auto size) GK_LAMBDA_INLINE {
    constexpr int kRows = decltype(size)::value;
    for (; r + kRows <= rows; r += kRows) {
      if (rows > kFewRows) lines.ask(r + kRows, rows);  // the hardware sees what a few rows will want
      multiply_rows<P, kRows>(p, row + r, columns, a + r * kDotStride, b, depth, c + r * kDotColumns, first);
    }
  };
  if constexpr (kDotRows == 4) run(IntTag<4>{});
  run(IntTag<2>{});
  run(IntTag<1>{});
}

template <class P>
[[gnu::nothrow]] void multiply_item(const DotMatmulParams& p, const MatmulItem& item,
                                    const DotScratch<typename P::Compute>& scratch) {
  using C = typename P::Compute;
  using Word = typename P::Word;
  const int64_t rows = item.row_end - item.row_begin, width = item.column_end - item.column_begin;
  const int64_t groups = (width + kDotColumns - 1) / kDotColumns;  // of a part
  // the rows of B of a group
  const auto begin_of = [&](int64_t group) GK_LAMBDA_INLINE {
    return group / groups * p.columns + item.column_begin + group % groups * kDotColumns;
  };
  const auto end_of = [&](int64_t group) GK_LAMBDA_INLINE {
    return min_of(begin_of(group) + kDotColumns, group / groups * p.columns + item.column_end);
  };
  Word *a = reinterpret_cast<Word*>(scratch.a), *packed = reinterpret_cast<Word*>(scratch.b);
  const PackRows<P> pack_a = row_packer<P>(p.a), pack_b = row_packer<P>(p.b);
  const bool is_words = P::kPerWord == 1 && (is_same<C, double> || p.b.dtype == Dtype::f32);
  const bool as_it_lies = p.b.quantized ? kManyWays && is_same<C, float> && rows <= kDotRows  // unpacked once
                                        : p.b.depth == 1 && ((kManyWays && rows <= kFewRows) || is_words);
  for (int64_t k = 0; k == 0 || k < p.depth; k += kDotDepth) {  // also where the sum is empty
    const int64_t until = min_of(p.depth, k + kDotDepth), depth = until - k;
    pack_a(p.a, item.row_begin, item.row_end, item.row_end, k, until, a, kDotStride);
    for (int64_t group = 0; group < p.parts * groups; ++group) {
      const int64_t j = begin_of(group), stop = end_of(group);
      C* c = scratch.c + (group / groups * scratch.stride + group % groups * kDotColumns) * rows;
      const AdapterColumns columns{until == p.depth && p.adapters_begin ? j : -1, stop};
      // what comes next, asked for meanwhile
      const bool last = group + 1 == p.parts * groups;
      const int64_t next = last ? 0 : group + 1, next_k = last ? until : k;
      const PanelLines lines(p.b, begin_of(next), end_of(next), next_k, min_of(p.depth, next_k + kDotDepth));
      const auto multiply = [&](const auto& b, int64_t elements) GK_LAMBDA_INLINE {
        multiply_group<P>(p, item.row_begin, rows, columns, a, b, elements, c, k == 0, lines);
      };
      if (!as_it_lies) {
        pack_b(p.b, j, stop, p.parts * p.columns, k, until, packed, kDotStride);
        const auto multiply_packed = [&](auto type) {
          using B = typename decltype(type)::type;
          const B* b[kDotColumns];
          for (int i = 0; i < kDotColumns; ++i)
            b[i] = reinterpret_cast<const B*>(packed + min_of<int64_t>(i, stop - j - 1) * kDotStride);
          multiply(b, round_up(depth, P::kPerWord));
        };
        if constexpr (P::kPerWord == 1)
          multiply_packed(TypeTag<C>{});
        else
          multiply_packed(TypeTag<bf16>{});
        continue;
      }
      with_type<P>(p.b, [&](auto type) {
        using B = typename decltype(type)::type;
        if constexpr (is_same<B, typename P::Compute> || (kManyWays && !is_same<B, QuantizedElement>)) {
          const B *data = static_cast<const B*>(p.b.data), *b[kDotColumns];
          for (int i = 0; i < kDotColumns; ++i) {
            b[i] = data + min_of(j + i, stop - 1) * p.b.outer + k;
            // the hardware goes on where a row begins, but not from one row to the next
            for (int line = 0; rows <= kFewRows && !last && line < kLinesAhead; ++line)
              __builtin_prefetch(b[i] + kDotColumns * p.b.outer + line * int64_t(64 / sizeof(B)));
          }
          multiply(b, depth);
        } else if constexpr (kManyWays && is_same<C, float>) {
          const QuantizedMatrix& m = *p.b.quantized;
          const int64_t bytes = bytes_of(m.kind, depth);
          switch_kind(m.kind, [&]<QuantizedKind Kind>() {
            QuantizedRows<Kind> b{m, {}, k};
            for (int i = 0; i < kDotColumns; ++i) {
              b.row[i] = min_of(j + i, stop - 1);
              const uint8_t* ahead =
                  m.data + (b.row[i] + kQuantizedAhead * kDotColumns) * m.row_bytes + bytes_of(m.kind, k);
              for (int64_t line = 0; !last && line < bytes; line += 64) __builtin_prefetch(ahead + line, 0, 2);
            }
            multiply(b, depth);
          });
        }
      });
    }
  }
}

// gate[0, n) = gate(gate) * other.
template <class C>
[[gnu::noinline]] void apply_gate(Gate kind, C* gate, const C* other, int64_t n) {
  const auto run = [&](auto type) {
    for (int64_t j = 0; j < n; j += kLanesOf<C>)
      store(gate + j, gate_value<typename decltype(type)::type>(load(gate + j)) * load(other + j));
  };
  switch (kind) {
    case Gate::silu:
      return run(TypeTag<Silu>{});
    case Gate::gelu:
      return run(TypeTag<GeluErf>{});
    case Gate::gelu_tanh:
      return run(TypeTag<GeluTanh>{});
  }
}

// A part of a row of `inner`.
template <class C>
[[gnu::noinline]] void keep_row(const DotMatmulParams& p, int64_t row, int64_t column, const C* from, int64_t n) {
  const int64_t at = row * p.parts * p.columns + column;
  switch_dtype(p.inner_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (is_same<Compute<T>, C>) put_row(from, n, static_cast<T*>(p.inner) + at);
  });
}

template <class C, class T>
void write_rows(const DotMatmulParams& p, const MatmulItem& item, const DotScratch<C>& scratch) {
  const int64_t rows = item.row_end - item.row_begin, columns = item.column_end - item.column_begin;
  const Vec<C> scale = broadcast(C(p.scale));
  for (int64_t r = item.row_begin; r < item.row_end; ++r) {
    for (int part = 0; part < p.parts; ++part) {
      C* row = scratch.row + part * scratch.stride;
      const C* c = scratch.c + (r - item.row_begin + part * scratch.stride / kDotColumns * rows) * kDotColumns;
      for (int64_t j = 0; j < columns; j += kDotColumns, c += rows * kDotColumns)
        for (int i = 0; i < kDotColumns; ++i) row[j + i] = c[i];
      if (p.scale != 1)
        for (int64_t j = 0; j < columns; j += kLanesOf<C>) store(row + j, load(row + j) * scale);
      if (p.column_scale.data) {
        if (p.inner) keep_row(p, r, part * p.columns + item.column_begin, row, columns);
        const C* factor = scratch.column_scale + part * scratch.stride;
        for (int64_t j = 0; j < columns; j += kLanesOf<C>) store(row + j, load(row + j) * load(factor + j));
      }
      if (p.bias.data) {
        const C* bias = scratch.bias + part * scratch.stride;
        for (int64_t j = 0; j < columns; j += kLanesOf<C>) store(row + j, load(row + j) + load(bias + j));
      }
    }
    C* row = scratch.row;
    if (p.parts == 2) {
      row += p.gate_part * scratch.stride;
      const C* other = scratch.row + (1 - p.gate_part) * scratch.stride;
      if (p.inner) {
        keep_row(p, r, item.column_begin, row, columns);
        keep_row(p, r, p.columns + item.column_begin, other, columns);
      }
      apply_gate(p.gate, row, other, columns);
    }
    put_row(row, columns, static_cast<T*>(p.out) + r * p.out_row + item.column_begin);
  }
}

// to[part][column of the item] = what an operand has for it.
template <class C>
void stage_columns(const DotMatmulParams& p, const MatmulItem& item, const MatmulOperand& m, C* to, int64_t stride) {
  if (!m.data) return;
  switch_dtype(m.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (is_same<Compute<T>, C>)
      for (int part = 0; part < p.parts; ++part)
        for (int64_t j = item.column_begin; j < item.column_end; ++j)
          to[part * stride + j - item.column_begin] =
              to_compute(static_cast<const T*>(m.data)[(part * p.columns + j) * m.outer]);
  });
}

template <class P>
void run_item(const DotMatmulParams& p, const MatmulItem& item, void* memory) {
  using C = typename P::Compute;
  const int64_t rows = item.row_end - item.row_begin, columns = item.column_end - item.column_begin;
  const DotScratch<C> scratch(p.parts, rows, columns, memory);
  multiply_item<P>(p, item, scratch);
  stage_columns(p, item, p.bias, scratch.bias, scratch.stride);
  stage_columns(p, item, p.column_scale, scratch.column_scale, scratch.stride);
  switch_dtype(p.out_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (is_same<Compute<T>, C>) write_rows<C, T>(p, item, scratch);
  });
}

}  // namespace

int64_t dot_matmul_scratch(const DotMatmulParams& p, int64_t rows, int64_t columns) {
  const bool wide = p.a.dtype == Dtype::f64;
  return (wide ? DotScratch<double>(p.parts, rows, columns, nullptr).end
               : DotScratch<float>(p.parts, rows, columns, nullptr).end) -
         static_cast<char*>(nullptr);
}

void dot_matmul_kernel(const DotMatmulParams& p, const MatmulItem& item, void* scratch) {
#if GENAI_KERNELS_ISA_BF16
  if (multiplies_pairs(p.a, p.b))
    run_item<DotBf16>(p, item, scratch);
  else
    avx512::dot_matmul_kernel(p, item, scratch);
#else
  if (p.a.dtype == Dtype::f64)
    run_item<Fma<double> >(p, item, scratch);
  else
    run_item<Fma<float> >(p, item, scratch);
#endif
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH(int64_t, dot_matmul_scratch, (const DotMatmulParams& p, int64_t rows, int64_t columns),
                           (p, rows, columns))
GENAI_KERNELS_ISA_DISPATCH(void, dot_matmul_kernel, (const DotMatmulParams& p, const MatmulItem& item, void* scratch),
                           (p, item, scratch))

#endif
