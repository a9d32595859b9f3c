// Products of int8 on the CPU, the contraction in the lanes, as in cpu/dot_matmul.cpp: rows of x are quantized once for an
// item, then six rows of the weight after the other are multiplied with all of them. Sums of integers are exact: neither
// their order nor the instruction set changes a bit.
#include "ops/quantized_linear/w8a8.h"

#include "cpu/region_headers.h"

#define GENAI_KERNELS_ISA_FILE "ops/quantized_linear/w8a8_cpu.cpp"
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
#include "cpu/dot_tile.h"

namespace genai_kernels::GENAI_KERNELS_ISA_NAME {
namespace {

constexpr int64_t kPiece = 4096;  // six rows of the weight that stay in an L1 meanwhile
constexpr float kMost = 127, kLeast = 0x1p-100f;

#if GENAI_KERNELS_ISA_BF16
// vpdpbusd multiplies unsigned by signed: x + 128, and a row of ones beside the rows of x, whose sum times 128 is taken
// off again.
using Quant = uint8_t;
constexpr int kOffset = 128;
constexpr int kBytes = 64;  // elements in a register of x
GK_INLINE VecI multiply_add(VecI sum, const Quant* a, __m512i b) {
  return (VecI)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(a), b);
}
GK_INLINE __m512i load_weight(const int8_t* from) { return _mm512_loadu_si512(from); }
GK_INLINE void store_quants(Quant* to, VecI q) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)(q + kOffset)));
}
#else
// 16 bits by 16, two products added to 32 bits.
using Quant = int16_t;
constexpr int kOffset = 0;
constexpr int kBytes = 2 * kLanes;
typedef int16_t VecQuants __attribute__((vector_size(kRegisterBytes)));
typedef int16_t HalfQuants __attribute__((vector_size(kRegisterBytes / 2)));
GK_INLINE VecI multiply_add(VecI sum, const Quant* a, VecQuants b) {
  VecQuants x;
  __builtin_memcpy(&x, a, sizeof x);
#if GENAI_KERNELS_ISA_LANES == 16
  return sum + (VecI)_mm512_madd_epi16((__m512i)x, (__m512i)b);
#elif GENAI_KERNELS_ISA_LANES == 8
  return sum + (VecI)_mm256_madd_epi16((__m256i)x, (__m256i)b);
#elif defined(__SSE2__)
  return sum + (VecI)_mm_madd_epi16((__m128i)x, (__m128i)b);
#else
  for (int l = 0; l < kLanes; ++l) sum[l] += x[2 * l] * b[2 * l] + x[2 * l + 1] * b[2 * l + 1];
  return sum;
#endif
}
GK_INLINE VecQuants load_weight(const int8_t* from) {
#if GENAI_KERNELS_ISA_LANES == 16
  return (VecQuants)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif GENAI_KERNELS_ISA_LANES == 8
  return (VecQuants)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  VecQuants x;
  for (int i = 0; i < kBytes; ++i) x[i] = from[i];
  return x;
#endif
}
GK_INLINE void store_quants(Quant* to, VecI q) {
  const HalfQuants halves = __builtin_convertvector(q, HalfQuants);
  __builtin_memcpy(to, &halves, sizeof halves);
}
#endif

constexpr int64_t kOnes = kOffset ? 1 : 0;  // rows of ones behind those of x
GK_INLINE int64_t quant_stride(int64_t depth) { return round_up(depth, 64) + 64; }

struct W8a8Scratch {
  float *row, *scale;  // a row of x, and the scale of each
  Quant* a;
  int32_t* sums;  // [rows][kDotColumns]
  char* end;

  W8a8Scratch(int64_t rows, int64_t depth, void* memory) {
    Arena arena(memory);
    row = arena.take<float>(round_up(depth, 64) + 64);
    scale = arena.take<float>(rows);
    a = arena.take<Quant>((rows + kOnes) * quant_stride(depth));
    sums = arena.take<int32_t>((rows + kOnes) * kDotColumns + 4 * kLanes);
    end = arena.end();
  }
};

// to = the row in steps of its largest magnitude / 127, the nearest ones, ties to even. Returns the step; NaN, and zeros in
// `to`, where something is not finite.
float quantize_row(const float* row, int64_t depth, Quant* to) {
  VecF largest = {};
  Finiteness<float> finite;
  for (int64_t k = 0; k < depth; k += kLanes) {  // zeros past the end
    const VecF x = load(row + k);
    finite.see(x);
    largest = max(x > 0 ? x : -x, largest);
  }
  float most = 0;
  for (int l = 0; l < kLanes; ++l) most = largest[l] > most ? float(largest[l]) : most;
  const bool good = finite.all_finite();
  const VecF by = broadcast(good ? kMost / (most > kLeast ? most : kLeast) : 0);
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to a whole number, in the low bits
  for (int64_t k = 0; k < depth; k += kLanes) {
    const VecF x = good ? load(row + k) : VecF{};
    store_quants(to + k, bit_cast<VecI>(x * by + kRound) - bit_cast<int32_t>(kRound));
  }
  return good ? most / kMost : __builtin_nanf("");
}

// sums[rows][kDotColumns] += or = rows of x times rows of the weight, elements [k, until).
template <int Rows>
GK_INLINE void multiply_tile(const Quant* a, int64_t stride, const int8_t* const (&b)[kDotColumns], int64_t k,
                             int64_t until, int32_t* sums) {
  constexpr int kCount = Rows * kDotColumns;
  VecI sum[kCount] = {};
  const auto step = [&](int64_t at, auto load_b) GK_LAMBDA_INLINE {
    GK_UNROLL for (int c = 0; c < kDotColumns; ++c) {
      const auto y = load_b(b[c] + at);
      GK_UNROLL for (int r = 0; r < Rows; ++r) sum[r * kDotColumns + c] =
          multiply_add(sum[r * kDotColumns + c], a + r * stride + at, y);
    }
  };
  int64_t at = k;
  for (; at + kBytes <= until; at += kBytes) step(at, [](const int8_t* p) GK_LAMBDA_INLINE { return load_weight(p); });
  if (at < until)
    step(at, [&](const int8_t* p) GK_LAMBDA_INLINE {
      int8_t padded[kBytes] = {};
      __builtin_memcpy(padded, p, until - at);
      return load_weight(padded);
    });
  GK_UNROLL for (int i = 0; i < kCount; ++i) {
    int32_t total = 0;
#if GENAI_KERNELS_ISA_LANES == 16
    total = _mm512_reduce_add_epi32((__m512i)sum[i]);
#else
    for (int l = 0; l < kLanes; ++l) total += sum[i][l];
#endif
    sums[i] = k == 0 ? total : sums[i] + total;
  }
}

template <class T>
void run_item(const W8a8Params& p, const MatmulItem& item, void* memory) {
  const int64_t rows = item.row_end - item.row_begin, stride = quant_stride(p.depth);
  const W8a8Scratch scratch(rows, p.depth, memory);
  for (int64_t i = 0; i < stride - 64; ++i) scratch.row[i] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    pack_rows<Fma<float>, T>(p.x, item.row_begin + r, item.row_begin + r + 1, item.row_end, 0, p.depth, scratch.row,
                             stride);
    scratch.scale[r] = quantize_row(scratch.row, p.depth, scratch.a + r * stride);
  }
  for (int64_t i = 0; i < kOnes * stride; ++i) scratch.a[rows * stride + i] = 1;
  const int64_t all = rows + kOnes;
  T* out = static_cast<T*>(p.out);
  const T* bias = static_cast<const T*>(p.bias.data);
  for (int64_t j = item.column_begin; j < item.column_end; j += kDotColumns) {
    const int64_t stop = min_of<int64_t>(item.column_end, j + kDotColumns);
    for (int64_t k = 0; k == 0 || k < p.depth; k += kPiece) {
      const int64_t until = min_of(p.depth, k + kPiece);
      const int8_t* b[kDotColumns];
      for (int i = 0; i < kDotColumns; ++i) {
        b[i] = p.weight + min_of(j + i, stop - 1) * p.depth;
        // the hardware goes on where a row begins, but not from one row to the next
        if (stop < item.column_end)
          for (int line = 0; line < 8; ++line)
            __builtin_prefetch(p.weight + min_of(j + i + kDotColumns, item.column_end - 1) * p.depth + k + line * 64);
      }
      int64_t r = 0;
      const auto run = [&](auto size) GK_LAMBDA_INLINE {
        constexpr int kRows = decltype(size)::value;
        for (; r + kRows <= all; r += kRows)
          multiply_tile<kRows>(scratch.a + r * stride, stride, b, k, until, scratch.sums + r * kDotColumns);
      };
      if constexpr (kDotRows == 4) run(IntTag<4>{});
      run(IntTag<2>{});
      run(IntTag<1>{});
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = j; i < stop; ++i) {
        int32_t sum = scratch.sums[r * kDotColumns + i - j];
        if (kOffset)
          sum = int32_t(uint32_t(sum) - uint32_t(kOffset) * uint32_t(scratch.sums[rows * kDotColumns + i - j]));
        float y = float(sum) * scratch.scale[r] * p.scale[i];
        if (bias) y = y + to_compute(bias[i * p.bias.outer]);
        out[(item.row_begin + r) * p.columns + i] = from_compute<T>(y);
      }
  }
}

}  // namespace

int64_t w8a8_scratch(const W8a8Params& p, int64_t rows) {
  return W8a8Scratch(rows, p.depth, nullptr).end - static_cast<char*>(nullptr);
}

void w8a8_kernel(const W8a8Params& p, const MatmulItem& item, void* scratch) {
  switch_dtype(p.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) < 8) run_item<T>(p, item, scratch);
  });
}

}  // namespace genai_kernels::GENAI_KERNELS_ISA_NAME

#else

GENAI_KERNELS_ISA_DISPATCH_TO(integer_isa(), int64_t, w8a8_scratch, (const W8a8Params& p, int64_t rows), (p, rows))
GENAI_KERNELS_ISA_DISPATCH_TO(integer_isa(), void, w8a8_kernel,
                              (const W8a8Params& p, const MatmulItem& item, void* scratch), (p, item, scratch))

#endif
