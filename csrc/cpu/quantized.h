// Unpacks quantized matrices (cpu/matmul.h) into words of tile_gemm.h's products. Included inside an instruction-set
// region after vec.h, tile_gemm.h and attention_pack.h; include cpu/matmul.h before the region.

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

// The quantiles of a normal distribution that QLoRA (arXiv 2305.14314, appendix E) codes 4 bits with.
constexpr float kNf4[16] = {-1.0f,
                            -0.6961928009986877f,
                            -0.5250730514526367f,
                            -0.39491748809814453f,
                            -0.28444138169288635f,
                            -0.18477343022823334f,
                            -0.09105003625154495f,
                            0.0f,
                            0.07958029955625534f,
                            0.16093020141124725f,
                            0.24611230194568634f,
                            0.33791524171829224f,
                            0.44070982933044434f,
                            0.5626170039176941f,
                            0.7229568362236023f,
                            1.0f};
constexpr float kInt4[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// 16 bytes as integers, one in each lane.
GK_INLINE void widen_bytes(const uint8_t* from, VecI (&to)[kQuantizedStep / kLanes]) {
#if GENAI_KERNELS_ISA_LANES == 16
  to[0] = (VecI)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif GENAI_KERNELS_ISA_LANES == 8
  GK_UNROLL for (int i = 0; i < 2; ++i) to[i] =
      (VecI)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i)));
#else
  for (int i = 0; i < 4; ++i)
    for (int l = 0; l < kLanes; ++l) to[i][l] = from[kLanes * i + l];
#endif
}
GK_INLINE void widen_bytes(const int8_t* from, VecI (&to)[kQuantizedStep / kLanes]) {
#if GENAI_KERNELS_ISA_LANES == 16
  to[0] = (VecI)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif GENAI_KERNELS_ISA_LANES == 8
  GK_UNROLL for (int i = 0; i < 2; ++i) to[i] =
      (VecI)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i)));
#else
  for (int i = 0; i < 4; ++i)
    for (int l = 0; l < kLanes; ++l) to[i][l] = from[kLanes * i + l];
#endif
}

// table[q % 16].
GK_INLINE VecF look_up(const VecF (&table)[16 / kLanes], VecI q) {
#if GENAI_KERNELS_ISA_LANES == 16
  return (VecF)_mm512_permutexvar_ps((__m512i)q, (__m512)table[0]);
#elif GENAI_KERNELS_ISA_LANES == 8
  const __m256 low = _mm256_permutevar8x32_ps((__m256)table[0], (__m256i)q);
  const __m256 high = _mm256_permutevar8x32_ps((__m256)table[1], (__m256i)q);
  return (VecF)_mm256_blendv_ps(low, high, (__m256)(q << 28));
#else
  VecF x;
  for (int l = 0; l < kLanes; ++l) x[l] = table[(q[l] & 15) / kLanes][q[l] % kLanes];
  return x;
#endif
}

template <class C>
GK_INLINE C scale_of(const QuantizedMatrix& m, int64_t at) {
  return m.scale ? C(m.scale[at]) : C(m.scale_code[at]) * C(m.code_scale[at / kScaleBlock]);
}

// What the elements of a group are, by code; of int8 its scale.
constexpr int kStepRegisters = kQuantizedStep / kLanes;
template <QuantizedKind Kind>
GK_INLINE void table_of(const QuantizedMatrix& m, int64_t group, VecF (&table)[kStepRegisters]) {
  const VecF scale = broadcast(scale_of<float>(m, group));
  GK_UNROLL for (int i = 0; i < kStepRegisters; ++i) {
    if constexpr (Kind == QuantizedKind::int8) table[i] = scale;
    if constexpr (Kind == QuantizedKind::int4)
      table[i] = (load(kInt4 + i * kLanes) - broadcast(float(m.zero[group]))) * scale;
    if constexpr (Kind == QuantizedKind::nf4) table[i] = load(kNf4 + i * kLanes) * scale;
  }
}

// Columns [column, column + kQuantizedStep) of a row of `n`. Past it int8 gives zeros, and 4 bits what they are.
template <QuantizedKind Kind>
GK_INLINE void load_step(const uint8_t* data, const VecF (&table)[kStepRegisters], int64_t column, int64_t n,
                         VecF (&x)[kStepRegisters]) {
  VecI q[kStepRegisters];
  if constexpr (Kind == QuantizedKind::int8) {
    const int8_t* from = reinterpret_cast<const int8_t*>(data) + column;
    if (__builtin_expect(column + kQuantizedStep <= n, 1)) {
      widen_bytes(from, q);
    } else {
      int8_t padded[kQuantizedStep] = {};
      __builtin_memcpy(padded, from, min_of<int64_t>(n - column, kQuantizedStep));
      widen_bytes(padded, q);
    }
    GK_UNROLL for (int i = 0; i < kStepRegisters; ++i) x[i] = __builtin_convertvector(q[i], VecF) * table[i];
  } else {
    widen_bytes(data + column / 32 * 16, q);
    const int shift = int(column / 16 % 2) * 4;
    GK_UNROLL for (int i = 0; i < kStepRegisters; ++i) x[i] = look_up(table, q[i] >> shift);
  }
}

// The same of two steps, 32 columns from a multiple of 32 on: of 4 bits a byte has an element of each.
template <QuantizedKind Kind>
GK_INLINE void load_pair(const uint8_t* data, const VecF (&table)[kStepRegisters], int64_t column, int64_t n,
                         VecF (&x)[2][kStepRegisters]) {
  if constexpr (Kind == QuantizedKind::int8) {
    load_step<Kind>(data, table, column, n, x[0]);
    if (column + kQuantizedStep < n)
      load_step<Kind>(data, table, column + kQuantizedStep, n, x[1]);
    else
      GK_UNROLL for (int i = 0; i < kStepRegisters; ++i) x[1][i] = VecF{};
  } else {
    VecI q[kStepRegisters];
    widen_bytes(data + (column >> 1), q);
    GK_UNROLL for (int i = 0; i < kStepRegisters; ++i) {
      x[0][i] = look_up(table, q[i]);
      x[1][i] = look_up(table, q[i] >> 4);
    }
  }
}

// A row of a quantized matrix, to be packed. `begin_group` before the columns of one.
template <QuantizedKind Kind, class C>
struct QuantizedRow;

template <QuantizedKind Kind>
struct QuantizedRow<Kind, float> {
  static constexpr int kRegisters = kStepRegisters;
  const QuantizedMatrix& m;
  const uint8_t* data;
  int64_t group;  // the first of the row
  VecF table[kRegisters];

  GK_INLINE QuantizedRow(const QuantizedMatrix& m, int64_t row)
      : m(m), data(m.data + row * m.row_bytes), group(row * m.groups) {}
  GK_INLINE void begin_group(int64_t column) { table_of<Kind>(m, group + (column >> m.group_bits), table); }
  GK_INLINE void load_step(int64_t column, int64_t n, VecF (&x)[kRegisters]) const {
    GENAI_KERNELS_ISA_NAME::load_step<Kind>(data, table, column, n, x);
  }
  GK_INLINE void load_pair(int64_t column, int64_t n, VecF (&x)[2][kRegisters]) const {
    GENAI_KERNELS_ISA_NAME::load_pair<Kind>(data, table, column, n, x);
  }
};

// float64, for the derivatives' checks: element by element.
template <QuantizedKind Kind>
struct QuantizedRow<Kind, double> {
  static constexpr int kRegisters = kQuantizedStep / kLanesOf<double>;
  const QuantizedMatrix& m;
  const uint8_t* data;
  int64_t group;
  double scale, zero;

  QuantizedRow(const QuantizedMatrix& m, int64_t row) : m(m), data(m.data + row * m.row_bytes), group(row * m.groups) {}
  void begin_group(int64_t column) {
    const int64_t at = group + (column >> m.group_bits);
    scale = scale_of<double>(m, at);
    zero = m.zero ? m.zero[at] : 0;
  }
  void load_step(int64_t column, int64_t n, VecD (&x)[kRegisters]) const {
    double elements[kQuantizedStep] = {};
    for (int i = 0; i < kQuantizedStep && column + i < n; ++i) {
      if constexpr (Kind == QuantizedKind::int8) {
        elements[i] = double(int8_t(data[column + i])) * scale;
      } else {
        const int q = data[column / 32 * 16 + i] >> (column / 16 % 2 * 4) & 15;
        elements[i] = Kind == QuantizedKind::nf4 ? kNf4[q] * scale : (q - zero) * scale;
      }
    }
    __builtin_memcpy(x, elements, sizeof x);
  }
  void load_pair(int64_t column, int64_t n, VecD (&x)[2][kRegisters]) const {
    load_step(column, n, x[0]);
    load_step(column + kQuantizedStep, n, x[1]);
  }
};

template <class F>
GK_INLINE void switch_kind(QuantizedKind kind, F&& f) {
  switch (kind) {
    case QuantizedKind::int8:
      return f.template operator()<QuantizedKind::int8>();
    case QuantizedKind::int4:
      return f.template operator()<QuantizedKind::int4>();
    case QuantizedKind::nf4:
      return f.template operator()<QuantizedKind::nf4>();
  }
}

// Bytes in front of a column, a multiple of 32.
GK_INLINE int64_t bytes_of(QuantizedKind kind, int64_t columns) {
  return kind == QuantizedKind::int8 ? columns : (columns + 31) / 32 * 16;
}

// to[row][stride words] = columns [k, depth) of rows [begin, end), with something finite up to 32 whole columns. Those up
// to `rows` come next.
template <class P, QuantizedKind Kind>
void pack_quantized_rows(const QuantizedMatrix& m, int64_t begin, int64_t end, int64_t rows, int64_t k, int64_t depth,
                         typename P::Word* to, int64_t stride) {
  using C = typename P::Compute;
  using Row = QuantizedRow<Kind, C>;
  for (int64_t r = begin; r < end; ++r, to += stride) {
    Row row(m, r);
    const uint8_t* ahead = m.data + min_of(r + end - begin, rows - 1) * m.row_bytes;
    for (int64_t i = 0, bytes = bytes_of(Kind, depth - k); i < bytes; i += 64)
      __builtin_prefetch(ahead + bytes_of(Kind, k) + i);
    for (int64_t group = k; group < depth;) {
      row.begin_group(group);
      const int64_t next = ((group >> m.group_bits) + 1) << m.group_bits, stop = min_of(next, depth);
      for (int64_t column = group; column < stop; column += 2 * kQuantizedStep) {
        Vec<C> x[2][Row::kRegisters];
        row.load_pair(column, depth, x);
        typename P::Word* words = to + (column - k) / P::kPerWord;
        if constexpr (P::kPerWord == 1) {
          GK_UNROLL for (int h = 0; h < 2; ++h) GK_UNROLL for (int i = 0; i < Row::kRegisters; ++i)
              store(words + h * kQuantizedStep + i * kLanesOf<C>, x[h][i]);
        } else {
          GK_UNROLL for (int h = 0; h < 2; ++h) store(reinterpret_cast<bf16*>(words) + h * kQuantizedStep, x[h][0]);
        }
      }
      group = stop;
    }
  }
}

// to[word][stride lanes] = columns [begin, end) of rows [k, depth), something finite in the lanes past `end`, up to a
// whole register.
template <class P, QuantizedKind Kind>
void pack_quantized_lanes(const QuantizedMatrix& m, int64_t begin, int64_t end, int64_t k, int64_t depth,
                          typename P::Word* to, int64_t stride) {
  using C = typename P::Compute;
  using Row = QuantizedRow<Kind, C>;
  for (int64_t r = k; r < depth; r += 2, to += 2 / P::kPerWord * stride) {
    for (int64_t column = begin; column < end; column += kQuantizedStep) {
      Vec<C> x[2][Row::kRegisters];
      GK_UNROLL for (int h = 0; h < 2; ++h) {
        if (r + h < depth) {
          Row row(m, r + h);
          row.begin_group(column);
          row.load_step(column, end, x[h]);
        } else {
          GK_UNROLL for (int i = 0; i < Row::kRegisters; ++i) x[h][i] = Vec<C>{};
        }
      }
      GK_UNROLL for (int i = 0; i < Row::kRegisters; ++i) {
        const Vec<C> pair[2] = {x[0][i], x[1][i]};
        C* lanes = reinterpret_cast<C*>(to) + (column - begin) + i * kLanesOf<C>;
        if (P::kPerWord == 2 || r + 1 < depth)
          P::store_pair(lanes, stride, pair);
        else
          store(lanes, pair[0]);
      }
    }
  }
}

}  // namespace
}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME
