// y = act(gate) * up on the GPU, a row of x being [gate | up]: one text for the three activations.
//
//   backward: d gate = dy * up * act'(gate),   d up = dy * act(gate)
//
// A thread has one vector of 16 bytes of each tensor's row: at full occupancy 64 KiB are under way in each SM.
#include "ops/gated_activations/gated_activations.h"

#include "cuda/activations.cuh"
#include "cuda/launch.cuh"
#include "cuda/vectors.cuh"

namespace genai_kernels {
namespace {

constexpr int kThreads = 256;

// Vector `column` of row `row` is this thread's, if there is such a row.
struct Place {
  int64_t row, column;
  GK_DEVICE explicit Place(int64_t vectors_of_row) {
    const int64_t flat = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if ((flat | vectors_of_row) >> 32) {
      row = flat / vectors_of_row;
      column = flat - row * vectors_of_row;
    } else {  // a division of 64 bits costs as much as the activation
      const uint32_t of_row = uint32_t(vectors_of_row), quotient = uint32_t(flat) / of_row;
      row = quotient;
      column = uint32_t(flat) - quotient * of_row;
    }
  }
};

template <class Gate, class T>
__global__ void __launch_bounds__(kThreads)
    gated_activation_fwd_kernel(const __grid_constant__ GatedActivationParams p, int64_t vectors_of_row, bool wide) {
  constexpr int kPer = Vector<T>::kCount;
  const Place at(vectors_of_row);
  const int64_t n = p.y.length;
  if (at.row >= p.y.count) return;
  const Vector<T> gate = RowView<T>(p.x, at.row, wide, n).load(at.column);
  const Vector<T> up = RowView<T>(p.x, at.row, wide, n, n).load(at.column);
  float y[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) y[i] = __fmul_rn(gate_value<Gate, sizeof(T) == 4>(gate[i]), up[i]);
  RowView<T>(p.y, at.row, wide, n).store(at.column, rounded<T>(y));
}

template <class Gate, class T>
__global__ void __launch_bounds__(kThreads)
    gated_activation_bwd_kernel(const __grid_constant__ GatedActivationParams p, int64_t vectors_of_row, bool wide) {
  constexpr int kPer = Vector<T>::kCount;
  const Place at(vectors_of_row);
  const int64_t n = p.dy.length;
  if (at.row >= p.dy.count) return;
  const Vector<T> gate = RowView<T>(p.x, at.row, wide, n).load(at.column);
  const Vector<T> up = RowView<T>(p.x, at.row, wide, n, n).load(at.column);
  const Vector<T> dy = RowView<T>(p.dy, at.row, wide, n).load(at.column);
  float dgate[kPer], dup[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    float value, slope;
    gate_value_and_slope<Gate, sizeof(T) == 4>(gate[i], value, slope);
    dgate[i] = __fmul_rn(__fmul_rn(dy[i], up[i]), slope);
    dup[i] = __fmul_rn(dy[i], value);
  }
  RowView<T>(p.dx, at.row, wide, n).store(at.column, rounded<T>(dgate));
  RowView<T>(p.dx, at.row, wide, n, n).store(at.column, rounded<T>(dup));
}

template <class F>
void switch_gate(Gate gate, F&& f) {
  if (gate == Gate::silu) return f(TypeTag<Silu>{});
  if (gate == Gate::gelu) return f(TypeTag<GeluErf>{});
  f(TypeTag<GeluTanh>{});
}

// `halves`: rows of n; `wholes`: rows of 2n, each half of which begins at an aligned place if the first does.
template <class Kernel>
cudaError_t launch_gated(const GatedActivationParams& p, const Rows& half, const Rows& whole, const Rows& other,
                         cudaStream_t stream, const Kernel& kernel) {
  cudaError_t error = cudaSuccess;
  for (const Rows* t : {&half, &whole, &other})
    if (!few_rows(*t)) return cudaErrorInvalidValue;
  switch_gpu_dtype(p.dtype, [&](auto type) {
    constexpr int64_t kSize = sizeof(typename decltype(type)::type);
    const int64_t n = half.length, vectors = (n * kSize + 15) / 16;
    const bool wide = is_wide(half, kSize) && is_wide(whole, kSize, n) && is_wide(other, kSize, n);
    const int64_t blocks = (half.count * vectors + kThreads - 1) / kThreads;
    switch_gate(p.gate, [&](auto gate) {
      error = launch(kernel(gate, type), dim3(unsigned(blocks)), kThreads, 0, stream, p, vectors, wide);
    });
  });
  return error;
}

}  // namespace

cudaError_t launch_gated_activation_fwd(const GatedActivationParams& p, cudaStream_t stream) {
  return launch_gated(p, p.y, p.x, {}, stream, [](auto gate, auto type) {
    return &gated_activation_fwd_kernel<typename decltype(gate)::type, typename decltype(type)::type>;
  });
}

cudaError_t launch_gated_activation_bwd(const GatedActivationParams& p, cudaStream_t stream) {
  return launch_gated(p, p.dy, p.x, p.dx, stream, [](auto gate, auto type) {
    return &gated_activation_bwd_kernel<typename decltype(gate)::type, typename decltype(type)::type>;
  });
}

}  // namespace genai_kernels
