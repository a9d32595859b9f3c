// Rotary position embedding on the GPU. A pair (a, b) of a head becomes (a c - b s, b c + a s); the pairs are
// (x[i], x[i + rotary_dim / 2]) for NeoX, (x[2 i], x[2 i + 1]) interleaved.
//
// A unit is as many pairs as a vector of 16 bytes has elements: two vectors of a head, half a head apart or side by side.
// A thread has the same unit of kHeads heads of a token, for which it reads cosines and sines once. Behind the units that
// turn come those that are copied.
#include "ops/rotary_embedding/rotary_embedding.h"

#include "cuda/launch.cuh"
#include "cuda/vectors.cuh"

namespace genai_kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kHeads = 4;  // 8 vectors under way in a thread

struct RotaryLaunch {
  uint32_t rotated, units;  // of a head: that turn, and all
  uint32_t head_groups;
  bool wide, wide_table;
};

// `count` cosines or sines from `first` on, as floats.
template <class T, int kPer>
GK_DEVICE void load_table(const Rows& table, Dtype dtype, int64_t row, int first, int count, bool wide,
                          float (&out)[kPer]) {
  const int64_t at = row_offset(table, row) + first * table.inner_stride;
  if (wide) {  // of the type of x, or float32
    if (sizeof(T) == 4 || dtype == Dtype::f32) {
#pragma unroll
      for (int h = 0; h < kPer / 4; ++h) {
        const auto v = Vector<float>::of(load_constant_16(static_cast<const float*>(table.data) + at + 4 * h));
#pragma unroll
        for (int i = 0; i < 4; ++i) out[4 * h + i] = v[i];
      }
    } else {
      const auto v = Vector<T>::of(load_constant_16(static_cast<const T*>(table.data) + at));
#pragma unroll
      for (int i = 0; i < kPer; ++i) out[i] = v[i];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    out[i] = 0;
    if (i >= count) continue;
    const int64_t from = at + i * table.inner_stride;
    if (dtype == Dtype::f32) out[i] = static_cast<const float*>(table.data)[from];
    if (dtype == Dtype::f64) out[i] = float(static_cast<const double*>(table.data)[from]);
    if (dtype == Dtype::bf16) out[i] = to_float(static_cast<const bf16*>(table.data)[from]);
    if (dtype == Dtype::f16) out[i] = to_float(static_cast<const fp16*>(table.data)[from]);
  }
}

template <class T, bool kInterleaved>
__global__ void __launch_bounds__(kThreads)
    rotary_fwd_kernel(const __grid_constant__ RotaryParams p, const __grid_constant__ RotaryLaunch launch) {
  constexpr int kPer = Vector<T>::kCount;
  const int64_t flat = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const uint32_t of_token = launch.units * launch.head_groups;
  const int64_t token = flat >> 32 ? flat / of_token : uint32_t(flat) / of_token;
  if (token >= p.x.count) return;
  const uint32_t rest = uint32_t(flat - token * of_token), group = rest / launch.units,
                 unit = rest - group * launch.units;
  const bool turns = unit < launch.rotated;
  const int half = int(p.rotary_dim / 2), head_dim = int(p.head_dim);
  // Where the unit's two vectors begin, and how many elements of each there are.
  int at[2], count[2];
  if (turns) {
    const int pair = int(unit) * kPer, pairs = min(kPer, half - pair);
    at[0] = kInterleaved ? 2 * pair : pair;
    at[1] = kInterleaved ? 2 * pair + kPer : half + pair;
    count[0] = kInterleaved ? min(kPer, 2 * pairs) : pairs;
    count[1] = kInterleaved ? max(0, 2 * pairs - kPer) : pairs;
  } else {
    at[0] = int(p.rotary_dim) + int(unit - launch.rotated) * 2 * kPer;
    at[1] = at[0] + kPer;
    count[0] = min(kPer, head_dim - at[0]);
    count[1] = max(0, min(kPer, head_dim - at[1]));
  }
  int64_t row = token;
  bool known = true;  // a position outside of the table gives NaN: it cannot be refused before the kernel runs
  if (p.positions.data) {
    const int64_t place = row_offset(p.positions, token);
    row = p.long_positions ? static_cast<const int64_t*>(p.positions.data)[place]
                           : static_cast<const int32_t*>(p.positions.data)[place];
    known = row >= 0 && row < p.cos.count;
  }
  float c[kPer], s[kPer];
  if (turns && known) {
    const int first = int(unit) * kPer, pairs = half - first;
    load_table<T, kPer>(p.cos, p.table_dtype, row, first, pairs, launch.wide_table, c);
    load_table<T, kPer>(p.sin, p.table_dtype, row, first, pairs, launch.wide_table, s);
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (!known) c[i] = s[i] = NAN;
    if (p.inverse) s[i] = -s[i];
  }
  const auto view = [&](const Rows& rows, int64_t stride, int64_t head, int part) {
    return RowView<T, int>(rows, token, launch.wide, count[part], at[part], head * stride);
  };
  Vector<T> x[kHeads][2];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int64_t head = int64_t(group) * kHeads + h;
#pragma unroll
    for (int part = 0; part < 2; ++part)
      if (head < p.heads) x[h][part] = view(p.x, p.x_head_stride, head, part).load(0);
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int64_t head = int64_t(group) * kHeads + h;
    if (head >= p.heads) break;
    float y[2][kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      // the members of pair i, and where in the two vectors they are
      const int pa = kInterleaved ? 2 * i / kPer : 0, ia = kInterleaved ? 2 * i % kPer : i;
      const int pb = kInterleaved ? pa : 1, ib = kInterleaved ? ia + 1 : i;
      const float a = x[h][pa][ia], b = x[h][pb][ib];
      y[pa][ia] = __fmaf_rn(a, c[i], -__fmul_rn(b, s[i]));
      y[pb][ib] = __fmaf_rn(b, c[i], __fmul_rn(a, s[i]));
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      Vector<T> out = x[h][part];  // copied bit for bit
      if (turns) out = rounded<T>(y[part]);
      if (!known) out = all_nan<T>();
      view(p.y, p.y_head_stride, head, part).store(0, out);
    }
  }
}

}  // namespace

cudaError_t launch_rotary_fwd(const RotaryParams& p, cudaStream_t stream) {
  for (const Rows* t : {&p.x, &p.y, &p.cos, &p.sin, &p.positions})
    if (!few_rows(*t)) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  switch_gpu_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int64_t kSize = sizeof(T), kPer = Vector<T>::kCount;
    const int64_t half = p.rotary_dim / 2;
    RotaryLaunch launch_of{};
    launch_of.rotated = uint32_t((half + kPer - 1) / kPer);
    launch_of.units = launch_of.rotated + uint32_t((p.head_dim - p.rotary_dim + 2 * kPer - 1) / (2 * kPer));
    launch_of.head_groups = uint32_t((p.heads + kHeads - 1) / kHeads);
    const auto aligned_heads = [&](const Rows& rows, int64_t stride) {
      return is_wide(rows, kSize, half) && is_wide(rows, kSize, p.head_dim) && stride * kSize % 16 == 0;
    };
    launch_of.wide = aligned_heads(p.x, p.x_head_stride) && aligned_heads(p.y, p.y_head_stride);
    const int64_t table_size = p.table_dtype == Dtype::f32 ? 4 : kSize;
    launch_of.wide_table = (p.table_dtype == p.dtype || p.table_dtype == Dtype::f32) && half % kPer == 0 &&
                           is_wide(p.cos, table_size, half) && is_wide(p.sin, table_size, half);
    const int64_t threads = p.x.count * launch_of.units * launch_of.head_groups;
    const dim3 grid(unsigned((threads + kThreads - 1) / kThreads));
    switch_bool(p.interleaved, [&](auto interleaved) {
      error = launch(&rotary_fwd_kernel<T, decltype(interleaved)::value>, grid, kThreads, 0, stream, p, launch_of);
    });
  });
  return error;
}

}  // namespace genai_kernels
