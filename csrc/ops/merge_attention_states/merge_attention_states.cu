// Merging two attention states on the GPU; genai_kernels/ops/merge_attention_states/README.md derives the formulas.
//
// A row (a head of a token) is shared by a power of two of threads of a warp. The weights of a block's rows are computed
// in double by one thread each, while the rows themselves are on their way: every thread of a row doing it would cost
// more than the row's memory.
#include "ops/merge_attention_states/merge_attention_states.h"

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vectors.cuh"

namespace genai_kernels {
namespace {

constexpr int kThreads = 128;

struct MergeLaunch {
  int group;  // threads of a row
  bool wide;
};

// What the rows of a block share with their threads.
struct Weights {
  double a, b;            // the shares of the two sides, neither empty
  bool a_empty, b_empty;  // lse = -inf: what that side holds is not looked at
  bool infinite;          // the weights do not change with lse
  float dlse;
};

// [batch, heads, tokens], for a row numbered [batch, tokens, heads].
GK_DEVICE float& at_row(const PerRow& values, const MergeAttentionStatesParams& p, int64_t row) {
  const uint32_t r = uint32_t(row), heads = uint32_t(p.heads), tokens = uint32_t(p.tokens);
  const uint32_t rest = r / heads, head = r - rest * heads, batch = rest / tokens, token = rest - batch * tokens;
  return static_cast<float*>(values.data)[batch * values.batch + head * values.head + token * values.token];
}

// The shares of two sums of exponentials e^lse_a and e^lse_b in their total, and its logarithm. The exponential of the
// smaller relative to the larger can neither overflow nor cancel; two infinities share evenly.
GK_DEVICE Weights weights_of(float lse_a, float lse_b, float& lse) {
  Weights w{};
  w.a_empty = lse_a == -INFINITY;
  w.b_empty = lse_b == -INFINITY;
  lse = w.a_empty ? lse_b : lse_a;
  if (w.a_empty || w.b_empty) return w;
  const bool a_larger = lse_a > lse_b;
  const double large = a_larger ? lse_a : lse_b, small = a_larger ? lse_b : lse_a;
  const double ratio = large == small ? 1 : exp(small - large);
  const double larger = 1 / (1 + ratio), smaller = ratio * larger, merged = large + log1p(ratio);
  w.a = a_larger ? larger : smaller;
  w.b = a_larger ? smaller : larger;
  w.infinite = merged == double(INFINITY);
  lse = float(merged);
  return w;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_attention_states_fwd_kernel(const __grid_constant__ MergeAttentionStatesParams p,
                                      const __grid_constant__ MergeLaunch launch) {
  constexpr int kPer = Vector<T>::kCount;
  GK_SHARED(shared);
  auto* of_rows = reinterpret_cast<Weights*>(shared);
  const RowGroup group(launch.group, nullptr);
  const int64_t first_row = int64_t(blockIdx.x) * group.count(), row = first_row + group.number();
  const bool in = row < p.o.count;
  const int length = in ? int(p.o.length) : 0;
  const auto view = [&](const Rows& rows) { return RowView<T, int>(rows, in ? row : 0, launch.wide, length); };
  const RowView<T, int> o_a = view(p.o_a), o_b = view(p.o_b), o = view(p.o);
  int at = group.rank();
  Vector<T> a = o_a.load(at), b = o_b.load(at);
  if (int(threadIdx.x) < group.count() && first_row + threadIdx.x < p.o.count) {
    const int64_t r = first_row + threadIdx.x;
    float lse;
    of_rows[threadIdx.x] = weights_of(at_row(p.lse_a, p, r), at_row(p.lse_b, p, r), lse);
    at_row(p.lse, p, r) = lse;
  }
  __syncthreads();
  const Weights w = of_rows[group.number()];
  const float weight_a = float(w.a), weight_b = float(w.b);
  while (at * kPer < length) {
    Vector<T> out = w.a_empty ? b : a;  // bit for bit
    if (w.a_empty && w.b_empty) out = {};
    if (!w.a_empty && !w.b_empty) {
      float y[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) y[i] = __fmaf_rn(weight_a, a[i], __fmul_rn(weight_b, b[i]));
      out = rounded<T>(y);
    }
    o.store(at, out);
    at += launch.group;
    a = o_a.load(at);
    b = o_b.load(at);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_attention_states_bwd_kernel(const __grid_constant__ MergeAttentionStatesParams p,
                                      const __grid_constant__ MergeLaunch launch) {
  constexpr int kPer = Vector<T>::kCount;
  GK_SHARED(shared);
  auto* of_rows = reinterpret_cast<Weights*>(shared);
  RowGroup group(launch.group, nullptr);
  const int64_t first_row = int64_t(blockIdx.x) * group.count(), row = first_row + group.number();
  const bool in = row < p.o_a.count;
  const int length = in ? int(p.o_a.length) : 0;
  const auto view = [&](const Rows& rows) { return RowView<T, int>(rows, in ? row : 0, launch.wide, length); };
  const RowView<T, int> o_a = view(p.o_a), o_b = view(p.o_b), d_o = view(p.d_o), d_o_a = view(p.d_o_a),
                        d_o_b = view(p.d_o_b);
  const int first = group.rank();
  const Vector<T> held = d_o.load(first);
  Vector<T> a = o_a.load(first), b = o_b.load(first), d = held;
  if (int(threadIdx.x) < group.count() && first_row + threadIdx.x < p.o_a.count) {
    const int64_t r = first_row + threadIdx.x;
    float lse;
    Weights w = weights_of(at_row(p.lse_a, p, r), at_row(p.lse_b, p, r), lse);
    w.dlse = p.dlse.data ? at_row(p.dlse, p, r) : 0;
    of_rows[threadIdx.x] = w;
  }
  // sum_i d_o[i] * (a[i] - b[i]), in double: it decides the gradient of lse, often by cancellation
  double dot[1] = {0};
  for (int at = first; at * kPer < length;) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) dot[0] = fma(double(d[i]), double(a[i]) - double(b[i]), dot[0]);
    at += launch.group;
    d = d_o.load(at);
    a = o_a.load(at);
    b = o_b.load(at);
  }
  group.sum(dot);
  __syncthreads();
  const Weights w = of_rows[group.number()];
  const float weight_a = float(w.a), weight_b = float(w.b);
  const bool one_side = w.a_empty || w.b_empty;  // the gradient passes to the side that is not empty, if any
  for (int at = first; at * kPer < length; at += launch.group) {
    d = at == first ? held : d_o.load(at);
    float da[kPer], db[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      da[i] = __fmul_rn(weight_a, d[i]);
      db[i] = __fmul_rn(weight_b, d[i]);
    }
    d_o_a.store(at, w.a_empty ? Vector<T>{} : one_side ? d : rounded<T>(da));
    d_o_b.store(at, w.b_empty ? Vector<T>{} : one_side ? d : rounded<T>(db));
  }
  if (in && first == 0) {
    const double dlse = w.dlse, pull = w.infinite ? 0 : dot[0];
    at_row(p.dlse_a, p, row) = w.a_empty ? 0 : one_side ? w.dlse : float(w.a * (dlse + w.b * pull));
    at_row(p.dlse_b, p, row) = w.b_empty ? 0 : one_side ? w.dlse : float(w.b * (dlse - w.a * pull));
  }
}

template <class Kernel>
cudaError_t launch_merge(const MergeAttentionStatesParams& p, cudaStream_t stream, const Kernel& kernel) {
  const Rows& o = p.o_a;
  if (o.count == 0) return cudaSuccess;
  if (o.count > int64_t(0xffffffff) || o.length > (1 << 30)) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  switch_gpu_dtype(p.dtype, [&](auto type) {
    constexpr int64_t kSize = sizeof(typename decltype(type)::type);
    MergeLaunch launch_of{1, true};
    while (launch_of.group < kWarpThreads && launch_of.group * 16 < o.length * kSize) launch_of.group *= 2;
    for (const Rows* t : {&p.o_a, &p.o_b, &p.o, &p.d_o, &p.d_o_a, &p.d_o_b})
      launch_of.wide = launch_of.wide && is_wide(*t, kSize);
    const int64_t rows = kThreads / launch_of.group;
    const dim3 grid(unsigned((o.count + rows - 1) / rows));
    error = launch(kernel(type), grid, kThreads, int(rows * sizeof(Weights)), stream, p, launch_of);
  });
  return error;
}

}  // namespace

cudaError_t launch_merge_attention_states_fwd(const MergeAttentionStatesParams& p, cudaStream_t stream) {
  return launch_merge(p, stream,
                      [](auto type) { return &merge_attention_states_fwd_kernel<typename decltype(type)::type>; });
}

cudaError_t launch_merge_attention_states_bwd(const MergeAttentionStatesParams& p, cudaStream_t stream) {
  return launch_merge(p, stream,
                      [](auto type) { return &merge_attention_states_bwd_kernel<typename decltype(type)::type>; });
}

}  // namespace genai_kernels
