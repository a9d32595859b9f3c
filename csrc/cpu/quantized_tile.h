// A tile of dot products with rows of a quantized matrix, unpacked in registers: for few rows of A, where packing would
// cost more than the product. Included inside an instruction-set region after quantized.h and dot_tile.h.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// Columns of C as rows of a quantized matrix, from element k of them on.
template <QuantizedKind Kind>
struct QuantizedRows {
  const QuantizedMatrix& m;
  int64_t row[kDotColumns], k;
};

// What a product takes of 32 columns of a row: registers of words, by a table that is made once for a group.
template <class P, QuantizedKind Kind>
struct QuantizedWords {
  static constexpr int kRegisters = 2 * kStepRegisters;
  using Table = VecF[kStepRegisters];
  GK_INLINE static void table(const QuantizedMatrix& m, int64_t group, Table& to) { table_of<Kind>(m, group, to); }
  GK_INLINE static void load(const uint8_t* data, const Table& table, int64_t column, int64_t n,
                             VecF (&x)[kRegisters]) {
    VecF pair[2][kStepRegisters];
    load_pair<Kind>(data, table, column, n, pair);
    GK_UNROLL for (int i = 0; i < kRegisters; ++i) x[i] = pair[i / kStepRegisters][i % kStepRegisters];
  }
};
#if GENAI_KERNELS_ISA_BF16
// Of 4 bits the table is of bf16, twice, since vpermw looks at five bits of an index.
template <QuantizedKind Kind>
struct QuantizedWords<DotBf16, Kind> {
  static constexpr int kRegisters = 1;
  using Table = VecF[1];
  GK_INLINE static void table(const QuantizedMatrix& m, int64_t group, Table& to) {
    table_of<Kind>(m, group, to);
    if constexpr (Kind != QuantizedKind::int8) {
      const VecHalves halves = narrow_bf16(to[0]);
      to[0] = (VecF)_mm512_broadcast_i64x4((__m256i)halves);
    }
  }
  GK_INLINE static void load(const uint8_t* data, const Table& table, int64_t column, int64_t n, VecF (&x)[1]) {
    if constexpr (Kind == QuantizedKind::int8) {
      VecF halves[2][1];
      load_pair<Kind>(data, table, column, n, halves);
      x[0] = (VecF)_mm512_cvtne2ps_pbh((__m512)halves[1][0], (__m512)halves[0][0]);
    } else {
      const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + (column >> 1)));
      const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_srli_epi16(low, 4), 1);
      x[0] = (VecF)_mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(both), (__m512i)table[0]);
    }
  }
};
#endif

template <class P, int Rows, int Columns, QuantizedKind Kind>
GK_INLINE void dot_tile(const typename P::Word* a, int64_t a_stride, const QuantizedRows<Kind>& b, int64_t depth,
                        VecF (&sum)[Rows * Columns][kDotRegisters]) {
  using Words = QuantizedWords<P, Kind>;
  const QuantizedMatrix& m = b.m;
  const uint8_t* data[Columns];
  int64_t group[Columns];
  GK_UNROLL for (int c = 0; c < Columns; ++c) {
    data[c] = m.data + b.row[c] * m.row_bytes;
    group[c] = b.row[c] * m.groups;
  }
  typename Words::Table table[Columns];
  const auto step = [&](int64_t column, int64_t until) GK_LAMBDA_INLINE {
    GK_UNROLL for (int c = 0; c < Columns; ++c) {
      VecF y[Words::kRegisters];
      Words::load(data[c], table[c], column, until, y);
      GK_UNROLL for (int i = 0; i < Words::kRegisters; ++i) {
        if (column + i * kLanes * P::kPerWord >= until) continue;  // nothing of A was packed there
        const int64_t word = (column - b.k) / P::kPerWord + i * kLanes;
        GK_UNROLL for (int r = 0; r < Rows; ++r) {
          const auto x = P::load_words(a + r * a_stride + word);
          sum[r * Columns + c][i % kDotRegisters] =
              P::multiply_add(sum[r * Columns + c][i % kDotRegisters], x, bit_cast<decltype(P::load_words(a))>(y[i]));
        }
      }
    }
  };
  const int64_t end = b.k + depth;
  for (int64_t column = b.k; column < end;) {
    const int64_t at = column >> m.group_bits, next = (at + 1) << m.group_bits, stop = min_of(next, end);
    GK_UNROLL for (int c = 0; c < Columns; ++c) Words::table(m, group[c] + at, table[c]);
    for (; column + 32 <= stop; column += 32) step(column, column + 32);
    if (column < stop) step(column, stop);
    column = stop;
  }
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
