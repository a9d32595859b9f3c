// Packs the operands of a matrix product into words of tile_gemm.h's products: rows with their words side by side, or with
// the rows in the lanes. Included inside an instruction-set region after vec.h, tile_gemm.h, transpose.h,
// attention_pack.h and quantized.h; include cpu/matmul.h before the region.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// nothrow, here and in dot_matmul.cpp: a call that might throw makes GCC 12 keep a landing pad now and then, and with it a
// weak symbol, which no kernel may define.
//
// x[0, count) = columns [column, column + count) of a row, of which dropout keeps some.
template <class C>
[[gnu::nothrow]] void drop(const Dropout& dropout, int64_t row, int64_t column, C* x, int64_t count) {
  constexpr int kWord = 16, kBlock = 4 * kWord;
  const C scale = C(dropout.scale);
  for (int64_t block = column / kBlock * kBlock; block < column + count; block += kBlock) {
    uint32_t c1[kWord], c2[kWord], words[4][kWord];
    for (int l = 0; l < kWord; ++l) c1[l] = uint32_t(block / kBlock * kWord + l), c2[l] = uint32_t(uint64_t(row) >> 32);
    philox(uint32_t(row), c1, c2, kDropoutStream, dropout.seed, words);
    for (int w = 0; w < 4; ++w)
      for (int l = 0; l < kWord; ++l) {
        const int64_t i = block + w * kWord + l - column;
        if (0 <= i && i < count) x[i] = words[w][l] >= dropout.threshold ? x[i] * scale : C(0);
      }
  }
}

GK_INLINE int64_t token_of(const MatmulOperand& m, int64_t i) { return m.tokens ? m.tokens[i] : i; }

// Registers x[l] = words of row i + l from element k of it, of an operand of any strides; zeros past `rows` and `depth`.
template <class P, class T>
GK_INLINE void load_square(const MatmulOperand& m, int64_t i, int64_t rows, int64_t k, int64_t depth,
                           Vec<typename P::Compute> (&x)[kLanesOf<typename P::Compute>]) {
  constexpr int kStep = kLanesOf<typename P::Compute>;
  const T* data = static_cast<const T*>(m.data);
  if (m.depth == 1) {
    GK_UNROLL for (int l = 0; l < kStep; ++l) x[l] =
        i + l < rows ? load_row_words<P>(data + (i + l) * m.outer + k, 0, depth - k) : Vec<typename P::Compute>{};
    return;
  }
  for (int l = 0; l < kStep; ++l) {
    T row[kStep * P::kPerWord] = {};
    if (i + l < rows)
      for (int64_t e = 0; e < kStep * P::kPerWord && k + e < depth; ++e)
        row[e] = data[(i + l) * m.outer + (k + e) * m.depth];
    x[l] = load_row_words<P>(row, 0, kStep * P::kPerWord);
  }
}

// One register of words with the rows i, i + 1, ... in its lanes, of an operand whose rows lie side by side.
template <class P, class T>
GK_INLINE Vec<typename P::Compute> load_lanes(const MatmulOperand& m, int64_t i, int64_t rows, int64_t k,
                                              int64_t depth) {
  const T* data = static_cast<const T*>(m.data);
  if constexpr (P::kPerWord == 1) {
    return load_at(data + token_of(m, k) * m.depth, i, rows);
  } else {
    const VecF low = load_at(data + token_of(m, k) * m.depth, i, rows);
    const VecF high = k + 1 < depth ? load_at(data + token_of(m, k + 1) * m.depth, i, rows) : VecF{};
    return bit_cast<VecF>((bit_cast<VecU>(low) >> 16) | (bit_cast<VecU>(high) & 0xffff0000));  // exact: they are bf16
  }
}

// Rows that are asked for ahead of the one that is packed.
constexpr int kRowsAhead = 8;

// to[row][stride words] = rows [begin, end) of A, elements [k, depth) of them; zeros up to a whole register. Those up to
// `rows` come next.
template <class P, class T>
[[gnu::nothrow]] void pack_rows(const MatmulOperand& a, int64_t begin, int64_t end, int64_t rows, int64_t k,
                                int64_t depth, typename P::Word* to, int64_t stride) {
  using C = typename P::Compute;
  constexpr int kStep = kLanesOf<C>;
  if constexpr (is_same<T, QuantizedElement>) {
    return switch_kind(a.quantized->kind, [&]<QuantizedKind Kind>() {
      pack_quantized_rows<P, Kind>(*a.quantized, begin, end, rows, k, depth, to, stride);
    });
  } else {
    const T* data = static_cast<const T*>(a.data);
    const int64_t words = (depth - k + P::kPerWord - 1) / P::kPerWord;
    const auto put = [&](int64_t row, int64_t word, Vec<C> x)
                         GK_LAMBDA_INLINE { __builtin_memcpy(to + (row - begin) * stride + word, &x, sizeof x); };
    if (a.depth == 1) {
      for (int64_t row = begin; row < end; ++row) {
        const T* from = data + token_of(a, row) * a.outer + k;
        const T* ahead = row + kRowsAhead < rows ? data + token_of(a, row + kRowsAhead) * a.outer + k : nullptr;
        for (int64_t w = 0; w < words; w += kStep) {
          if (ahead) __builtin_prefetch(ahead + w * P::kPerWord);
          put(row, w, load_row_words<P>(from, w, depth - k));
        }
        if constexpr (P::kPerWord == 1)
          if (a.dropout) drop(*a.dropout, token_of(a, row), k, to + (row - begin) * stride, depth - k);
      }
      return;
    }
    for (int64_t row = begin; row < end; row += kStep)
      for (int64_t w = 0; w < words; w += kStep) {
        Vec<C> x[kStep];
        const int64_t at = k + w * P::kPerWord;
        if (a.outer == 1) {
          GK_UNROLL for (int l = 0; l < kStep; ++l) {
            const int64_t from = at + l * P::kPerWord;
            x[l] = from < depth ? load_lanes<P, T>(a, row, end, from, depth) : Vec<C>{};
          }
          transpose(x);
        } else {
          load_square<P, T>(a, row, end, at, depth, x);
        }
        for (int l = 0; l < kStep && row + l < end; ++l) put(row + l, w, x[l]);
      }
  }
}

// The cache lines that a panel of an operand is packed from, asked for little by little while another is multiplied.
struct PanelLines {
  const char* data;
  int64_t stride, a_row, total, asked = 0, row = 0, line = 0;  // `a_row` lines in each of the rows

  PanelLines(const MatmulOperand& b, int64_t begin, int64_t end, int64_t k, int64_t depth) {
    const bool across = b.outer == 1;
    const int64_t first_row = across ? k : begin, rows = across ? depth - k : end - begin;
    const int64_t first = across ? begin : k, last = across ? end : depth;
    int64_t bytes;
    if (b.quantized) {
      const QuantizedMatrix& m = *b.quantized;
      const int64_t aligned = first / 32 * 32;
      stride = m.row_bytes;
      data = reinterpret_cast<const char*>(m.data) + first_row * stride + bytes_of(m.kind, aligned);
      bytes = bytes_of(m.kind, last - aligned);
    } else {
      const int64_t size = b.dtype == Dtype::f64 ? 8 : b.dtype == Dtype::f32 ? 4 : 2;
      stride = (across ? b.depth : b.outer) * size;
      data = static_cast<const char*>(b.data) + (begin * b.outer + k * b.depth) * size;
      bytes = (last - first) * size;
    }
    a_row = (bytes + 63) / 64;
    total = last > first && !b.tokens ? a_row * rows : 0;
  }
  GK_INLINE void ask(int64_t done, int64_t rows) {
    for (const int64_t to = done == rows ? total : total / rows * done; asked < to; ++asked) {
      __builtin_prefetch(data + row * stride + line * 64, 0, 2);
      if (++line == a_row) line = 0, ++row;
    }
  }
};

// to[word][stride lanes] = columns [begin, end) of B, elements [k, depth) of them; zeros in the lanes past `end`, up to a
// whole register.
template <class P, class T>
[[gnu::nothrow]] void pack_lanes(const MatmulOperand& b, int64_t begin, int64_t end, int64_t k, int64_t depth,
                                 typename P::Word* to, int64_t stride) {
  using C = typename P::Compute;
  constexpr int kStep = kLanesOf<C>;
  if constexpr (is_same<T, QuantizedElement>) {
    return switch_kind(b.quantized->kind, [&]<QuantizedKind Kind>() {
      pack_quantized_lanes<P, Kind>(*b.quantized, begin, end, k, depth, to, stride);
    });
  } else {
    const int64_t words = (depth - k + P::kPerWord - 1) / P::kPerWord;
    for (int64_t i = begin; i < end; i += kStep) {
      typename P::Word* lanes = to + (i - begin);
      if (b.outer == 1) {
        for (int64_t w = 0; w < words; ++w) {
          const Vec<C> x = load_lanes<P, T>(b, i, end, k + w * P::kPerWord, depth);
          __builtin_memcpy(lanes + w * stride, &x, sizeof x);
        }
        continue;
      }
      for (int64_t w = 0; w < words; w += kStep) {
        Vec<C> x[kStep];
        load_square<P, T>(b, i, end, k + w * P::kPerWord, depth, x);
        transpose(x);
        for (int l = 0; l < kStep && w + l < words; ++l) __builtin_memcpy(lanes + (w + l) * stride, &x[l], sizeof x[l]);
      }
    }
    if constexpr (P::kPerWord == 1)
      for (int64_t w = 0; b.dropout && w < words; ++w)
        drop(*b.dropout, token_of(b, k + w), begin, to + w * stride, end - begin);
  }
}

// pack_rows and pack_lanes for what an operand holds. Through pointers, so that a product is compiled once for what it
// multiplies and not once for each pair of types.
template <class P>
using PackRows = void (*)(const MatmulOperand&, int64_t, int64_t, int64_t, int64_t, int64_t, typename P::Word*,
                          int64_t);
template <class P>
using PackLanes = void (*)(const MatmulOperand&, int64_t, int64_t, int64_t, int64_t, typename P::Word*, int64_t);

// f(type) with what an operand of a product holds.
template <class P, class F>
GK_INLINE void with_type(const MatmulOperand& m, F&& f) {
  if (m.quantized) return f(TypeTag<QuantizedElement>{});
  if constexpr (P::kPerWord == 2) return f(TypeTag<bf16>{});
  switch_dtype(m.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (is_same<Compute<T>, typename P::Compute>) f(TypeTag<T>{});
  });
}
template <class P>
PackRows<P> row_packer(const MatmulOperand& m) {
  PackRows<P> packer = nullptr;
  with_type<P>(m, [&](auto type) { packer = pack_rows<P, typename decltype(type)::type>; });
  return packer;
}
template <class P>
PackLanes<P> lane_packer(const MatmulOperand& m) {
  PackLanes<P> packer = nullptr;
  with_type<P>(m, [&](auto type) { packer = pack_lanes<P, typename decltype(type)::type>; });
  return packer;
}

// Whether a product of bf16 pairs may multiply these: what dropout scales is bf16 no more.
GK_INLINE bool multiplies_pairs(const MatmulOperand& a, const MatmulOperand& b) {
  return a.dtype == Dtype::bf16 && (b.quantized || b.dtype == Dtype::bf16) && !a.dropout && !b.dropout;
}

// to[0, n) = from, rounded.
template <class C, class T>
GK_INLINE void put_row(const C* from, int64_t n, T* to) {
  int64_t j = 0;
  for (; j + kLanesOf<C> <= n; j += kLanesOf<C>) store(to + j, load(from + j));
  if (j < n) store_first(to + j, load(from + j), n - j);
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
