// Flash attention backward on Hopper, deterministic: every sum belongs to one warpgroup and is taken in a fixed order. So
// there are two kernels, and both compute S and dP: one goes over the queries for a tile of keys and keeps dK and dV
// in registers, the other over the keys for a tile of queries and keeps dQ. That is seven products instead of five; to
// add dQ up in memory, in an order, would make the blocks wait for each other, and cost 8 bytes of traffic for each
// product of a float that they do not have to move.
//
//     dkv   S^T = K Q^T    dP^T = V dO^T    P^T = exp(S^T - lse)    dS^T = P^T (dP^T - delta)    dV += P^T dO    dK += dS^T Q
//     dq    S = Q K^T      dP = dO V^T      ...                                                                  dQ += dS K
//
// The rows of a product lie in registers as its left operand must, so that nothing but the inputs goes through shared
// memory. Calls whose scores are modified, and dropout, are left to the sm_80 kernels.
#pragma once
#include "ops/flash_attention/sm90.cuh"

namespace genai_kernels::sm90 {

struct BackwardArguments {
  CUtensorMap q, k, v, dout;
  FlashAttentionParams p;
};

// What a row of queries brings to P and dS.
struct QueryState {
  float max, inverse, delta, dlse;
};
// p.softmax_state is given: the arithmetic that does without it takes registers that a producer does not have.
GK_DEVICE QueryState query_state(const FlashAttentionParams& p, const Sequence& s, int head, int query) {
  if (query >= s.queries) return {kAttentionInfinity, 0, 0, 0};
  const int64_t row = s.row(p, head, query);
  const float2 state = reinterpret_cast<const float2*>(p.softmax_state)[row];
  if (state.x == -kAttentionInfinity) return {kAttentionInfinity, 0, 0, 0};  // no key: every P is 0
  return {state.x, state.y, reinterpret_cast<const float*>(p.delta)[row], dlse_of(p, s, head, query)};
}
GK_DEVICE float probability(float product, const QueryState& state, float unit) {
  return exp2_approx((product - state.max) * unit) * state.inverse;
}

// ---- dK and dV of a tile of keys ----

// Registers of a consumer thread: kDim of dK and dV, 2 x kBlockM / 2 of S and dP, kBlockM / 4 of an operand, of 240. Beyond
// dim 128 they are too many: there both warpgroups have the same 64 keys, the first keeps dV and the second dK, and
// both compute S (kSplit). Shared memory: (2 kBlockN + 4 kBlockM) kDim elements.
template <int kDim>
struct KeyGradientShape {
  static constexpr bool kSplit = kDim > 128;
  static constexpr int kBlockN = kSplit ? 64 : 64 * kConsumers;
  static constexpr int kBlockM = 64;
  static constexpr int kStages = 2;
};
template <int kDim>
struct KeyGradientStorage {
  using Shape = KeyGradientShape<kDim>;
  SharedTile<Shape::kBlockN, kDim> k, v;
  SharedTile<Shape::kBlockM, kDim> q[Shape::kStages], dout[Shape::kStages];
  QueryState state[Shape::kStages][Shape::kBlockM];
  uint64_t kv_full, full[Shape::kStages], empty[Shape::kStages];
  int repeat;
  float room[kWarps][64];
};

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    flash_attention_dkv_sm90_kernel(const __grid_constant__ BackwardArguments arguments) {
  using Shape = KeyGradientShape<kDim>;
  using Storage = KeyGradientStorage<kDim>;
  constexpr int kBlockM = Shape::kBlockM, kStages = Shape::kStages;
  static_assert(sizeof(Storage) <= 227 * 1024);
  GK_SHARED(raw);
  Storage& shared = *reinterpret_cast<Storage*>(raw);

  const FlashAttentionParams& p = arguments.p;
  const Tile tile = key_tile_at(p, Shape::kBlockN, blockIdx.x);
  const Sequence& s = tile.sequence;
  if (tile.count <= 0) return;
  const Visit visit = tile.owned ? queries_to_visit(p, s, tile.begin, tile.count, kBlockM) : Visit{0, 0, 0, 0};
  const int group = int(p.group), first_head = tile.head * group;
  const int steps = (visit.end - visit.begin + kBlockM - 1) / kBlockM;  // of each head

  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    barrier_init(&shared.kv_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&shared.full[stage], 2);  // TMA and the warp that loads the states
      barrier_init(&shared.empty[stage], kWarps);
    }
    barrier_init_fence();
    shared.repeat = first_verdict(p);
  }
  __syncthreads();

  if (warpgroup == kConsumers) {  // ---- producers: one warp for the tiles, one for the states of the queries ----
    decrease_registers<kProducerRegisters>();
    const int warp = threadIdx.x % 128 / 32;
    if (warp >= 2) return;
    // Every step of a pass, once the consumers have given its stage back.
    RingPosition<kStages> at;
    const auto for_each_step = [&](bool waits, const auto& load) {
      for (int head = first_head; head < first_head + group; ++head)
        for (int query = visit.begin; query < visit.end; query += kBlockM, at = at.next()) {
          if (waits) barrier_wait(&shared.empty[at.stage], at.phase ^ 1);
          load(head, query, &shared.full[at.stage]);
        }
    };
    for (bool again = false;; again = true) {
      if (warp == 0) {
        const int batch = p.cu_k ? 0 : s.batch;
        if (lane == 0 && steps > 0 && !again) {
          barrier_arrive_expect(&shared.kv_full, 2 * shared.k.kBytes);
          shared.k.load(&arguments.k, &shared.kv_full, int(s.key_begin) + tile.begin, tile.head, batch);
          shared.v.load(&arguments.v, &shared.kv_full, int(s.key_begin) + tile.begin, tile.head, batch);
        }
        for_each_step(lane == 0, [&](int head, int query, uint64_t* full) {
          if (lane != 0) return;
          barrier_arrive_expect(full, 2 * shared.q[0].kBytes);
          shared.q[at.stage].load(&arguments.q, full, int(s.query_begin) + query, head, batch);
          shared.dout[at.stage].load(&arguments.dout, full, int(s.query_begin) + query, head, batch);
        });
      } else {
        for_each_step(true, [&](int head, int query, uint64_t* full) {
#pragma unroll 1
          for (int i = lane; i < kBlockM; i += 32) shared.state[at.stage][i] = query_state(p, s, head, query + i);
          __syncwarp();
          if (lane == 0) barrier_arrive(full);
        });
      }
      if (again || shared.repeat < 0) return;
      __syncwarp();
      named_barrier_sync<128 * kConsumers + 64>(kVerdict);
      if (shared.repeat == 0) return;
    }
  }

  // ---- a consumer: 64 keys ----
  increase_registers<kConsumerRegisters>();
  const int begin = Shape::kSplit ? 0 : warpgroup * 64;  // of this warpgroup's keys within the tile
  const int row0 = begin + first_row();                  // and row0 + 8
  const float unit = float(p.scale) * kLog2e;
  Place<true> place{tile.begin + row0, 0, {0, 0}, {-1, -1}};
  for (int h = 0; h < 2; ++h) {
    if (row0 + 8 * h >= tile.count || steps == 0) continue;
    const Visit queries = queries_to_visit(p, s, tile.begin + row0 + 8 * h, 1, 1);
    place.first[h] = queries.begin;
    place.last[h] = queries.end - 1;
  }
  // All rows of the tile exist, and the window hides no query of a visited tile from them.
  const bool whole = tile.count == Shape::kBlockN;

  bool cleared = false;  // the second pass: Q and dO without NaN and infinities
  // kKeys: dK, kValues: dV. What is not wanted is of length 1.
  const auto consume = [&]<bool kKeys, bool kValues>() {
    float dk[kKeys ? kDim / 2 : 1], dv[kValues ? kDim / 2 : 1], scores[kBlockM / 2], dp[kKeys ? kBlockM / 2 : 1];
    uint32_t operand[kBlockM / 16][4];
    RingPosition<kStages> at;
    for (;;) {
#pragma unroll
      for (float& x : dk) x = 0;
#pragma unroll
      for (float& x : dv) x = 0;
      if (steps > 0) barrier_wait(&shared.kv_full, 0);
      for (int all = 0; all < group * steps; ++all, at = at.next()) {
        const int query = visit.begin + all % steps * kBlockM;
        const bool full = whole && visit.full(query);
        barrier_wait(&shared.full[at.stage], at.phase);
        if (cleared) {
          shared.q[at.stage].template clear_nonfinite<T>(threadIdx.x, 128 * kConsumers);
          shared.dout[at.stage].template clear_nonfinite<T>(threadIdx.x, 128 * kConsumers);
          named_barrier_sync<128 * kConsumers>(kConsumersMeet);
        }
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k)
          wgmma_shared<T, false>(scores, shared.k.along_columns(begin, k), shared.q[at.stage].along_columns(0, k),
                                 k != 0);
        wgmma_commit();
        if constexpr (kKeys) {
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < kDim / 16; ++k)
            wgmma_shared<T, false>(dp, shared.v.along_columns(begin, k), shared.dout[at.stage].along_columns(0, k),
                                   k != 0);
          wgmma_commit();
        }

        const QueryState* const states = shared.state[at.stage] + column_of(0);  // of register i: i / 4 * 8 + i % 2
        place.column = query + column_of(0);
        wgmma_wait<kKeys ? 1 : 0>();
        register_fence(scores);
#pragma unroll
        for (int i = 0; i < kBlockM / 2; ++i) {
          scores[i] = probability(scores[i], states[i / 4 * 8 + i % 2], unit);
          if (!full && !place.seen(i)) scores[i] = 0;
        }
        if constexpr (kValues) {
          pack_operand<T>(scores, operand);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < kBlockM / 16; ++k)
            wgmma_registers<T, true>(dv, operand[k], shared.dout[at.stage].along_rows(k), 1);
          wgmma_commit();
        }
        if constexpr (kKeys) {
          wgmma_wait<kValues ? 1 : 0>();  // dP is there; P^T dO goes on
          register_fence(dp);
#pragma unroll
          for (int i = 0; i < kBlockM / 2; ++i) {
            const QueryState& state = states[i / 4 * 8 + i % 2];
            dp[i] = scores[i] * (dp[i] - state.delta);
            if (!full) {
              if (scores[i] == 1.f) dp[i] = state.dlse;  // score.cuh: dlse_of
              if (!place.seen(i)) dp[i] = 0;
            }
          }
          if constexpr (kValues) {
            wgmma_wait<0>();
            register_fence(dv);
          }
          pack_operand<T>(dp, operand);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < kBlockM / 16; ++k)
            wgmma_registers<T, true>(dk, operand[k], shared.q[at.stage].along_rows(k), 1);
          wgmma_commit();
        }
        wgmma_wait<0>();
        if constexpr (kKeys)
          register_fence(dk);
        else
          register_fence(dv);
        release(&shared.empty[at.stage]);
      }
      if (cleared || shared.repeat < 0) break;
      bool finite = true;
      const auto look_at = [&](const auto& sums) {
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i)
          finite = finite && (row0 + 8 * row_half(i) >= tile.count || sums[i] - sums[i] == 0);
      };
      if constexpr (kKeys) look_at(dk);
      if constexpr (kValues) look_at(dv);
      if (!finite) shared.repeat = 1;
      named_barrier_sync<128 * kConsumers + 64>(kVerdict);
      if (shared.repeat == 0) break;
      cleared = true;
    }

    const int64_t key_begin = s.key_begin + tile.begin + begin;
    const float by_scale[2] = {float(p.scale), float(p.scale)}, by_one[2] = {1, 1};
    if constexpr (kKeys)
      store_rows<T>(dk, by_scale, tile.count - begin, int(p.head_dim), p.dk.dim, in_16_bytes(p.dk, p.head_dim),
                    [&](int row) { return token_at<T>(p.dk, s.batch, key_begin + row, tile.head); });
    if constexpr (kValues)
      store_rows<T>(dv, by_one, tile.count - begin, int(p.value_dim), p.dv.dim, in_16_bytes(p.dv, p.value_dim),
                    [&](int row) { return token_at<T>(p.dv, s.batch, key_begin + row, tile.head); });
  };
  if constexpr (!Shape::kSplit)
    consume.template operator()<true, true>();
  else if (warpgroup == 0)
    consume.template operator()<false, true>();
  else
    consume.template operator()<true, false>();
  if (!cleared) return;
  named_barrier_sync<128 * kConsumers>(kConsumersMeet);  // what is repaired has been stored
  const int warp = threadIdx.x / 32;
  for (int row = warp; row < tile.count; row += kWarps)
    simt::differentiate_key<T>(p, s, tile.head, tile.begin + row, 0, true, shared.room[warp]);
}

// ---- dQ of a tile of queries ----

// Registers of a consumer thread: kDim / 2 of dQ, 2 x kBlockN / 2 of S and dP, kBlockN / 4 of dS. Shared memory:
// (2 kBlockM + 2 kStages kBlockN) kDim elements of 227 KiB.
template <int kDim>
struct QueryGradientShape {
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kBlockN = kDim <= 128 ? 96 : 64;
  static constexpr int kStages = kDim == 256 ? 1 : 2;
};
template <int kDim>
struct QueryGradientStorage {
  using Shape = QueryGradientShape<kDim>;
  SharedTile<Shape::kBlockM, kDim> q, dout;
  SharedTile<Shape::kBlockN, kDim> k[Shape::kStages], v[Shape::kStages];
  uint64_t q_full, full[Shape::kStages], empty[Shape::kStages];
  int repeat;
  float room[kWarps][64];
};

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    flash_attention_dq_sm90_kernel(const __grid_constant__ BackwardArguments arguments) {
  using Shape = QueryGradientShape<kDim>;
  using Storage = QueryGradientStorage<kDim>;
  constexpr int kBlockN = Shape::kBlockN, kStages = Shape::kStages;
  static_assert(sizeof(Storage) <= 227 * 1024);
  GK_SHARED(raw);
  Storage& shared = *reinterpret_cast<Storage*>(raw);

  const FlashAttentionParams& p = arguments.p;
  const Tile tile = row_tile_at(p, Shape::kBlockM, blockIdx.x);
  const Sequence& s = tile.sequence;
  if (tile.count <= 0) return;
  const Visit visit = tile.owned ? keys_to_visit(p, s, tile.begin, tile.count, kBlockN) : Visit{0, 0, 0, 0};
  const int steps = (visit.end - visit.begin + kBlockN - 1) / kBlockN;

  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    barrier_init(&shared.q_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], kWarps);
    }
    barrier_init_fence();
    shared.repeat = first_verdict(p);
  }
  __syncthreads();

  if (warpgroup == kConsumers) {  // ---- the producer ----
    decrease_registers<kProducerRegisters>();
    if (threadIdx.x % 128 >= 32) return;
    const int batch = p.cu_k ? 0 : s.batch, kv_head = tile.head / int(p.group);
    RingPosition<kStages> at;
    for (int pass = 0; pass < 2; ++pass) {
      if (lane == 0) {
        if (pass == 0 && steps > 0) {
          barrier_arrive_expect(&shared.q_full, 2 * shared.q.kBytes);
          shared.q.load(&arguments.q, &shared.q_full, int(s.query_begin) + tile.begin, tile.head, batch);
          shared.dout.load(&arguments.dout, &shared.q_full, int(s.query_begin) + tile.begin, tile.head, batch);
        }
        for (int step = 0; step < steps; ++step, at = at.next()) {
          const int token = int(s.key_begin) + visit.begin + step * kBlockN;
          uint64_t* const full = &shared.full[at.stage];
          barrier_wait(&shared.empty[at.stage], at.phase ^ 1);
          barrier_arrive_expect(full, 2 * shared.k[0].kBytes);
          shared.k[at.stage].load(&arguments.k, full, token, kv_head, batch);
          shared.v[at.stage].load(&arguments.v, full, token, kv_head, batch);
        }
      }
      if (pass == 1 || shared.repeat < 0) return;
      __syncwarp();
      named_barrier_sync<128 * kConsumers + 32>(kVerdict);
      if (shared.repeat == 0) return;
    }
    return;
  }

  // ---- a consumer: 64 queries ----
  increase_registers<kConsumerRegisters>();
  const int row0 = warpgroup * 64 + first_row();  // and row0 + 8, within the tile
  const float unit = float(p.scale) * kLog2e;
  Place<false> place{tile.begin + row0, 0, {0, 0}, {-1, -1}};
  QueryState states[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int query = tile.begin + row0 + 8 * h;
    states[h] = query_state(p, s, tile.head, query);
    if (row0 + 8 * h >= tile.count) continue;
    place.first[h] = first_key(p, s, query);
    place.last[h] = last_key(p, s, query);
  }

  float dq[kDim / 2], scores[kBlockN / 2], dp[kBlockN / 2];
  uint32_t operand[kBlockN / 16][4];
  RingPosition<kStages> at;
  bool cleared = false;  // the second pass: K without NaN and infinities
  for (;;) {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) dq[i] = 0;
    if (steps > 0) barrier_wait(&shared.q_full, 0);
    for (int step = 0; step < steps; ++step, at = at.next()) {
      const int key = visit.begin + step * kBlockN;
      const bool full = visit.full(key);
      barrier_wait(&shared.full[at.stage], at.phase);
      if (cleared) {
        shared.k[at.stage].template clear_nonfinite<T>(threadIdx.x, 128 * kConsumers);
        named_barrier_sync<128 * kConsumers>(kConsumersMeet);
      }
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k)
        wgmma_shared<T, false>(scores, shared.q.along_columns(warpgroup * 64, k),
                               shared.k[at.stage].along_columns(0, k), k != 0);
      wgmma_commit();
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k)
        wgmma_shared<T, false>(dp, shared.dout.along_columns(warpgroup * 64, k), shared.v[at.stage].along_columns(0, k),
                               k != 0);
      wgmma_commit();

      place.column = key + column_of(0);
      wgmma_wait<1>();
      register_fence(scores);
#pragma unroll
      for (int i = 0; i < kBlockN / 2; ++i) scores[i] = probability(scores[i], states[row_half(i)], unit);
      wgmma_wait<0>();
      register_fence(dp);
#pragma unroll
      for (int i = 0; i < kBlockN / 2; ++i) {
        const QueryState& state = states[row_half(i)];
        dp[i] = scores[i] * (dp[i] - state.delta);
        if (!full) {
          if (scores[i] == 1.f) dp[i] = state.dlse;  // score.cuh: dlse_of
          if (!place.seen(i)) dp[i] = 0;
        }
      }
      pack_operand<T>(dp, operand);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kBlockN / 16; ++k)
        wgmma_registers<T, true>(dq, operand[k], shared.k[at.stage].along_rows(k), 1);
      wgmma_commit();
      wgmma_wait<0>();
      register_fence(dq);
      release(&shared.empty[at.stage]);
    }
    if (cleared || shared.repeat < 0) break;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) finite = finite && (row0 + 8 * row_half(i) >= tile.count || dq[i] - dq[i] == 0);
    if (!finite) shared.repeat = 1;
    named_barrier_sync<128 * kConsumers + 32>(kVerdict);
    if (shared.repeat == 0) break;
    cleared = true;
  }

  const int64_t query_begin = s.query_begin + tile.begin + warpgroup * 64;
  const float by_scale[2] = {float(p.scale), float(p.scale)};
  store_rows<T>(dq, by_scale, tile.count - warpgroup * 64, int(p.head_dim), p.dq.dim, in_16_bytes(p.dq, p.head_dim),
                [&](int row) { return token_at<T>(p.dq, s.batch, query_begin + row, tile.head); });
  if (!cleared) return;
  __syncwarp();
  const int warp = threadIdx.x / 32;
  for (int row = warp * 16; row < warp * 16 + 16 && row < tile.count; ++row)
    simt::differentiate_row<T>(p, s, tile.head, tile.begin + row, 0, true, shared.room[warp]);
}

}  // namespace genai_kernels::sm90
