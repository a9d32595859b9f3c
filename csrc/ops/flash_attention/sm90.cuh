// What the Hopper kernels of flash_attention share: a block of three warpgroups. Two are consumers, which multiply 64 rows
// each; of the third, single warps produce: they load tiles into shared memory.
#pragma once
#include "cuda/hopper_tile.cuh"
#include "cuda/tensor_map.cuh"
#include "ops/flash_attention/fragment_sm90.cuh"
#include "ops/flash_attention/simt.cuh"

namespace genai_kernels::sm90 {

inline constexpr int kConsumers = 2, kWarps = 4 * kConsumers, kThreads = 128 * (kConsumers + 1);
// 65536 registers: 168 for each of 384 threads. setmaxnreg moves them from the producers to the consumers.
inline constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (kConsumers + 1) * 168);

// kFirstTurn + w: warpgroup w may issue its products. kVerdict: everybody knows whether all is done again.
enum NamedBarrier { kFirstTurn = 1, kVerdict = 3, kConsumersMeet = 4 };

// A consumer has read a tile. Each warp speaks for itself: it has waited for its own products only.
GK_DEVICE void release(uint64_t* empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

// What a row does not see is multiplied by 0. Where NaN or infinities there make a sum NaN, all is done again with zeros in
// their place, and simt.cuh brings them to the rows that see them. `repeat` in shared memory: 1, a sum was not finite;
// -1, nothing is hidden, so that no verdict is asked for.
GK_DEVICE int first_verdict(const FlashAttentionParams& p) { return hides_within_tiles(p) || p.cu_k ? 0 : -1; }

// A tensor as TMA wants it. Packed sequences are one long one, in which a sequence's begin is part of a coordinate.
inline BoxedTensor boxed(const FlashAttentionParams& p, const HeadsView& view, bool of_queries, int64_t dim) {
  const int64_t heads = of_queries ? p.heads : p.kv_heads;
  if (p.cu_q) return {view.data, dim, of_queries ? p.total_queries : p.total_keys, heads, 1, view.token, view.head, 0};
  return {view.data, dim, of_queries ? p.queries : p.keys, heads, p.batch, view.token, view.head, view.batch};
}
inline bool fits(const FlashAttentionParams& p, const HeadsView& view, bool of_queries, int64_t dim) {
  return view.dim == 1 && boxed(p, view, of_queries, dim).fits();
}
inline int64_t widest_dim(const FlashAttentionParams& p) { return p.head_dim > p.value_dim ? p.head_dim : p.value_dim; }

}  // namespace genai_kernels::sm90
