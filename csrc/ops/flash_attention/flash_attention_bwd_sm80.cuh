// Flash attention backward with mma.sync, deterministic without atomics: one kernel for dQ by tiles of queries, one for
// dK and dV by tiles of keys. Both recompute S and dP: seven products instead of five. The other way, one kernel with
// partial sums of dQ in memory, moves kTiles x queries x head_dim floats and needs as much room.
//
// The two are one text. A block has 64 rows (queries, or keys) in `a`, a warp 16 of them with their sums in registers, and
// goes over steps of columns (keys of the rows' head, or queries of all heads of the group) in `b`:
//
//                 a0, a1   b0, b1    C = A0 B0^T    D = A1 B1^T    sums
//     queries     Q, dO    K, V      S              dP             dQ += dS K
//     keys        K, V     Q, dO     S^T            dP^T           dK += dS^T Q, dV += P^T dO
#pragma once
#include "cuda/launch.cuh"
#include "ops/flash_attention/flash_attention_gpu.h"
#include "ops/flash_attention/sm80.cuh"

namespace genai_kernels::sm80 {

template <class T_, int kDim_, bool kExtras_, bool kOfKeys_>
struct Backward {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr bool kExtras = kExtras_;  // softcap, ALiBi, bias, mask, dropout, scales <= 0
  static constexpr bool kOfKeys = kOfKeys_;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  // Sums of dK and dV together, beside C and D, fit in registers up to here. Beyond, a block has one of the two.
  static constexpr bool kBoth = kOfKeys && kDim <= 128;
  // Two steps in shared memory where three blocks (dim 64) or two (128) still fit on an SM of 164 KiB; at 256, one fits in
  // the 99 KiB of the smaller cards.
  static constexpr int kStages = kDim <= 128 ? 2 : 1;
  // C and D of a step lie in registers beside the sums: what is left of 255 for them.
  static constexpr int kStep = kDim <= 64 ? 64 : kDim <= 128 ? 32 : 16;
  static constexpr int kUnrolled = kDim > 128 ? 2 : kDim > 64 ? 4 : kDim / 16;
  static constexpr int kCopies = kDim > 128 ? 2 : 4;
  static constexpr int kRowBytes = 2 * kRows * kDim * int(sizeof(T));
  static constexpr int kStageBytes = 2 * kStep * kDim * int(sizeof(T)) + 4 * kStep * int(sizeof(float));
  static constexpr int kScratchBytes = kExtras ? 2 * kRows * kStep * int(sizeof(float)) : 0;
  static constexpr int kSharedBytes = kRowBytes + kStages * kStageBytes + kScratchBytes;
};

// What P and dS of a row of queries need. A row without keys, or past the last: P = exp2(-inf) * 0.
struct RowFactors {
  float max, inverse, delta, dlse;
};
GK_DEVICE RowFactors row_factors(const FlashAttentionParams& p, const Sequence& s, int head, int query) {
  if (query >= s.queries) return {kAttentionInfinity, 0.f, 0.f, 0.f};
  const int64_t row = s.row(p, head, query);
  const RowState state = row_state(p, row);
  if (state.sees_nothing()) return {kAttentionInfinity, 0.f, 0.f, 0.f};
  // without softmax_state every inverse is 1, and must not be taken for that of a row with one key
  return {state.max, p.softmax_state ? state.inverse : state.inverse * 0x1.fffffep-1f,
          reinterpret_cast<const float*>(p.delta)[row], dlse_of(p, s, head, query)};
}
// Those of a step, [4][kStep]. Called: what its addresses need is not taken from the sums.
template <int kStep>
GK_DEVICE_COLD void load_factors(const FlashAttentionParams& p, Sequence s, int head, int at, int threads, float* to) {
  for (int i = threadIdx.x; i < kStep; i += threads) {
    const RowFactors row = row_factors(p, s, head, at + i);
    to[i] = row.max;
    to[kStep + i] = row.inverse;
    to[2 * kStep + i] = row.delta;
    to[3 * kStep + i] = row.dlse;
  }
}
// dS of a pair in a step that may hide keys: see dlse_of.
GK_DEVICE float score_gradient(float probability, float dp, const RowFactors& f) {
  return f.inverse == 1.f && probability > 0.5f ? f.dlse : probability * (dp - f.delta);
}

template <class C>
struct BackwardBlock {
  using T = typename C::T;
  using Memory = TileMemory<T, C::kDim>;
  static constexpr int kColumns = C::kStep / 8, kOut = C::kDim / 8;

  const FlashAttentionParams& p;
  const Tile t;
  const bool values;  // without kBoth: the sums are dV's
  char* const memory;
  float unit;
  float sum[1][kOut][4], value_sum[1][C::kBoth ? kOut : 1][4];
  RowFactors row[2];  // of queries: of this thread's two

  GK_DEVICE BackwardBlock(const FlashAttentionParams& p, const Tile& t, bool values, char* memory)
      : p(p), t(t), values(values), memory(memory), unit(unit_of_exponent(p)) {}

  GK_DEVICE Memory a(int which) const { return {reinterpret_cast<T*>(memory) + which * C::kRows * C::kDim}; }
  GK_DEVICE char* stage(int n) const { return memory + C::kRowBytes + n % C::kStages * C::kStageBytes; }
  GK_DEVICE Memory b(int n, int which) const { return {reinterpret_cast<T*>(stage(n)) + which * C::kStep * C::kDim}; }
  // Of the queries of a step: [4][kStep] of RowFactors.
  GK_DEVICE float* factors(int n) const {
    return reinterpret_cast<float*>(stage(n) + 2 * C::kStep * C::kDim * int(sizeof(T)));
  }
  GK_DEVICE static int warp_row() { return int(threadIdx.x) / 32 * 16; }
  GK_DEVICE static int g() { return int(threadIdx.x) % 32 / 4; }
  GK_DEVICE int row_at(int half) const { return t.begin + warp_row() + 8 * half + g(); }

  // Columns [at, at + kStep) of step n.
  GK_DEVICE void load_step(int n, int head, int at) const {
    const Sequence& s = t.sequence;
    const HeadsView &first = C::kOfKeys ? p.q : p.k, &second = C::kOfKeys ? p.dout : p.v;
    const int64_t token = (C::kOfKeys ? s.query_begin : s.key_begin) + at;
    const int count = (C::kOfKeys ? s.queries : s.keys) - at;
    load_tile<C::kStep, C::kThreads, C::kCopies>(b(n, 0), first, s.batch, token, head, count, int(p.head_dim));
    load_tile<C::kStep, C::kThreads, C::kCopies>(b(n, 1), second, s.batch, token, head, count, int(p.value_dim));
    if constexpr (C::kOfKeys) load_factors<C::kStep>(p, s, head, at, C::kThreads, factors(n));
    copy_async_commit();
  }

  GK_DEVICE RowFactors factors_at(int n, int column) const {
    const float* of_step = factors(n) + column;
    return {of_step[0], of_step[C::kStep], of_step[2 * C::kStep], of_step[3 * C::kStep]};
  }

  // C to P and D to dS, in place.
  GK_DEVICE void differentiate(float (&c)[1][kColumns][4], float (&d)[1][kColumns][4], int n, int at, bool full) const {
    const Sequence& s = t.sequence;
    int first[2], last[2];
    if constexpr (!C::kOfKeys) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        first[half] = first_key(p, s, row_at(half));
        last[half] = last_key(p, s, row_at(half));
      }
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + int(threadIdx.x) % 4 * 2 + e;
        RowFactors of_column;
        if constexpr (C::kOfKeys) {
          of_column = factors_at(n, column);
          if (!full) {
            first[0] = first_key(p, s, at + column);
            last[0] = last_key(p, s, at + column);
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float &x = c[0][j][2 * half + e], &y = d[0][j][2 * half + e];
          const RowFactors& f = C::kOfKeys ? of_column : row[half];
          x = exp2_approx((x - f.max) * unit) * f.inverse;
          if (full) {
            y = x * (y - f.delta);
            continue;
          }
          const int key = C::kOfKeys ? row_at(half) : at + column;
          const bool seen = first[C::kOfKeys ? 0 : half] <= key && key <= last[C::kOfKeys ? 0 : half];
          y = seen ? score_gradient(x, y, f) : 0.f;
          if (!seen) x = 0;
        }
      }
  }

  // The same with all that a score may have more, one element at a time in columns of shared memory; d is multiplied by
  // the slope of the softcap.
  GK_DEVICE void differentiate_modified(float (&c)[1][kColumns][4], float (&d)[1][kColumns][4], int n, int head,
                                        int at) const {
    const Sequence& s = t.sequence;
    float* mine = reinterpret_cast<float*>(memory + C::kRowBytes + C::kStages * C::kStageBytes) + threadIdx.x;
    float* mine_too = mine + C::kRows * C::kStep;
#pragma unroll
    for (int i = 0; i < 4 * kColumns; ++i) {
      mine[i * C::kThreads] = c[0][i / 4][i % 4];
      mine_too[i * C::kThreads] = d[0][i / 4][i % 4];
    }
    const Scores scores(p, s, head);
    const bool modified = scores_are_modified(p);
#pragma unroll 1
    for (int i = 0; i < 4 * kColumns; ++i) {
      const int half = i % 4 / 2, column = i / 4 * 8 + int(threadIdx.x) % 4 * 2 + i % 2;
      const int query = C::kOfKeys ? at + column : row_at(half), key = C::kOfKeys ? row_at(half) : at + column;
      float x = -kAttentionInfinity, y = 0, cap = 1;
      if (query < s.queries && first_key(p, s, query) <= key && key <= last_key(p, s, query)) {
        x = mine[i * C::kThreads];
        if (modified) x = scores.modify(p, x, query, key, cap);
      }
      if (x == -kAttentionInfinity) {
        x = 0;
      } else {
        RowFactors f = half ? row[1] : row[0];  // no index: it would move row out of registers
        if constexpr (C::kOfKeys) f = factors_at(n, column);
        const float factor = p.dropout_p > 0 ? simt::dropout_of(p, s, head, query, key) : 1.f;
        x = exp2_approx((x - f.max) * unit) * f.inverse;
        y = cap * score_gradient(x, factor * mine_too[i * C::kThreads], f);
        x *= factor;
      }
      mine[i * C::kThreads] = x;
      mine_too[i * C::kThreads] = y;
    }
#pragma unroll
    for (int i = 0; i < 4 * kColumns; ++i) {
      c[0][i / 4][i % 4] = mine[i * C::kThreads];
      d[0][i / 4][i % 4] = mine_too[i * C::kThreads];
    }
  }

  // The sums over all visible columns. `finite`: with zeros in the place of NaN and infinities where P and dS multiply.
  GK_DEVICE void attend(bool finite) {
    const Sequence& s = t.sequence;
    clear(sum);
    clear(value_sum);
    const Visit visit = C::kOfKeys ? queries_to_visit(p, s, t.begin, t.count, C::kStep)
                                   : keys_to_visit(p, s, t.begin, t.count, C::kStep);
    if (visit.begin >= visit.end) return;
    const HeadsView &first = C::kOfKeys ? p.k : p.q, &second = C::kOfKeys ? p.v : p.dout;
    const int64_t token = (C::kOfKeys ? s.key_begin : s.query_begin) + t.begin;
    load_tile<C::kRows, C::kThreads, C::kCopies>(a(0), first, s.batch, token, t.head, t.count, int(p.head_dim));
    load_tile<C::kRows, C::kThreads, C::kCopies>(a(1), second, s.batch, token, t.head, t.count, int(p.value_dim));
    if constexpr (!C::kOfKeys) {
#pragma unroll
      for (int half = 0; half < 2; ++half) row[half] = row_factors(p, s, t.head, row_at(half));
    }
    const int group = int(p.group), steps = (visit.end - visit.begin + C::kStep - 1) / C::kStep;
    const int all = C::kOfKeys ? group * steps : steps;
    const auto head_of = [&](int n) { return C::kOfKeys ? t.head * group + n / steps : t.head / group; };
    const auto column_of = [&](int n) { return visit.begin + n % steps * C::kStep; };
    load_step(0, head_of(0), column_of(0));
#pragma unroll 1
    for (int n = 0; n < all; ++n) {
      copy_async_wait<0>();
      __syncthreads();  // this step is there, and the one before is read
      if (C::kStages == 2 && n + 1 < all) load_step(n + 1, head_of(n + 1), column_of(n + 1));
      const int head = C::kOfKeys ? head_of(n) : t.head;
      float c[1][kColumns][4], d[1][kColumns][4];
      clear(c);
      clear(d);
      multiply_rows<1, C::kStep, C::kUnrolled>(c, a(0), warp_row(), b(n, 0), 0);
      multiply_rows<1, C::kStep, C::kUnrolled>(d, a(1), warp_row(), b(n, 1), 0);
      if constexpr (C::kExtras)
        differentiate_modified(c, d, n, head, column_of(n));
      else
        differentiate(c, d, n, column_of(n), visit.full(column_of(n)));
      if (finite) {
        __syncthreads();  // the products of b as it is are done
        make_finite<C::kStep, C::kThreads>(b(n, 0));
        make_finite<C::kStep, C::kThreads>(b(n, 1));
        __syncthreads();
      }
      uint32_t left[1][kColumns / 2][4];
      if (C::kBoth || !values) {
        round_to<T>(left, d);
        multiply_columns<C::kStep, C::kDim>(sum, left, b(n, 0), 0, 0);
      }
      if constexpr (C::kOfKeys) {
        round_to<T>(left, c);
        if constexpr (C::kBoth)
          multiply_columns<C::kStep, C::kDim>(value_sum, left, b(n, 1), 0, 0);
        else if (values)
          multiply_columns<C::kStep, C::kDim>(sum, left, b(n, 1), 0, 0);
      }
      if (C::kStages == 1 && n + 1 < all) {
        __syncthreads();
        load_step(n + 1, head_of(n + 1), column_of(n + 1));
      }
    }
    __syncthreads();
  }

  GK_DEVICE bool sums_are_finite() const { return all_finite(sum) && (!C::kBoth || all_finite(value_sum)); }

  GK_DEVICE void store(const float (&from)[1][kOut][4], float by, const HeadsView& view, int64_t dims, int room) const {
    const int64_t token = (C::kOfKeys ? t.sequence.key_begin : t.sequence.query_begin) + t.begin;
    const float factor[1][2] = {{by, by}};
    store_rows<1, C::kDim>(from, factor, a(room), warp_row(), token_at<T>(view, t.sequence.batch, token, t.head),
                           view.token, view.dim, is_aligned<T>(view, dims), t.count, 0, int(dims));
  }
  GK_DEVICE void finish() const {
    if constexpr (!C::kOfKeys) {
      store(sum, float(p.scale), p.dq, p.head_dim, 0);
    } else {
      if (C::kBoth || !values) store(sum, float(p.scale), p.dk, p.head_dim, 0);
      if constexpr (C::kBoth)
        store(value_sum, 1.f, p.dv, p.value_dim, 1);
      else if (values)
        store(sum, 1.f, p.dv, p.value_dim, 1);
    }
  }
};

// NaN and infinities to the rows of a tile that see them.
template <class T>
GK_DEVICE_COLD void repair_gradients(const FlashAttentionParams& p, const Tile& t, bool of_keys, int warps,
                                     float* room) {
  const int warp = int(threadIdx.x) / 32;
  for (int row = t.begin + warp; row < t.begin + t.count; row += warps)
    if (of_keys)
      simt::differentiate_key<T>(p, t.sequence, t.head, row, 0, true, room + 64 * warp);
    else
      simt::differentiate_row<T>(p, t.sequence, t.head, row, 0, true, room + 64 * warp);
}

template <class T>
GK_DEVICE_COLD void fill_tokens(const HeadsView& view, const Tile& t, int64_t token, int64_t dims, int threads) {
  for (int i = threadIdx.x; i < t.count; i += threads)
    for (int64_t d = 0; d < dims; ++d) token_at<T>(view, 0, token + t.begin + i, t.head)[d * view.dim] = T{0};
}

// Two blocks of 128 threads leave each thread 255 registers.
template <class C>
__global__ void __launch_bounds__(C::kThreads, 2)
    flash_attention_bwd_sm80_kernel(const __grid_constant__ FlashAttentionParams p) {
  using T = typename C::T;
  GK_SHARED(memory);
  const Tile t = C::kOfKeys ? key_tile_at(p, C::kRows, blockIdx.x) : row_tile_at(p, C::kRows, blockIdx.x);
  if (t.count == 0) return;
  if (!t.owned) {
    if (C::kOfKeys) {
      fill_tokens<T>(p.dk, t, t.sequence.key_begin, p.head_dim, C::kThreads);
      fill_tokens<T>(p.dv, t, t.sequence.key_begin, p.value_dim, C::kThreads);
    } else {
      fill_tokens<T>(p.dq, t, t.sequence.query_begin, p.head_dim, C::kThreads);
    }
    return;
  }
  BackwardBlock<C> block(p, t, blockIdx.y == 1, memory);
  bool dirty = false;
#pragma unroll 1
  for (int pass = 0; pass == 0 || (pass == 1 && dirty); ++pass) {
    block.attend(dirty);
    dirty = hides_within_tiles(p) && (dirty || __syncthreads_or(!block.sums_are_finite()));
  }
  block.finish();
  if (!dirty) return;
  __syncthreads();  // the rows are written, and their staging is read
  repair_gradients<T>(p, t, C::kOfKeys, C::kWarps, reinterpret_cast<float*>(memory));
}

template <class C>
cudaError_t launch_backward_part(const FlashAttentionParams& p, cudaStream_t stream) {
  const int64_t tiles = C::kOfKeys ? key_tiles(p, C::kRows) : row_tiles(p, C::kRows);
  if (tiles == 0) return cudaSuccess;
  const dim3 grid(unsigned(tiles), C::kOfKeys && !C::kBoth ? 2 : 1);
  return launch(flash_attention_bwd_sm80_kernel<C>, grid, C::kThreads, C::kSharedBytes, stream, p);
}
template <class T, int kDim, bool kExtras>
cudaError_t launch_backward(const FlashAttentionParams& p, cudaStream_t stream) {
  const cudaError_t error = launch_backward_part<Backward<T, kDim, kExtras, true>>(p, stream);
  return error == cudaSuccess ? launch_backward_part<Backward<T, kDim, kExtras, false>>(p, stream) : error;
}

template <class T>
cudaError_t launch_backward_of(const FlashAttentionParams& p, cudaStream_t stream) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (scores_are_modified(p) || p.dropout_p > 0)
    return dim <= 64    ? launch_backward<T, 64, true>(p, stream)
           : dim <= 128 ? launch_backward<T, 128, true>(p, stream)
                        : launch_backward<T, 256, true>(p, stream);
  return dim <= 64    ? launch_backward<T, 64, false>(p, stream)
         : dim <= 128 ? launch_backward<T, 128, false>(p, stream)
                      : launch_backward<T, 256, false>(p, stream);
}

}  // namespace genai_kernels::sm80
