// The products of matrices of the linear layers, as the hosts hand them to their two kernels.
//
// dot_matmul.cpp has the contraction in the lanes: C = A B' for rows that lie along it, as the input and the weight of a
// linear layer do. matmul.cpp has the columns of C in the lanes, for the products of backward, where B does not lie along
// the contraction. Either way the bits of an element depend on its row of A and its column of C alone: not on the other
// rows, nor on how the work is cut into items and given to threads.
#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/gate.h"

namespace genai_kernels {

// Element (row, column) of a matrix is kept, and multiplied by `scale`, if word column % 64 / 16 of Philox(counter =
// (row, column / 64 * 16 + column % 16, row >> 32, kDropoutStream), key = seed) is at least `threshold`; else it is 0.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  double scale;
};
inline constexpr uint32_t kDropoutStream = 0x6c6f7261;

// A matrix [rows][columns] of few bits, in groups of 1 << group_bits columns of a row, at least 32 (or all: 62), the last
// one as long as is left of the row. int8: element = q * scale. int4: (q - zero) * scale. nf4: kNf4[q] * scale. Of 4 bits,
// byte i of every 16 bytes holds column i of 32 in its low half and column 16 + i in its high one; a row has whole 16
// bytes. Products are rounded to the type that is computed in; where that multiplies bf16 by bf16, to bf16.
enum class QuantizedKind : int32_t { int8, int4, nf4 };
struct QuantizedMatrix {
  QuantizedKind kind;
  const uint8_t* data;
  int64_t row_bytes;
  int group_bits;
  int64_t groups;             // in a row
  const float* scale;         // [rows][groups], or null:
  const uint8_t* scale_code;  // of which each 256, counted through all rows, are multiplied by an element of
  const float* code_scale;
  const uint8_t* zero;  // [rows][groups]: of int4
};
// The type, to templates, of the elements of such an operand.
struct QuantizedElement {};
inline constexpr int64_t kQuantizedStep = 16;  // columns that are unpacked at once
inline constexpr int64_t kScaleBlock = 256;    // scales of one code_scale

// A matrix that is read: element (i, k) at data[i * outer + k * depth], i being a row of A or a column of C and k running
// over the contraction. Where its tokens lie along it (A, with depth 1) or across it (B, with outer 1), `tokens` names
// those that are meant, if not all of them in their order; they are the rows of `dropout`.
//
// B may be quantized, for a product with float32, bf16, fp16 or float64: a row of `quantized` is a column of B with depth 1
// (C = A Q'), and an element of the contraction with outer 1 (C = A Q). `data` and `dtype` mean nothing then.
struct MatmulOperand {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t outer = 0, depth = 0;  // in elements
  const int64_t* tokens = nullptr;
  const Dropout* dropout = nullptr;
  const QuantizedMatrix* quantized = nullptr;
};

// A part of C.
struct MatmulItem {
  int64_t row_begin, row_end, column_begin, column_end;
};

// ---- the contraction in the lanes ----

// An element is summed in pieces of kDotDepth at fixed positions. In a piece 16 partial sums (8 of float64) take every
// sixteenth product each, and are added as a tree; the pieces are added in order.
inline constexpr int64_t kDotDepth = 1024;

// An adapter's second matrix, B [columns][rank], for columns [column_begin, column_end) of C.
struct AdapterB {
  const void* data;
  Dtype dtype;
  int64_t rank, outer, depth;
  int64_t column_begin, column_end;
};
// What an adapter adds to one row of C: S B', S having `rank` elements, and zeros up to a multiple of 16.
struct RowAdapter {
  const void* s;  // of the type that the product is computed in
  const AdapterB* b;
};

struct DotMatmulParams {
  MatmulOperand a, b;
  int64_t rows, columns, depth;
  // A gated layer has two matrices of `columns` rows in B, one after the other, and C is gate(part gate_part) * the other.
  int parts = 1;
  Gate gate = Gate::silu;
  int gate_part = 0;
  // the products with the adapters go on in the sums of the last piece; row r has adapters[begin[r]] up to begin[r + 1]
  const RowAdapter* adapters;
  const int64_t* adapters_begin;  // or null
  double scale;                   // of the sum
  MatmulOperand column_scale;     // of the sum, after that and before the bias: outer stride per column; or data null
  MatmulOperand bias;             // the same; both have parts * columns elements
  void* out;                      // [rows][out_row], of type out_dtype
  Dtype out_dtype;
  int64_t out_row;
  // What backward wants, [rows][parts * columns], or null: what goes into the gate, the gate's part first; or what
  // column_scale multiplies.
  void* inner = nullptr;
  Dtype inner_dtype = Dtype::f32;
};

int64_t dot_matmul_scratch(const DotMatmulParams& p, int64_t rows, int64_t columns);
void dot_matmul_kernel(const DotMatmulParams& p, const MatmulItem& item, void* scratch);

// ---- the columns in the lanes ----

// An element is summed in pieces of kMatmulDepth at fixed positions, each a pair of chains of multiply-adds, and the
// pieces of all terms are added in order.
inline constexpr int64_t kMatmulDepth = 128;
inline constexpr int64_t kMatmulColumns = 48;  // three registers of AVX-512, whole ones elsewhere: one panel of B

// C += A B. With `rows` only those rows of C have the term, ascending, and A has as many.
struct MatmulTerm {
  MatmulOperand a, b;
  int64_t depth;
  const int64_t* rows;  // or null: all of them
  int64_t row_count;
  const Dropout* dropout;  // of the elements of A B, by row and column of C; or null
};

struct MatmulParams {
  const MatmulTerm* terms;  // at least one; the first has all rows
  int64_t term_count;
  int64_t rows, columns;
  double scale;  // of the sum
  void* out;     // [rows][out_row], of type out_dtype
  Dtype out_dtype;
  int64_t out_row;
  bool accumulate = false;  // out += C, for a contraction that comes in pieces
};

// Columns of an item begin at multiples of kMatmulColumns.
int64_t matmul_scratch(const MatmulParams& p, int64_t rows, int64_t columns);
void matmul_kernel(const MatmulParams& p, const MatmulItem& item, void* scratch);

}  // namespace genai_kernels
