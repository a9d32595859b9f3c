// Flash attention forward with mma.sync, for every card since sm_80 (Dao, "FlashAttention-2", 2023).
//
// A block has kRows queries of one head and goes over its key tiles; a warp has 16 kTiles of the rows and all of O for them
// in registers. K and V of a tile have one buffer each: V arrives while Q K^T is multiplied, the next K while P V is. Two
// buffers for each would cost a second block on an SM, which hides more.
#pragma once
#include "cuda/launch.cuh"
#include "ops/flash_attention/flash_attention_gpu.h"
#include "ops/flash_attention/sm80.cuh"

namespace genai_kernels::sm80 {

template <class T_, int kDim_, bool kExtras_>
struct Forward {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr bool kExtras = kExtras_;  // softcap, ALiBi, bias, mask, dropout, scales <= 0
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  // Two tiles of rows for a warp where O fits in its registers: every fragment of K and V then feeds twice the products,
  // and shared memory, which one tile keeps as busy as the tensor cores, is no limit.
  static constexpr int kTiles = kDim <= 128 && !kExtras ? 2 : 1;
  static constexpr int kRows = 16 * kTiles * kWarps;
  // Keys of a step: S of them lies in registers beside O.
  static constexpr int kKeys = (kExtras ? kDim > 128 : kTiles == 2 ? kDim > 64 : kDim > 192) ? 32 : 64;
  static constexpr int kTileBytes = (kRows + 2 * kKeys) * kDim * int(sizeof(T));
  static constexpr int kSharedBytes = kTileBytes + (kExtras ? kRows * kKeys * int(sizeof(float)) : 0);
};

template <class C>
struct ForwardBlock {
  using T = typename C::T;
  using Memory = TileMemory<T, C::kDim>;
  static constexpr int kTiles = C::kTiles, kColumns = C::kKeys / 8, kOut = C::kDim / 8;

  const FlashAttentionParams& p;
  const Tile t;
  const Memory q, k, v;
  float o[kTiles][kOut][4], most[kTiles][2], sum[kTiles][2];

  GK_DEVICE ForwardBlock(const FlashAttentionParams& p, const Tile& t, T* memory)
      : p(p), t(t), q{memory}, k{memory + C::kRows * C::kDim}, v{k.data + C::kKeys * C::kDim} {}

  GK_DEVICE static int warp_row() { return int(threadIdx.x) / 32 * 16 * kTiles; }
  // The query of half `half` of a tile of this thread's rows.
  GK_DEVICE int query(int tile, int half) const {
    return t.begin + warp_row() + 16 * tile + 8 * half + int(threadIdx.x) % 32 / 4;
  }
  GK_DEVICE void load_keys(const HeadsView& view, Memory to, int key, int dims) const {
    load_tile<C::kKeys, C::kThreads, 4>(to, view, t.sequence.batch, t.sequence.key_begin + key, t.head / int(p.group),
                                        t.sequence.keys - key, dims);
    copy_async_commit();
  }

  // Hidden scores to -inf.
  GK_DEVICE void mask(float (&s)[kTiles][kColumns][4], int key) const {
    const int column = key + int(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = first_key(p, t.sequence, query(i, half)), last = last_key(p, t.sequence, query(i, half));
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int at = column + 8 * j + e;
            if (at < first || at > last) s[i][j][2 * half + e] = -kAttentionInfinity;
          }
      }
  }
  // Products to scores; hidden ones to -inf. A loop over one element at a time, which cannot be one over registers: each
  // thread has a column of shared memory.
  GK_DEVICE void modify(float (&s)[kTiles][kColumns][4], int key) const {
    float* mine = reinterpret_cast<float*>(reinterpret_cast<char*>(q.data) + C::kTileBytes) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kTiles * kColumns * 4; ++i)
      mine[i * C::kThreads] = s[i / (4 * kColumns)][i / 4 % kColumns][i % 4];
    const Scores scores(p, t.sequence, t.head);
#pragma unroll 1
    for (int i = 0; i < kTiles * kColumns * 4; ++i) {
      const int row = query(i / (4 * kColumns), i % 4 / 2),
                at = key + i / 4 % kColumns * 8 + int(threadIdx.x) % 4 * 2 + i % 2;
      float unused, x = -kAttentionInfinity;
      if (row < t.sequence.queries && first_key(p, t.sequence, row) <= at && at <= last_key(p, t.sequence, row))
        x = scores.modify(p, mine[i * C::kThreads], row, at, unused);
      mine[i * C::kThreads] = x;
    }
#pragma unroll
    for (int i = 0; i < kTiles * kColumns * 4; ++i)
      s[i / (4 * kColumns)][i / 4 % kColumns][i % 4] = mine[i * C::kThreads];
  }

  // Scores to probabilities, in place, under the maximum so far; O and the sums follow it.
  GK_DEVICE void softmax(float (&s)[kTiles][kColumns][4], float unit) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = most[i][half];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) top = fmaxf(top, fmaxf(s[i][j][2 * half], s[i][j][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));  // the four lanes of a row
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float offset = top == -kAttentionInfinity ? 0.f : top;  // -inf - -inf is NaN
        const float alpha = exp2_approx((most[i][half] - offset) * unit);
        most[i][half] = top;
        float part = 0;
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[i][j][e] = exp2_approx((s[i][j][e] - offset) * unit);
            part += s[i][j][e];
          }
        sum[i][half] = sum[i][half] * alpha + part;
#pragma unroll
        for (int d = 0; d < kOut; ++d)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) o[i][d][e] *= alpha;
      }
  }

  GK_DEVICE void drop(float (&s)[kTiles][kColumns][4], int key) const {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      uint32_t keep = 0;  // a bit for an element
#pragma unroll 1
      for (int j = 0; j < kColumns; ++j)
        keep |= dropout_keeps(p, t.sequence.batch, t.head, query(i, 0), key + 8 * j) << 4 * j;
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (!(keep >> (4 * j + e) & 1)) s[i][j][e] = 0;
    }
  }

  // O and the sums over all visible keys. `finite`: with zeros in the place of NaN and infinities in V.
  GK_DEVICE void attend(bool finite) {
    clear(o);
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) most[i][half] = -kAttentionInfinity, sum[i][half] = 0;
    const Visit visit = keys_to_visit(p, t.sequence, t.begin, t.count, C::kKeys);
    if (visit.begin >= visit.end) return;
    const float unit = unit_of_exponent(p);
    const bool modified = C::kExtras && scores_are_modified(p);
    load_tile<C::kRows, C::kThreads, 4>(q, p.q, t.sequence.batch, t.sequence.query_begin + t.begin, t.head, t.count,
                                        int(p.head_dim));
    load_keys(p.k, k, visit.begin, int(p.head_dim));
    for (int key = visit.begin; key < visit.end; key += C::kKeys) {
      copy_async_wait<0>();
      __syncthreads();  // K is there, and V of the step before is read
      load_keys(p.v, v, key, int(p.value_dim));
      float s[kTiles][kColumns][4];
      clear(s);
      multiply_rows<kTiles, C::kKeys, C::kDim / 16>(s, q, warp_row(), k, 0);
      if (modified)
        modify(s, key);
      else if (!visit.full(key))
        mask(s, key);
      softmax(s, unit);
      if (C::kExtras && p.dropout_p > 0) drop(s, key);
      uint32_t probabilities[kTiles][kColumns / 2][4];
      round_to<T>(probabilities, s);
      copy_async_wait<0>();
      __syncthreads();  // V is there, and K is read
      if (finite) {
        make_finite<C::kKeys, C::kThreads>(v);
        __syncthreads();
      }
      if (key + C::kKeys < visit.end) load_keys(p.k, k, key + C::kKeys, int(p.head_dim));
      multiply_columns<C::kKeys, C::kDim>(o, probabilities, v, 0, 0);
    }
    __syncthreads();  // V is read
  }

  GK_DEVICE void finish() {
    float by[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = sum[i][half];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const RowEnd end = end_of_row(p, t.head, most[i][half], total);
        by[i][half] = end.total == 0 ? 0.f : end.beside_sink / end.total * (C::kExtras ? p.dropout_factor : 1.f);
        const int row = query(i, half);
        if (threadIdx.x % 4 == 0 && row < t.begin + t.count)
          store_row_state(p, t.sequence.row(p, t.head, row), most[i][half], end);
      }
    T* out = token_at<T>(p.out, t.sequence.batch, t.sequence.query_begin + t.begin, t.head);
    store_rows<kTiles, C::kDim>(o, by, q, warp_row(), out, p.out.token, p.out.dim, is_aligned<T>(p.out, p.value_dim),
                                t.count, 0, int(p.value_dim));
  }
};

// NaN and infinities of V to the rows of a tile that see them.
template <class T>
GK_DEVICE_COLD void repair_rows(const FlashAttentionParams& p, const Tile& t, int warps, float* room) {
  const int warp = int(threadIdx.x) / 32;
  for (int row = warp; row < t.count; row += warps)
    simt::attend_row<T>(p, t.sequence, t.head, t.begin + row, 0, true, room + 32 * warp);
}

template <class T>
GK_DEVICE_COLD void fill_unowned_rows(const FlashAttentionParams& p, const Tile& t, int threads) {
  for (int i = threadIdx.x; i < t.count; i += threads) {
    const int64_t token = t.sequence.query_begin + t.begin + i;
    T* out = token_at<T>(p.out, 0, token, t.head);
    for (int64_t d = 0; d < p.value_dim; ++d) out[d * p.out.dim] = T{0};
    store_row_state(p, t.sequence.row(p, t.head, t.begin + i), -kAttentionInfinity, {0.f, 0.f, 0.});
  }
}

// Two blocks of 128 threads leave each thread 255 registers.
template <class C>
__global__ void __launch_bounds__(C::kThreads, 2)
    flash_attention_fwd_sm80_kernel(const __grid_constant__ FlashAttentionParams p) {
  using T = typename C::T;
  GK_SHARED(memory);
  const Tile t = row_tile_at(p, C::kRows, blockIdx.x);
  if (t.count == 0) return;
  if (!t.owned) return fill_unowned_rows<T>(p, t, C::kThreads);
  ForwardBlock<C> block(p, t, reinterpret_cast<T*>(memory));
  bool dirty = false;
#pragma unroll 1
  for (int pass = 0; pass == 0 || (pass == 1 && dirty); ++pass) {
    block.attend(dirty);
    dirty = hides_within_tiles(p) && (dirty || __syncthreads_or(!all_finite(block.o)));
  }
  block.finish();
  if (!dirty) return;
  __syncthreads();  // the rows are written, and their staging is read
  repair_rows<T>(p, t, C::kWarps, reinterpret_cast<float*>(memory));
}

template <class C>
cudaError_t launch_forward(const FlashAttentionParams& p, cudaStream_t stream) {
  const int64_t tiles = row_tiles(p, C::kRows);
  if (tiles == 0) return cudaSuccess;
  return launch(flash_attention_fwd_sm80_kernel<C>, dim3(unsigned(tiles)), C::kThreads, C::kSharedBytes, stream, p);
}

// The head dims that have a kernel of their own, and, where scores are more than products, fewer.
template <class T>
cudaError_t launch_forward_of(const FlashAttentionParams& p, cudaStream_t stream) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (scores_are_modified(p) || p.dropout_p > 0)
    return dim <= 64    ? launch_forward<Forward<T, 64, true>>(p, stream)
           : dim <= 128 ? launch_forward<Forward<T, 128, true>>(p, stream)
                        : launch_forward<Forward<T, 256, true>>(p, stream);
  return dim <= 32    ? launch_forward<Forward<T, 32, false>>(p, stream)
         : dim <= 64  ? launch_forward<Forward<T, 64, false>>(p, stream)
         : dim <= 96  ? launch_forward<Forward<T, 96, false>>(p, stream)
         : dim <= 128 ? launch_forward<Forward<T, 128, false>>(p, stream)
         : dim <= 192 ? launch_forward<Forward<T, 192, false>>(p, stream)
                      : launch_forward<Forward<T, 256, false>>(p, stream);
}

}  // namespace genai_kernels::sm80
