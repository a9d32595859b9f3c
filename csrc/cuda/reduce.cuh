// Sums over the threads that share a row, in an order that depends on their number only.
#pragma once
#include "cuda/ptx.cuh"

namespace genai_kernels {

inline constexpr int kWarpThreads = 32;

// The threads of one row: a power of two within a warp, or all threads of the block, whole warps.
struct RowGroup {
  // Two buffers in turn: a sum is read from one while the next is written to the other, so that each sum needs one
  // barrier only.
  static constexpr int kMostSums = 3;
  struct Shared {
    double sums[2][kMostSums][kWarpThreads];
  };

  int size;
  Shared* shared;  // of the block; not used within a warp
  int turn = 0;

  GK_DEVICE RowGroup(int threads, void* at) : size(threads), shared(static_cast<Shared*>(at)) {}
  GK_DEVICE int rank() const { return size < int(blockDim.x) ? int(threadIdx.x) & (size - 1) : int(threadIdx.x); }
  GK_DEVICE int number() const {
    return size < int(blockDim.x) ? int(threadIdx.x) / size : 0;
  }  // of the block's groups
  GK_DEVICE int count() const { return size < int(blockDim.x) ? int(blockDim.x) / size : 1; }

  // Every thread of the group gets the same bits. All threads of the block must call it.
  template <int kSums>
  GK_DEVICE void sum(double (&x)[kSums]) {
    const int within = size < kWarpThreads ? size : kWarpThreads;
    for (int offset = within / 2; offset > 0; offset /= 2)
#pragma unroll
      for (int k = 0; k < kSums; ++k) x[k] += __shfl_xor_sync(~0u, x[k], offset);
    if (size <= kWarpThreads) return;
    const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads, warps = size / kWarpThreads;
    if (lane == 0)
#pragma unroll
      for (int k = 0; k < kSums; ++k) shared->sums[turn][k][warp] = x[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSums; ++k) x[k] = lane < warps ? shared->sums[turn][k][lane] : 0;
    for (int offset = kWarpThreads / 2; offset > 0; offset /= 2)
#pragma unroll
      for (int k = 0; k < kSums; ++k) x[k] += __shfl_xor_sync(~0u, x[k], offset);
    turn ^= 1;
  }
  // Whether any row wants something: the same answer in all threads that must go on together.
  GK_DEVICE bool any(bool wanted) const { return size <= kWarpThreads ? __any_sync(~0u, wanted) : wanted; }
};

}  // namespace genai_kernels
