// Host of merge_attention_states: schema, checks, allocation, and the parallel loop over rows.
#include "ops/merge_attention_states/merge_attention_states.h"

#include <tuple>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/gpu.h"
#include "host/parallel.h"
#include "host/rows.h"
#include "host/scratch.h"

namespace genai_kernels {
namespace {

constexpr const char* kOp = "merge_attention_states";
// A thread gets at least this many elements: about 5 us of work, what it costs to wake it.
constexpr int64_t kGrain = 16384;

ScalarType lse_type(Dtype dtype) { return dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float; }

PerRow per_row(const TensorRef& t, void* data) {
  const int64_t dim = t.dim();
  return {data, dim == 3 ? t.stride(0) : 0, t.stride(dim - 2), t.stride(dim - 1)};
}
PerRow read_per_row(const TensorRef& t) { return per_row(t, t.data()); }
PerRow write_per_row(const TensorRef& t) { return per_row(t, t.data()); }

// A tensor that holds one number for each row of o: o's shape without its last dimension, heads before tokens.
void check_per_row(const char* name, const TensorRef& t, const TensorRef& o, Dtype dtype) {
  GK_CHECK_TYPE(t.scalar_type() == lse_type(dtype), kOp, name, ": expected ", dtype_name(lse_type(dtype)),
                " where o is ", dtype_name(o.scalar_type()), ", got ", dtype_name(t.scalar_type()));
  const bool packed = o.dim() == 3;
  const int64_t tokens = o.size(o.dim() - 3), heads = o.size(o.dim() - 2);
  const bool fits = packed ? t.dim() == 2 && t.size(0) == heads && t.size(1) == tokens
                           : t.dim() == 3 && t.size(0) == o.size(0) && t.size(1) == heads && t.size(2) == tokens;
  if (packed)
    GK_CHECK_VALUE(fits, kOp, name, ": expected shape [heads, tokens] = [", heads, ", ", tokens, "], got ",
                   shape_of(t));
  GK_CHECK_VALUE(fits, kOp, name, ": expected shape [batch, heads, tokens] = [", o.size(0), ", ", heads, ", ", tokens,
                 "], got ", shape_of(t));
}

MergeAttentionStatesParams checked_params(const TensorRef& o_a, const TensorRef& lse_a, const TensorRef& o_b,
                                          const TensorRef& lse_b) {
  MergeAttentionStatesParams p{};
  GK_CHECK_VALUE(o_a.dim() == 3 || o_a.dim() == 4, kOp,
                 "o_a: expected [batch, tokens, heads, dim] or [tokens, heads, dim], got shape ", shape_of(o_a));
  p.dtype = float_dtype(kOp, "o_a", o_a);
  check_same_dtype(kOp, "o_b", o_b, "o_a", o_a);
  check_same_shape(kOp, "o_b", o_b, "o_a", o_a);
  check_per_row("lse_a", lse_a, o_a, p.dtype);
  check_per_row("lse_b", lse_b, o_a, p.dtype);
  if (on_gpu(o_a)) check_gpu_dtype(kOp, "o_a", p.dtype);
  p.tokens = o_a.size(o_a.dim() - 3);
  p.heads = o_a.size(o_a.dim() - 2);
  p.o_a = read_rows(kOp, "o_a", o_a);
  p.o_b = read_rows(kOp, "o_b", o_b);
  p.lse_a = read_per_row(lse_a);
  p.lse_b = read_per_row(lse_b);
  return p;
}

// f(begin, end, scratch) over all rows. A row of no elements still has its lse.
template <class F>
void for_rows(const MergeAttentionStatesParams& p, int64_t rows_of_scratch, const F& f) {
  parallel_for(p.o_a.count, 1 + kGrain / (p.o_a.length + 16), [&](int64_t begin, int64_t end) {
    const Scratch scratch(p.o_a.length * 8 * rows_of_scratch);
    f(p, begin, end, scratch.get());
  });
}

std::tuple<Tensor, Tensor> merge_attention_states(const TensorRef& o_a, const TensorRef& lse_a, const TensorRef& o_b,
                                                  const TensorRef& lse_b) {
  MergeAttentionStatesParams p = checked_params(o_a, lse_a, o_b, lse_b);
  Tensor o = new_like(o_a), lse = new_like(lse_a);
  p.o = write_rows(kOp, "o", o);
  p.lse = write_per_row(lse);
  const bool strided = p.o_a.inner_stride != 1 || p.o_b.inner_stride != 1;
  if (on_gpu(o_a))
    run_on_gpu(kOp, o_a, [&](cudaStream_t stream) { return launch_merge_attention_states_fwd(p, stream); });
  else
    for_rows(p, strided ? 2 : 0, merge_attention_states_fwd_kernel);
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_attention_states_bwd(const TensorRef& d_o, const OptionalTensor& dlse,
                                                                      const TensorRef& o_a, const TensorRef& lse_a,
                                                                      const TensorRef& o_b, const TensorRef& lse_b) {
  MergeAttentionStatesParams p = checked_params(o_a, lse_a, o_b, lse_b);
  check_same_dtype(kOp, "d_o", d_o, "o_a", o_a);
  check_same_shape(kOp, "d_o", d_o, "o_a", o_a);
  if (dlse) {
    check_per_row("dlse", *dlse, o_a, p.dtype);
    p.dlse = read_per_row(*dlse);
  }
  Tensor d_o_a = new_like(o_a), d_o_b = new_like(o_b), dlse_a = new_like(lse_a), dlse_b = new_like(lse_b);
  p.d_o = read_rows(kOp, "d_o", d_o);
  p.d_o_a = write_rows(kOp, "d_o_a", d_o_a);
  p.d_o_b = write_rows(kOp, "d_o_b", d_o_b);
  p.dlse_a = write_per_row(dlse_a);
  p.dlse_b = write_per_row(dlse_b);
  const bool strided = p.o_a.inner_stride != 1 || p.o_b.inner_stride != 1 || p.d_o.inner_stride != 1;
  if (on_gpu(o_a))
    run_on_gpu(kOp, o_a, [&](cudaStream_t stream) { return launch_merge_attention_states_bwd(p, stream); });
  else
    for_rows(p, strided ? 5 : 0, merge_attention_states_bwd_kernel);
  return {d_o_a, dlse_a, d_o_b, dlse_b};
}

}  // namespace
}  // namespace genai_kernels

GK_OP(merge_attention_states, genai_kernels::merge_attention_states,
      "(Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b) -> (Tensor o, Tensor lse)")
GK_OP(merge_attention_states_bwd, genai_kernels::merge_attention_states_bwd,
      "(Tensor d_o, Tensor? dlse, Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b) -> (Tensor d_o_a, Tensor dlse_a, "
      "Tensor d_o_b, Tensor dlse_b)")
