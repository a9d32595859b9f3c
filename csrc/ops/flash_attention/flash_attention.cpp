// Host of flash_attention: schema, checks, allocation, and how the work is handed to the threads.
#include "ops/flash_attention/flash_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "host/alloc.h"
#include "host/check.h"
#include "host/direct_call.h"
#include "host/parallel.h"
#include "host/scratch.h"
#include "host/sum_blocks.h"
#include "ops/flash_attention/gpu_call.h"

namespace genai_kernels {
namespace {

ScalarType compute_type(Dtype dtype) { return dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float; }

// The tensors and numbers of a call, as the schema orders them.
struct Arguments {
  const TensorRef &q, &k, &v;
  const OptionalTensor &cu_q, &cu_k, &slopes, &bias, &mask, &sink, &rng_state;
  int64_t left, right;
  std::optional<double> scale;
  double softcap, dropout_p;

  bool packed() const { return cu_q.has_value(); }
  const char* op() const { return packed() ? "flash_attention_varlen" : "flash_attention"; }
};

HeadsView heads_view(const TensorRef& t, Dtype dtype, bool packed) {
  HeadsView view;
  view.data = static_cast<char*>(t.data());
  view.dtype = dtype;
  // the stride of a dimension of one element means nothing, and must not hide that the rest is aligned
  const auto stride = [&](int64_t d, int64_t of_one) { return t.size(d) == 1 ? of_one : t.stride(d); };
  const int64_t token = packed ? 0 : 1;
  if (!packed) view.batch = stride(0, 0);
  view.token = stride(token, 0);
  view.head = stride(token + 1, 0);
  view.dim = stride(token + 2, 1);
  return view;
}

void check_dims(const char* op, const TensorRef& t, const char* name, bool packed) {
  GK_CHECK_VALUE(t.dim() == (packed ? 3 : 4), op, name, ": expected ",
                 packed ? "[tokens, heads, dim]" : "[batch, tokens, heads, dim]", ", got shape ", shape_of(t));
}

const int32_t* check_cumulative(const char* op, const TensorRef& cu, const char* name, int64_t tokens) {
  GK_CHECK_TYPE(cu.scalar_type() == ScalarType::Int, op, name, ": expected int32, got ", dtype_name(cu.scalar_type()));
  GK_CHECK_VALUE(cu.dim() == 1 && cu.size(0) >= 1 && cu.is_contiguous(), op, name,
                 ": expected a contiguous [batch + 1], got shape ", shape_of(cu));
  const int32_t* at = cu.data_as<int32_t>();
  if (on_gpu(cu)) return at;  // what it holds is read by the kernels alone
  GK_CHECK_VALUE(at[0] == 0, op, name, "[0]: expected 0, got ", at[0]);
  for (int64_t i = 1; i < cu.size(0); ++i)
    GK_CHECK_VALUE(at[i] >= at[i - 1], op, name, "[", i, "]: expected at least ", at[i - 1], ", got ", at[i]);
  GK_CHECK_VALUE(at[cu.size(0) - 1] <= tokens, op, name, "[", cu.size(0) - 1, "]: expected at most ", tokens,
                 ", the number of tokens, got ", at[cu.size(0) - 1]);
  return at;
}

int64_t longest(const int32_t* cu, int64_t batch) {
  int64_t most = 0;
  for (int64_t b = 0; b < batch; ++b) most = std::max<int64_t>(most, cu[b + 1] - cu[b]);
  return most;
}

// Strides of a tensor that broadcasts to [batch, heads, queries, keys]. Of packed sequences on a GPU, p.queries and p.keys
// are upper bounds of the longest.
ScoresView scores_view(const char* op, const TensorRef& t, const char* name, const FlashAttentionParams& p) {
  const int64_t sizes[4] = {p.batch, p.heads, p.queries, p.keys};
  int64_t strides[4] = {0, 0, 0, 0};
  const int64_t dim = t.dim();
  bool fits = dim <= 4;
  for (int64_t i = 0; fits && i < dim; ++i) {
    const int64_t target = 4 - dim + i;
    const bool bounded = p.cu_q && on_gpu(t) && target >= 2;
    fits = t.size(i) == 1 || t.size(i) == sizes[target] || (bounded && t.size(i) < sizes[target]);
    if (t.size(i) > 1) strides[target] = t.stride(i);
  }
  GK_CHECK_VALUE(fits, op, name, ": expected a shape that broadcasts to [", sizes[0], ", ", sizes[1], ", ", sizes[2],
                 ", ", sizes[3], "], got ", shape_of(t));
  ScoresView view;
  view.data = static_cast<char*>(t.data());
  view.batch = strides[0];
  view.head = strides[1];
  view.query = strides[2];
  view.key = strides[3];
  return view;
}

FlashAttentionParams checked_params(const Arguments& a) {
  FlashAttentionParams p{};
  const bool packed = a.packed();
  const char* op = a.op();
  GK_CHECK_VALUE(packed == a.cu_k.has_value(), op, "cu_seqlens_k: expected it together with cu_seqlens_q");
  check_dims(op, a.q, "q", packed);
  check_dims(op, a.k, "k", packed);
  check_dims(op, a.v, "v", packed);
  p.dtype = float_dtype(op, "q", a.q);
  const bool gpu = on_gpu(a.q);
  GK_CHECK_IMPLEMENTED(!gpu || p.dtype != Dtype::f64, op,
                       "float64: expected float32, bfloat16 or float16 on CUDA, got float64; the CPU serves it");
  check_same_dtype(op, "k", a.k, "q", a.q);
  check_same_dtype(op, "v", a.v, "q", a.q);
  const int token = packed ? 0 : 1, head = token + 1, dim = token + 2;
  p.heads = a.q.size(head);
  p.kv_heads = a.k.size(head);
  p.head_dim = a.q.size(dim);
  p.value_dim = a.v.size(dim);
  GK_CHECK_VALUE(a.k.size(dim) == p.head_dim, op, "k: expected head_dim ", p.head_dim, " as q, got ", a.k.size(dim));
  GK_CHECK_VALUE(a.v.size(token) == a.k.size(token), op, "v: expected ", a.k.size(token),
                 " tokens, the same sequence length as k, got ", a.v.size(token));
  GK_CHECK_VALUE(a.v.size(head) == p.kv_heads, op, "v: expected ", p.kv_heads, " heads as k, got ", a.v.size(head));
  GK_CHECK_VALUE(p.kv_heads > 0 ? p.heads % p.kv_heads == 0 : p.heads == 0, op,
                 "k: expected a number of heads that divides ", p.heads, ", the heads of q, got ", p.kv_heads);
  GK_CHECK_VALUE(p.head_dim > 0, op, "q: expected head_dim >= 1, got 0");
  p.group = p.kv_heads ? p.heads / p.kv_heads : 1;
  if (packed) {
    p.cu_q = check_cumulative(op, *a.cu_q, "cu_seqlens_q", a.q.size(0));
    p.cu_k = check_cumulative(op, *a.cu_k, "cu_seqlens_k", a.k.size(0));
    p.batch = a.cu_q->size(0) - 1;
    GK_CHECK_VALUE(a.cu_k->size(0) - 1 == p.batch, op, "cu_seqlens_k: expected ", p.batch + 1,
                   " elements as cu_seqlens_q, got ", a.cu_k->size(0));
    p.queries = gpu ? a.q.size(0) : longest(p.cu_q, p.batch);
    p.keys = gpu ? a.k.size(0) : longest(p.cu_k, p.batch);
  } else {
    p.batch = a.q.size(0);
    p.queries = a.q.size(1);
    p.keys = a.k.size(1);
    GK_CHECK_VALUE(a.k.size(0) == p.batch, op, "k: expected batch ", p.batch, " as q, got ", a.k.size(0));
    GK_CHECK_VALUE(a.v.size(0) == p.batch, op, "v: expected batch ", p.batch, " as q, got ", a.v.size(0));
  }
  p.total_queries = a.q.size(token);
  p.total_keys = a.k.size(token);
  p.q = heads_view(a.q, p.dtype, packed);
  p.k = heads_view(a.k, p.dtype, packed);
  p.v = heads_view(a.v, p.dtype, packed);
  p.lse_batch = packed ? 0 : p.heads * p.queries;
  p.lse_head = packed ? a.q.size(0) : p.queries;

  GK_CHECK_VALUE(a.left >= -1 && a.right >= -1, op, "window_size: expected each >= -1 (-1: no limit), got (", a.left,
                 ", ", a.right, ")");
  GK_CHECK_VALUE(a.softcap >= 0, op, "softcap: expected >= 0 (0: none), got ", a.softcap);
  GK_CHECK_VALUE(a.dropout_p >= 0 && a.dropout_p < 1, op, "dropout_p: expected 0 <= p < 1, got ", a.dropout_p);
  p.left = a.left;
  p.right = a.right;
  p.scale = a.scale ? *a.scale : std::pow(double(p.head_dim), -0.5);
  p.softcap = a.softcap;
  p.dropout_p = a.dropout_p;
  if (a.dropout_p > 0) {
    GK_CHECK_VALUE(a.rng_state && a.rng_state->dim() == 1 && a.rng_state->size(0) == 2 &&
                       a.rng_state->scalar_type() == ScalarType::Long && a.rng_state->is_contiguous(),
                   op, "rng_state: expected int64 [2], seed and offset, where dropout_p > 0");
    const int64_t* state = a.rng_state->data_as<int64_t>();
    GK_CHECK_VALUE(state[1] >= 0 && state[1] < (int64_t(1) << 32), op, "offset: expected 0 <= offset < 2^32, got ",
                   state[1]);
    p.seed = uint64_t(state[0]);
    p.offset = uint32_t(state[1]);
  }
  if (a.slopes) {
    GK_CHECK_TYPE(a.slopes->scalar_type() == compute_type(p.dtype), op, "alibi_slopes: expected ",
                  dtype_name(compute_type(p.dtype)), ", got ", dtype_name(a.slopes->scalar_type()));
    const bool per_batch = a.slopes->dim() == 2 && a.slopes->size(0) == p.batch && a.slopes->size(1) == p.heads;
    GK_CHECK_VALUE((per_batch || (a.slopes->dim() == 1 && a.slopes->size(0) == p.heads)) && a.slopes->is_contiguous(),
                   op, "alibi_slopes: expected a contiguous [", p.heads, "] or [", p.batch, ", ", p.heads, "], got ",
                   shape_of(*a.slopes));
    p.slopes = static_cast<const char*>(a.slopes->data());
    p.slopes_batch = per_batch ? p.heads : 0;
  }
  if (a.bias) {
    const Dtype dtype = float_dtype(op, "attn_bias", *a.bias);
    GK_CHECK_TYPE(dtype == p.dtype || dtype == Dtype::f32, op, "attn_bias: expected the dtype of q or float32, got ",
                  dtype_name(a.bias->scalar_type()));
    p.bias = scores_view(op, *a.bias, "attn_bias", p);
    p.bias.dtype = dtype;
  }
  if (a.mask) {
    GK_CHECK_TYPE(a.mask->scalar_type() == ScalarType::Bool, op, "attn_mask: expected bool, got ",
                  dtype_name(a.mask->scalar_type()), "; an additive mask goes into attn_bias");
    p.mask = scores_view(op, *a.mask, "attn_mask", p);
  }
  if (a.sink) {
    GK_CHECK_TYPE(a.sink->scalar_type() == compute_type(p.dtype), op, "sink: expected ",
                  dtype_name(compute_type(p.dtype)), ", got ", dtype_name(a.sink->scalar_type()));
    GK_CHECK_VALUE(a.sink->dim() == 1 && a.sink->size(0) == p.heads && a.sink->is_contiguous(), op,
                   "sink: expected a contiguous [", p.heads, "], got ", shape_of(*a.sink));
    p.sink = static_cast<const char*>(a.sink->data());
  }
  if (gpu) prepare_for_gpu(op, p);
  return p;
}

// Rows that no sequence owns: output 0, lse -inf.
void fill_unowned_rows(const FlashAttentionParams& p, Tensor& out, Tensor* lse) {
  const int64_t owned = p.cu_q[p.batch], tokens = out.size(0);
  if (owned == tokens) return;
  Tensor rest = torch::stable::narrow(out, 0, owned, tokens - owned);
  torch::stable::zero_(rest);
  if (!lse) return;
  Tensor rest_lse = torch::stable::narrow(*lse, 1, owned, tokens - owned);
  torch::stable::fill_(rest_lse, -INFINITY);
}

// Which results are wanted beside the output. What is not wanted is not allocated.
enum class Wanted { output, lse, softmax_state };

struct Forward {
  Tensor out;
  std::optional<Tensor> lse, softmax_state;
};

Forward forward(const Arguments& a, Wanted wanted) {
  FlashAttentionParams p = checked_params(a);
  const bool packed = a.packed();
  const int64_t tokens = a.q.size(packed ? 0 : 1);
  const ScalarType compute = compute_type(p.dtype);
  // The first of four sizes is left out where the sequences are packed.
  const auto allocate = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
    return new_empty(a.q, sizes.begin() + packed, int64_t(sizes.size()) - packed, type);
  };
  Forward result{allocate({p.batch, tokens, p.heads, p.value_dim}, a.q.scalar_type()), {}, {}};
  p.out = heads_view(result.out, p.dtype, packed);
  if (wanted != Wanted::output) {
    result.lse = allocate({p.batch, p.heads, tokens}, compute);
    p.lse = static_cast<char*>(result.lse->mutable_data_ptr());
  }
  if (wanted == Wanted::softmax_state) {
    result.softmax_state = allocate({p.batch, p.heads, tokens, 2}, compute);
    p.softmax_state = static_cast<char*>(result.softmax_state->mutable_data_ptr());
  }
  if (on_gpu(a.q)) {
    flash_attention_fwd_on_gpu(a.op(), p, a.q);
    return result;
  }
  if (packed) fill_unowned_rows(p, result.out, result.lse ? &*result.lse : nullptr);

  const int64_t rows = p.queries * p.group;
  if (rows == 0 || p.batch * p.kv_heads == 0) return result;
  // A block of rows packs its keys once; blocks are as long as leaves four for each thread. The bits do not depend on
  // it: every row goes through the same sums wherever it lies.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t fair = rows * p.batch * p.kv_heads / (4 * threads);
  p.block_rows = std::clamp<int64_t>(fair / kRowsMultiple * kRowsMultiple, kRowsMultiple, 16 * kRowsMultiple);
  const int64_t blocks = (rows + p.block_rows - 1) / p.block_rows, pairs = p.batch * p.kv_heads;
  const int64_t scratch_bytes = flash_attention_fwd_scratch(p);
  parallel_for_dynamic(
      blocks * pairs, [&] { return Scratch(scratch_bytes); },
      [&](int64_t item, Scratch& scratch) {
        const int64_t block = blocks - 1 - item / pairs, pair = item % pairs;  // a causal call's longest rows first
        flash_attention_fwd_kernel(p, pair / p.kv_heads, pair % p.kv_heads, block * p.block_rows, scratch.get());
      });
  return result;
}

#define GK_OPTION_PARAMETERS                                                                                        \
  const OptionalTensor &cu_q, const OptionalTensor &cu_k, const OptionalTensor &slopes, const OptionalTensor &bias, \
      const OptionalTensor &mask, const OptionalTensor &sink, const OptionalTensor &rng_state, int64_t left,        \
      int64_t right, std::optional<double> scale, double softcap, double dropout_p
#define GK_ARGUMENTS \
  Arguments { q, k, v, cu_q, cu_k, slopes, bias, mask, sink, rng_state, left, right, scale, softcap, dropout_p }

std::tuple<Tensor, Tensor, Tensor> flash_attention(const TensorRef& q, const TensorRef& k, const TensorRef& v,
                                                   GK_OPTION_PARAMETERS) {
  Forward result = forward(GK_ARGUMENTS, Wanted::softmax_state);
  return {result.out, *result.lse, *result.softmax_state};
}

// Without what only backward needs.
Tensor flash_attention_output(const TensorRef& q, const TensorRef& k, const TensorRef& v, GK_OPTION_PARAMETERS) {
  return forward(GK_ARGUMENTS, Wanted::output).out;
}
std::tuple<Tensor, Tensor> flash_attention_lse(const TensorRef& q, const TensorRef& k, const TensorRef& v,
                                               GK_OPTION_PARAMETERS) {
  Forward result = forward(GK_ARGUMENTS, Wanted::lse);
  return {result.out, *result.lse};
}

// The gradient of the bias, in a pass of its own that recomputes the scores. Its items own disjoint parts of it: the
// batches, heads and rows that share an element are summed by one item, in order.
Tensor bias_gradient(const char* op, FlashAttentionParams& p, const TensorRef& bias) {
  const bool broadcast = bias.numel() < p.batch * p.heads * p.queries * p.keys;
  const ScalarType type = broadcast ? ScalarType::Double : compute_type(p.dtype);
  Tensor sums = new_empty(bias, bias.sizes().data(), bias.dim(), type);
  torch::stable::zero_(sums);
  if (sums.numel() == 0) return sums;
  p.dbias = scores_view(op, sums, "attn_bias", p);
  p.dbias.dtype = type == ScalarType::Double ? Dtype::f64 : Dtype::f32;
  if (on_gpu(bias)) {
    flash_attention_dbias_on_gpu(op, p, bias);
    return torch::stable::to(sums, bias.scalar_type());
  }
  const int64_t rows = p.queries * p.group;
  const int64_t batches = p.dbias.batch ? p.batch : 1, heads = p.dbias.head ? p.kv_heads : 1;
  const int64_t step = std::max<int64_t>(1, kBackwardRows / p.group) * p.group;  // a query's rows stay together
  const int64_t blocks = p.dbias.query ? (rows + step - 1) / step : 1;
  const int64_t bytes = flash_attention_bwd_scratch(p, Gradients::queries);
  parallel_for_dynamic(
      batches * heads * blocks, [&] { return Scratch(bytes); },
      [&](int64_t item, Scratch& scratch) {
        const int64_t b = item / (heads * blocks), h = item / blocks % heads, block = item % blocks;
        const Range range{b,
                          batches > 1 ? b + 1 : p.batch,
                          h,
                          heads > 1 ? h + 1 : p.kv_heads,
                          block * step,
                          std::min(rows, blocks > 1 ? (block + 1) * step : rows)};
        flash_attention_dbias_kernel(p, range, scratch.get());
      });
  return torch::stable::to(sums, bias.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> flash_attention_bwd(const TensorRef& dout,
                                                                       const OptionalTensor& dlse, const TensorRef& q,
                                                                       const TensorRef& k, const TensorRef& v,
                                                                       const TensorRef& out, const TensorRef& lse,
                                                                       const OptionalTensor& softmax_state,
                                                                       GK_OPTION_PARAMETERS, bool bias_grad) {
  const Arguments a = GK_ARGUMENTS;
  FlashAttentionParams p = checked_params(a);
  const bool packed = a.packed();
  const char* op = a.op();
  const auto check_result = [&](const char* name, const TensorRef& t, ScalarType type, std::vector<int64_t> shape) {
    GK_CHECK_TYPE(t.scalar_type() == type, op, name, ": expected ", dtype_name(type), ", got ",
                  dtype_name(t.scalar_type()));
    const auto sizes = t.sizes();
    GK_CHECK_VALUE(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), op, name,
                   ": expected the shape that forward returned, got ", shape_of(t));
  };
  const ScalarType compute = compute_type(p.dtype);
  const std::vector<int64_t> out_shape = packed ? std::vector<int64_t>{q.size(0), p.heads, p.value_dim}
                                                : std::vector<int64_t>{p.batch, p.queries, p.heads, p.value_dim};
  const std::vector<int64_t> lse_shape =
      packed ? std::vector<int64_t>{p.heads, q.size(0)} : std::vector<int64_t>{p.batch, p.heads, p.queries};
  check_result("out", out, q.scalar_type(), out_shape);
  check_result("dout", dout, q.scalar_type(), out_shape);
  check_result("lse", lse, compute, lse_shape);
  GK_CHECK_VALUE(lse.is_contiguous(), op, "lse: expected a contiguous tensor");
  if (dlse) check_result("dlse", *dlse, compute, lse_shape);
  if (softmax_state) {
    std::vector<int64_t> shape = lse_shape;
    shape.push_back(2);
    check_result("softmax_state", *softmax_state, compute, shape);
    GK_CHECK_VALUE(softmax_state->is_contiguous(), op, "softmax_state: expected a contiguous tensor");
    p.softmax_state = static_cast<char*>(softmax_state->data());
  }
  Tensor dq = new_like(q), dk = new_like(k), dv = new_like(v);
  p.out = heads_view(out, p.dtype, packed);
  p.dout = heads_view(dout, p.dtype, packed);
  p.dq = heads_view(dq, p.dtype, packed);
  p.dk = heads_view(dk, p.dtype, packed);
  p.dv = heads_view(dv, p.dtype, packed);
  p.lse = static_cast<char*>(lse.data());
  if (dlse) {
    p.dlse = static_cast<const char*>(dlse->data());
    p.dlse_batch = packed ? 0 : dlse->stride(0);
    p.dlse_head = dlse->stride(packed ? 0 : 1);
    p.dlse_token = dlse->stride(packed ? 1 : 2);
  }
  const bool gpu = on_gpu(q);
  if (packed && !gpu) {
    fill_unowned_rows(p, dq, nullptr);
    const int64_t owned = p.cu_k[p.batch], tokens = k.size(0);
    for (Tensor* t : {&dk, &dv}) {
      Tensor rest = torch::stable::narrow(*t, 0, owned, tokens - owned);
      torch::stable::zero_(rest);
    }
  }
  Tensor delta = new_like(lse), dsink = new_empty(q, {sink ? p.heads : 0}, compute_type(p.dtype)), dsink_partial;
  p.delta = static_cast<char*>(delta.mutable_data_ptr());
  if (sink) {
    dsink_partial = new_empty(q, {p.batch, p.heads}, compute_type(p.dtype));
    p.dsink = static_cast<char*>(dsink_partial.mutable_data_ptr());
  }
  if (gpu) {
    flash_attention_bwd_on_gpu(op, p, q);
    if (sink) sum_blocks(Dtype::f32, dsink_partial, dsink);
    Tensor dbias = bias_grad ? bias_gradient(op, p, *bias) : new_empty(q, {0}, q.scalar_type());
    return {dq, dk, dv, dbias, dsink};
  }
  parallel_for(p.batch * p.heads, 1 + 16384 / (p.queries * p.value_dim + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) flash_attention_delta_kernel(p, i / p.heads, i % p.heads);
  });
  if (sink) sum_blocks(p.dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32, dsink_partial, dsink);

  const int64_t pairs = p.batch * p.kv_heads, rows = p.queries * p.group;
  const bool by_part = pairs < int64_t(torch::stable::get_num_threads());
  const auto run = [&](Gradients which, int64_t size, int64_t step) {
    const int64_t parts = which == Gradients::all ? 1 : std::max<int64_t>(1, (size + step - 1) / step);
    const int64_t bytes = flash_attention_bwd_scratch(p, which);
    parallel_for_dynamic(
        parts * pairs, [&] { return Scratch(bytes); },
        [&](int64_t item, Scratch& scratch) {
          const int64_t pair = item % pairs;
          flash_attention_bwd_kernel(p, which, pair / p.kv_heads, pair % p.kv_heads, item / pairs * step,
                                     scratch.get());
        });
  };
  if (by_part) {
    run(Gradients::keys_and_values, p.keys, kBackwardKeys);
    run(Gradients::queries, rows, kBackwardRows);
  } else {
    run(Gradients::all, 0, 0);
  }

  Tensor dbias = bias_grad ? bias_gradient(a.op(), p, *bias) : new_empty(q, {0}, q.scalar_type());
  return {dq, dk, dv, dbias, dsink};
}

// Which CUDA kernels a call takes on a card of this capability (10 * major + minor), for `explain`.
std::string flash_attention_cuda_path(const TensorRef& q, const TensorRef& k, const TensorRef& v, GK_OPTION_PARAMETERS,
                                      int64_t capability) {
  const Arguments a = GK_ARGUMENTS;
  FlashAttentionParams p = checked_params(a);
  char* some = static_cast<char*>(q.data());  // what forward will return, and what comes back for it: contiguous
  p.softmax_state = some;
  const int64_t token = p.heads * p.value_dim;
  p.dout = {some, p.dtype, a.packed() ? 0 : p.queries * token, token, p.value_dim, 1};
  const auto name = [&](bool backward) {
    return std::string(kAttentionKernelNames[int(flash_attention_gpu_kernel(p, int(capability), backward))]);
  };
  return "forward " + name(false) + ", backward " + name(true);
}

}  // namespace
}  // namespace genai_kernels

#define GK_ATTENTION_OPTIONS                                                                                  \
  "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? attn_bias, Tensor? attn_mask, "  \
  "Tensor? sink, Tensor? rng_state, int window_left, int window_right, float? softmax_scale, float softcap, " \
  "float dropout_p"

GK_OP(flash_attention, genai_kernels::flash_attention,
      "(Tensor q, Tensor k, Tensor v, " GK_ATTENTION_OPTIONS ") -> (Tensor out, Tensor lse, Tensor softmax_state)")
GK_OP(flash_attention_bwd, genai_kernels::flash_attention_bwd,
      "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? "
      "softmax_state, " GK_ATTENTION_OPTIONS
      ", bool bias_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)")
GK_DIRECT(flash_attention_output, genai_kernels::flash_attention_output)
GK_DIRECT(flash_attention_lse, genai_kernels::flash_attention_lse)

STABLE_TORCH_LIBRARY_FRAGMENT(genai_kernels, m) {
  m.def("flash_attention_cuda_path(Tensor q, Tensor k, Tensor v, " GK_ATTENTION_OPTIONS ", int capability) -> str");
}
STABLE_TORCH_LIBRARY_IMPL(genai_kernels, CompositeExplicitAutograd, m) {
  m.impl("flash_attention_cuda_path", GK_DISPATCHED(genai_kernels::flash_attention_cuda_path));
}
