// A block of threads has kColumns neighbouring columns; its kSlices warps have as many parts of the rows, one after the
// other, and are added in their order. The order depends on the number of rows only.
#include "cuda/sum_blocks.h"

#include <type_traits>

#include "core/switch.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace genai_kernels {
namespace {

constexpr int kColumns = 32;  // a warp reads 128 or 256 bytes of each row
constexpr int kSlices = 16;   // 512 rows, the most there are as a rule, in 32 steps
constexpr int kAtOnce = 8;    // rows under way in each warp

template <class Partial, class Out>
__global__ void __launch_bounds__(kColumns* kSlices)
    sum_blocks_kernel(const Partial* partial, int64_t blocks, int64_t n, Out* out) {
  GK_SHARED(shared);
  auto& sums = *reinterpret_cast<double (*)[kSlices][kColumns]>(shared);
  const int lane = threadIdx.x % kColumns, slice = threadIdx.x / kColumns;
  const int64_t column = int64_t(blockIdx.x) * kColumns + lane;
  const int64_t part = (blocks + kSlices - 1) / kSlices, begin = slice * part;
  const int64_t end = begin + part < blocks ? begin + part : blocks;
  double sum = 0;
  if (column < n)
    for (int64_t b = begin; b < end; b += kAtOnce) {
      Partial x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) x[i] = b + i < end ? partial[(b + i) * n + column] : Partial(0);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += double(x[i]);
    }
  sums[slice][lane] = sum;
  __syncthreads();
  if (slice > 0 || column >= n) return;
#pragma unroll
  for (int s = 1; s < kSlices; ++s) sum += sums[s][lane];
  if constexpr (is_same<Out, double>)
    out[column] = sum;
  else
    out[column] = from_float<Out>(float(sum));
}

}  // namespace

cudaError_t launch_sum_blocks(bool in_double, const void* partial, int64_t blocks, int64_t n, Dtype dtype, void* out,
                              cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  switch_dtype(dtype, [&](auto tag) {
    using Out = typename decltype(tag)::type;
    switch_bool(in_double, [&](auto doubles) {
      using Partial = std::conditional_t<decltype(doubles)::value, double, float>;
      error = launch(sum_blocks_kernel<Partial, Out>, dim3(unsigned((n + kColumns - 1) / kColumns)), kColumns * kSlices,
                     int(sizeof(double[kSlices][kColumns])), stream, static_cast<const Partial*>(partial), blocks, n,
                     static_cast<Out*>(out));
    });
  });
  return error;
}

}  // namespace genai_kernels
