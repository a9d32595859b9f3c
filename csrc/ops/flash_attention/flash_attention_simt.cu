// Flash attention one warp at a time: float32, head dims beyond 256, and what belongs to every backward: delta, the
// gradient of the sink, the gradient of the bias. Simple and exact; simt.cuh has the arithmetic.
#include "core/switch.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "ops/flash_attention/flash_attention_gpu.h"
#include "ops/flash_attention/simt.cuh"

namespace genai_kernels {
namespace {

constexpr int kWarps = 4;  // of a block: neighbouring rows, which read the same keys from L1
constexpr int kThreads = 32 * kWarps;
constexpr int kRoom = kWarps * 64 * int(sizeof(float));

using simt::dim_chunks;
using simt::kDims;

GK_DEVICE int warp() { return int(threadIdx.x) / 32; }
GK_DEVICE int lane() { return int(threadIdx.x) % 32; }

// Zeros for a token of no sequence.
template <class T>
GK_DEVICE void store_zeros(const HeadsView& view, int64_t token, int head, int64_t dim, int64_t dims) {
  const float zeros[simt::kSums] = {};
  simt::store(token_at<T>(view, 0, token, head), view.dim, dim, dims, zeros, false);
}

template <class T>
__global__ void __launch_bounds__(kThreads) flash_attention_fwd_simt_kernel(FlashAttentionParams p) {
  GK_SHARED(memory);
  const Tile t = row_tile_at(p, kWarps, blockIdx.x);
  if (warp() >= t.count) return;
  const int64_t dim = int64_t(blockIdx.y) * kDims;
  const int query = t.begin + warp();
  if (t.owned)
    return simt::attend_row<T>(p, t.sequence, t.head, query, dim, false,
                               reinterpret_cast<float*>(memory) + 64 * warp());
  store_zeros<T>(p.out, t.sequence.query_begin + query, t.head, dim, p.value_dim);
  if (lane() == 0 && dim == 0)
    store_row_state(p, t.sequence.row(p, t.head, query), -kAttentionInfinity, {0.f, 0.f, 0.});
}

template <class T>
__global__ void __launch_bounds__(kThreads) flash_attention_dq_simt_kernel(FlashAttentionParams p) {
  GK_SHARED(memory);
  const Tile t = row_tile_at(p, kWarps, blockIdx.x);
  if (warp() >= t.count) return;
  const int64_t dim = int64_t(blockIdx.y) * kDims;
  const int query = t.begin + warp();
  if (t.owned)
    return simt::differentiate_row<T>(p, t.sequence, t.head, query, dim, false,
                                      reinterpret_cast<float*>(memory) + 64 * warp());
  store_zeros<T>(p.dq, t.sequence.query_begin + query, t.head, dim, p.head_dim);
}

template <class T>
__global__ void __launch_bounds__(kThreads) flash_attention_dkv_simt_kernel(FlashAttentionParams p) {
  GK_SHARED(memory);
  const Tile t = key_tile_at(p, kWarps, blockIdx.x);
  if (warp() >= t.count) return;
  const int64_t dim = int64_t(blockIdx.y) * kDims;
  const int key = t.begin + warp();
  if (t.owned)
    return simt::differentiate_key<T>(p, t.sequence, t.head, key, dim, false,
                                      reinterpret_cast<float*>(memory) + 64 * warp());
  store_zeros<T>(p.dk, t.sequence.key_begin + key, t.head, dim, p.head_dim);
  store_zeros<T>(p.dv, t.sequence.key_begin + key, t.head, dim, p.value_dim);
}

// delta = sum(dO O) - dlse of every row that a sequence owns, 0 of the others.
template <class T>
__global__ void __launch_bounds__(kThreads) flash_attention_delta_kernel(FlashAttentionParams p) {
  const Tile t = row_tile_at(p, kWarps, blockIdx.x);
  if (warp() >= t.count) return;
  const Sequence& s = t.sequence;
  const int query = t.begin + warp();
  const int64_t row = s.row(p, t.head, query), token = s.query_begin + query;
  const bool empty = !t.owned || reinterpret_cast<const float*>(p.lse)[row] == -kAttentionInfinity;
  double sum = 0;
  // a row without keys has out = 0, whatever dO: with a sink its lse is finite
  if (!empty && !row_state(p, row).sees_nothing()) {
    const T *out = token_at<T>(p.out, s.batch, token, t.head), *dout = token_at<T>(p.dout, s.batch, token, t.head);
    for (int64_t d = lane(); d < p.value_dim; d += 32)
      sum += double(to_float(out[d * p.out.dim])) * double(to_float(dout[d * p.dout.dim]));
  }
  sum = simt::warp_sum(sum);
  if (lane() == 0) reinterpret_cast<float*>(p.delta)[row] = empty ? 0.f : float(sum - dlse_of(p, s, t.head, query));
}

// dsink[batch][head] = -sum over the rows of (the sink's share) * delta.
__global__ void __launch_bounds__(kThreads) flash_attention_dsink_kernel(FlashAttentionParams p) {
  GK_SHARED(memory);
  double* sums = reinterpret_cast<double*>(memory);
  const int batch = int(blockIdx.x / p.heads), head = int(blockIdx.x % p.heads);
  const Sequence s = sequence_at(p, batch);
  const double unit = scores_are_modified(p) ? 1 : p.scale, sink = reinterpret_cast<const float*>(p.sink)[head];
  double sum = 0;
  for (int query = threadIdx.x; query < s.queries; query += kThreads) {
    const int64_t row = s.row(p, head, query);
    const float delta = reinterpret_cast<const float*>(p.delta)[row];
    const RowState state = row_state(p, row);
    const double share = state.sees_nothing() ? 1 : exp(sink - double(state.max) * unit) * double(state.inverse);
    if (reinterpret_cast<const float*>(p.lse)[row] != -kAttentionInfinity) sum -= share * delta;
  }
  sum = simt::warp_sum(sum);
  if (lane() == 0) sums[warp()] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w];
  reinterpret_cast<float*>(p.dsink)[blockIdx.x] = float(sum);
}

// The gradient of the bias: a warp has 32 neighbouring keys of one element (batch, head, query) of its shape (all keys, one
// after another, where it is broadcast over them) and sums over what it is broadcast over, in order.
struct BiasShape {
  int64_t batches, heads, queries, strips;
};
BiasShape bias_shape(const FlashAttentionParams& p) {
  return {p.dbias.batch ? p.batch : 1, p.dbias.head ? p.heads : 1, p.dbias.query ? p.queries : 1,
          p.dbias.key ? (p.keys + 31) / 32 : 1};
}
template <class T>
__global__ void __launch_bounds__(kThreads) flash_attention_dbias_kernel(FlashAttentionParams p, BiasShape shape) {
  int64_t at = int64_t(blockIdx.x) * kWarps + warp();
  if (at >= shape.batches * shape.heads * shape.queries * shape.strips) return;
  const int strip = int(at % shape.strips);
  at /= shape.strips;
  const int query = int(at % shape.queries);
  at /= shape.queries;
  const int head = int(at % shape.heads), batch = int(at / shape.heads);
  const bool all_batches = shape.batches == 1, all_heads = shape.heads == 1, all_queries = p.dbias.query == 0;
  double sum = 0;
  bool exists = false;
  for (int b = batch; b < (all_batches ? int(p.batch) : batch + 1); ++b) {
    const Sequence s = sequence_at(p, b);
    for (int h = head; h < (all_heads ? int(p.heads) : head + 1); ++h) {
      const Scores scores(p, s, h);
      for (int i = query; i < (all_queries ? s.queries : min(query + 1, s.queries)); ++i)
        for (int key = 32 * strip + lane(); key < (p.dbias.key ? min(32 * strip + 32, s.keys) : s.keys); key += 32) {
          exists = true;
          sum += double(simt::differentiate_pair<T>(p, s, scores, h, i, key, true).gradient);
        }
    }
  }
  if (!p.dbias.key) {
    sum = simt::warp_sum(sum);
    exists = __any_sync(~0u, exists) && lane() == 0;
  }
  if (!exists) return;
  const int64_t to = batch * p.dbias.batch + head * p.dbias.head + query * p.dbias.query +
                     (p.dbias.key ? 32 * strip + lane() : 0) * p.dbias.key;
  if (p.dbias.dtype == Dtype::f64)
    reinterpret_cast<double*>(p.dbias.data)[to] = sum;
  else
    reinterpret_cast<float*>(p.dbias.data)[to] = float(sum);
}

template <class F>
cudaError_t with_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::f32) return f(TypeTag<float>{});
  if (dtype == Dtype::bf16) return f(TypeTag<bf16>{});
  return f(TypeTag<fp16>{});
}

template <class Kernel>
cudaError_t launch_tiles(Kernel* kernel, int64_t tiles, int chunks, const FlashAttentionParams& p,
                         cudaStream_t stream) {
  if (tiles == 0) return cudaSuccess;
  return launch(kernel, dim3(unsigned(tiles), unsigned(chunks)), kThreads, kRoom, stream, p);
}

}  // namespace

cudaError_t launch_flash_attention_fwd_simt(const FlashAttentionParams& p, cudaStream_t stream) {
  return with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_tiles(flash_attention_fwd_simt_kernel<T>, row_tiles(p, kWarps), dim_chunks(p.value_dim), p, stream);
  });
}

cudaError_t launch_flash_attention_delta(const FlashAttentionParams& p, cudaStream_t stream) {
  const cudaError_t error = with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return launch_tiles(flash_attention_delta_kernel<T>, row_tiles(p, kWarps), 1, p, stream);
  });
  if (error != cudaSuccess || !p.dsink || p.batch * p.heads == 0) return error;
  return launch(flash_attention_dsink_kernel, dim3(unsigned(p.batch * p.heads)), kThreads, kWarps * 8, stream, p);
}

cudaError_t launch_flash_attention_bwd_simt(const FlashAttentionParams& p, cudaStream_t stream) {
  return with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int chunks = dim_chunks(p.head_dim > p.value_dim ? p.head_dim : p.value_dim);
    const cudaError_t error = launch_tiles(flash_attention_dkv_simt_kernel<T>, key_tiles(p, kWarps), chunks, p, stream);
    if (error != cudaSuccess) return error;
    return launch_tiles(flash_attention_dq_simt_kernel<T>, row_tiles(p, kWarps), dim_chunks(p.head_dim), p, stream);
  });
}

cudaError_t launch_flash_attention_dbias(const FlashAttentionParams& p, cudaStream_t stream) {
  const BiasShape shape = bias_shape(p);
  const int64_t warps = shape.batches * shape.heads * shape.queries * shape.strips;
  return with_type(p.dtype, [&](auto type) {
    return launch(flash_attention_dbias_kernel<typename decltype(type)::type>,
                  dim3(unsigned((warps + kWarps - 1) / kWarps)), kThreads, 0, stream, p, shape);
  });
}

}  // namespace genai_kernels
