// Host of rotary_embedding: schema, checks, allocation, and the parallel loop over tokens.
#include "ops/rotary_embedding/rotary_embedding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/gpu.h"
#include "host/parallel.h"
#include "host/rows.h"
#include "host/scratch.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "rotary_embedding";

// t as one row (or, with row_dims = 0, one element) per token, broadcast over the dimensions of tokens that it lacks.
Rows per_token(const char* name, const TensorRef& t, int64_t row_dims, const TensorRef& x) {
  const auto sizes = t.sizes(), strides = t.strides(), tokens = x.sizes();
  const int64_t token_dims = int64_t(tokens.size()) - 2, dims = int64_t(sizes.size()) - row_dims;
  Rows rows;
  rows.data = t.data();
  if (row_dims) {
    rows.length = sizes[dims];
    rows.inner_stride = strides[dims];
  }
  bool fits = dims <= token_dims;
  for (int64_t d = 0; d < token_dims && fits; ++d) {
    const int64_t own = d - (token_dims - dims), size = own < 0 ? 1 : sizes[own];
    fits = (size == 1 || size == tokens[d]) && rows.append(tokens[d], size == 1 ? 0 : strides[own]);
  }
  GK_CHECK_VALUE(fits, kOp, name, ": expected dimensions that broadcast to the tokens of x, ", shape_of(x),
                 " without its last two, got shape ", shape_of(t));
  return rows;
}

template <class Int>
void check_range(const Rows& positions, int64_t table_rows) {
  const Int* data = static_cast<const Int*>(positions.data);
  for (int64_t i = 0; i < positions.count; ++i) {
    const int64_t at = data[positions.offset(i)];
    GK_CHECK_INDEX(at >= 0 && at < table_rows, kOp, "positions[", i, "]: expected 0 <= position < ", table_rows,
                   ", got ", at);
  }
}

RotaryParams checked_params(const TensorRef& x, const TensorRef& cos, const TensorRef& sin,
                            const OptionalTensor& positions, bool interleaved, bool inverse) {
  RotaryParams p{};
  GK_CHECK_VALUE(x.dim() >= 3, kOp, "x: expected [..., tokens, heads, head_dim], got shape ", shape_of(x));
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t dim = int64_t(sizes.size());
  p.dtype = float_dtype(kOp, "x", x);
  p.table_dtype = float_dtype(kOp, "cos", cos);
  check_same_dtype(kOp, "sin", sin, "cos", cos);
  check_same_shape(kOp, "sin", sin, "cos", cos);
  GK_CHECK_VALUE(cos.dim() >= 1, kOp, "cos: expected at least one dimension, got a scalar");
  p.interleaved = interleaved;
  p.inverse = inverse;
  p.heads = sizes[dim - 2];
  p.head_dim = sizes[dim - 1];
  p.rotary_dim = 2 * cos.size(cos.dim() - 1);
  GK_CHECK_VALUE(p.rotary_dim <= p.head_dim, kOp, "cos: expected at most half of head_dim, ", p.head_dim,
                 ", in the last dimension, got shape ", shape_of(cos));
  p.x = rows_of(kOp, "x", x, x.data(), 2);
  p.x_head_stride = strides[dim - 2];
  if (!positions) {
    p.cos = per_token("cos", cos, 1, x);
    p.sin = per_token("sin", sin, 1, x);
    return p;
  }
  GK_CHECK_VALUE(cos.dim() == 2, kOp, "cos: expected a table [positions, rotary_dim / 2], got shape ", shape_of(cos));
  const ScalarType type = positions->scalar_type();
  GK_CHECK_TYPE(type == ScalarType::Int || type == ScalarType::Long, kOp, "positions: expected int32 or int64, got ",
                dtype_name(type));
  p.cos = read_rows(kOp, "cos", cos);
  p.sin = read_rows(kOp, "sin", sin);
  p.positions = per_token("positions", *positions, 0, x);
  p.long_positions = type == ScalarType::Long;
  if (on_gpu(x)) return p;  // whose memory is not read here: a position outside of the table gives NaN
  p.long_positions ? check_range<int64_t>(p.positions, p.cos.count) : check_range<int32_t>(p.positions, p.cos.count);
  return p;
}

void run(RotaryParams& p, const TensorRef& y) {
  check_writable(kOp, "out", y);
  p.y = rows_of(kOp, "out", y, y.data(), 2);
  p.y_head_stride = y.stride(y.dim() - 2);
  if (p.x.count == 0 || p.heads == 0 || p.head_dim == 0) return;
  if (on_gpu(y)) check_gpu_dtype(kOp, "x", p.dtype);
  if (on_gpu(y)) return run_on_gpu(kOp, y, [&](cudaStream_t stream) { return launch_rotary_fwd(p, stream); });
  parallel_for_elements(p.x.count, p.heads * p.head_dim, [&](int64_t begin, int64_t end) {
    const Scratch scratch((2 * p.rotary_dim + p.head_dim) * compute_bytes(p.dtype));
    rotary_fwd_kernel(p, begin, end, scratch.get());
  });
}

Tensor rotary_embedding(const TensorRef& x, const TensorRef& cos, const TensorRef& sin, const OptionalTensor& positions,
                        bool interleaved, bool inverse) {
  RotaryParams p = checked_params(x, cos, sin, positions, interleaved, inverse);
  Tensor y = new_like(x);
  run(p, y);
  return y;
}

void rotary_embedding_out(const TensorRef& x, const TensorRef& cos, const TensorRef& sin,
                          const OptionalTensor& positions, bool interleaved, bool inverse, const Output& out) {
  RotaryParams p = checked_params(x, cos, sin, positions, interleaved, inverse);
  check_output(kOp, "out", out, "x", x);
  check_no_overlap(kOp, "out", out, "cos", cos);
  check_no_overlap(kOp, "out", out, "sin", sin);
  run(p, out);
}

}  // namespace
}  // namespace genai_kernels

GK_OP(rotary_embedding, genai_kernels::rotary_embedding,
      "(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> Tensor")
GK_OP(rotary_embedding_out, genai_kernels::rotary_embedding_out,
      "(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse, Tensor(a!) out) -> ()")
