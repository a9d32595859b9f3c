// Flash attention forward on Hopper. A block attends for kBlockM queries of one head: one thread of a warp loads Q once and
// K and V tile by tile through rings of two (TMA), two warpgroups of 64 queries each multiply (wgmma).
//
// Two overlaps keep the tensor cores busy while exponentials are computed. Within a warpgroup, S = Q K^T of the next tile
// and O += P V of the current one are under way together, and the softmax of the next runs under the latter. Between
// the warpgroups, named barriers let one issue its products only after the other has issued its own ("ping-pong"), so
// that the softmax of one falls under the products of the other.
//
// Head dims are those of the tile, 64 to 256; TMA fills what a tensor lacks with zeros. Keys go from the last tile to
// the first: the masked tiles of a causal call come first, where no product waits for them.
#pragma once
#include "ops/flash_attention/sm90.cuh"

namespace genai_kernels::sm90 {

// Registers of a consumer thread: kDim / 2 of O, kBlockN / 2 of S, kBlockN / 4 of P, of 240. Shared memory: (kBlockM + 4
// kBlockN) kDim elements of 227 KiB. Both allow 128 keys up to dim 128, 96 for 192 and 80 for 256. What modifies a score
// (kExtras) wants registers beside, and takes longer than the products anyway: 64 keys, or 32.
template <int kDim, bool kExtras>
struct ForwardShape {
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kBlockN = kExtras ? (kDim <= 128 ? 64 : 32) : kDim <= 128 ? 128 : kDim == 192 ? 96 : 80;
  static constexpr int kStages = 2;
};
template <int kDim, bool kExtras>
struct ForwardStorage {
  using Shape = ForwardShape<kDim, kExtras>;
  SharedTile<Shape::kBlockM, kDim> q;
  SharedTile<Shape::kBlockN, kDim> k[Shape::kStages], v[Shape::kStages];
  uint64_t q_full, k_full[Shape::kStages], k_empty[Shape::kStages], v_full[Shape::kStages], v_empty[Shape::kStages];
  int repeat;
  float room[kWarps][32];  // for simt::attend_row
};

struct ForwardArguments {
  CUtensorMap q, k, v;
  FlashAttentionParams p;
};

// The running softmax of a thread's two rows.
struct RowSoftmax {
  float max[2] = {-kAttentionInfinity, -kAttentionInfinity}, sum[2] = {0, 0};  // sum: this thread's part

  // Scores to probabilities, in place. `alpha`: the factor for what was summed under the old maximum.
  template <int kRegisters>
  GK_DEVICE void step(float (&s)[kRegisters], float unit, float (&alpha)[2]) {
    float most[2] = {max[0], max[1]}, origin[2];
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) most[row_half(i)] = fmaxf(most[row_half(i)], s[i]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      most[h] = quad_max(most[h]);
      origin[h] = most[h] == -kAttentionInfinity ? 0.f : most[h];  // no key yet: keeps -inf - -inf out
      alpha[h] = exp2_approx((max[h] - origin[h]) * unit);
      max[h] = most[h];
      sum[h] *= alpha[h];
    }
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
      s[i] = exp2_approx((s[i] - origin[row_half(i)]) * unit);
      sum[row_half(i)] += s[i];
    }
  }
};

// kExtras: scores that are modified, and dropout.
template <class T, int kDim, bool kExtras>
__global__ void __launch_bounds__(kThreads, 1)
    flash_attention_fwd_sm90_kernel(const __grid_constant__ ForwardArguments arguments) {
  using Shape = ForwardShape<kDim, kExtras>;
  using Storage = ForwardStorage<kDim, kExtras>;
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
      barrier_init(&shared.k_full[stage], 1);
      barrier_init(&shared.v_full[stage], 1);
      barrier_init(&shared.k_empty[stage], kWarps);
      barrier_init(&shared.v_empty[stage], kWarps);
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
          barrier_arrive_expect(&shared.q_full, shared.q.kBytes);
          shared.q.load(&arguments.q, &shared.q_full, int(s.query_begin) + tile.begin, tile.head, batch);
        }
        for (int step = steps - 1; step >= 0; --step, at = at.next()) {
          const int token = int(s.key_begin) + visit.begin + step * kBlockN;
          barrier_wait(&shared.k_empty[at.stage], at.phase ^ 1);  // in the first round, nothing is to be waited for
          barrier_arrive_expect(&shared.k_full[at.stage], shared.k[0].kBytes);
          shared.k[at.stage].load(&arguments.k, &shared.k_full[at.stage], token, kv_head, batch);
          barrier_wait(&shared.v_empty[at.stage], at.phase ^ 1);
          barrier_arrive_expect(&shared.v_full[at.stage], shared.v[0].kBytes);
          shared.v[at.stage].load(&arguments.v, &shared.v_full[at.stage], token, kv_head, batch);
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
  const float unit = kExtras ? unit_of_exponent(p) : float(p.scale) * kLog2e;
  const bool modified = kExtras && scores_are_modified(p);
  const Scores extra(p, s, tile.head);
  int first[2], last[2];  // the keys that the two rows see
  for (int h = 0; h < 2; ++h) {
    const int query = tile.begin + row0 + 8 * h;
    const bool exists = row0 + 8 * h < tile.count;
    first[h] = exists ? first_key(p, s, query) : s.keys;
    last[h] = exists ? last_key(p, s, query) : -1;
  }

  float scores[kBlockN / 2], output[kDim / 2], alpha[2];
  uint32_t probabilities[kBlockN / 16][4];
  RowSoftmax softmax;

  // S = Q K^T
  const auto issue_scores = [&](int stage) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k)
      wgmma_shared<T, false>(scores, shared.q.along_columns(warpgroup * 64, k), shared.k[stage].along_columns(0, k),
                             k != 0);
    wgmma_commit();
  };
  // O += P V
  const auto issue_output = [&](int stage) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockN / 16; ++k)
      wgmma_registers<T, true>(output, probabilities[k], shared.v[stage].along_rows(k), 1);
    wgmma_commit();
  };
  const auto score_and_softmax = [&](int step) {
    const int key = visit.begin + step * kBlockN;
    const Place<false> place{tile.begin + row0, key + column_of(0), {first[0], first[1]}, {last[0], last[1]}};
    if (modified)
      modify_tile<false>(p, extra, place, scores, nullptr);
    else if (!visit.full(key))
      hide(place, scores);
    softmax.step(scores, unit, alpha);
    if constexpr (kExtras)
      if (p.dropout_p > 0) drop_rows(p, s.batch, tile.head, tile.begin + row0, key, scores);
  };
  const auto take_turn = [&] { named_barrier_sync<256>(kFirstTurn + warpgroup); };
  const auto give_turn = [&] { named_barrier_arrive<256>(kFirstTurn + (warpgroup ^ 1)); };
  static_assert(kConsumers == 2);

  RingPosition<kStages> at;
  bool cleared = false;  // the second pass: V without NaN and infinities
  const auto clear_values = [&](const RingPosition<kStages>& of) {
    barrier_wait(&shared.v_full[of.stage], of.phase);
    shared.v[of.stage].template clear_nonfinite<T>(threadIdx.x, 128 * kConsumers);
    named_barrier_sync<128 * kConsumers>(kConsumersMeet);
  };
  for (;;) {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) output[i] = 0;
    softmax = RowSoftmax();
    if (steps > 0) {
      barrier_wait(&shared.q_full, 0);
      barrier_wait(&shared.k_full[at.stage], at.phase);
      issue_scores(at.stage);
      wgmma_wait<0>();
      register_fence(scores);
      release(&shared.k_empty[at.stage]);
      score_and_softmax(steps - 1);
      pack_operand<T>(scores, probabilities);
      if (warpgroup == 1 && steps > 1) give_turn();

      for (int step = steps - 2; step >= 0; --step) {
        const RingPosition<kStages> next = at.next();
        if (cleared) clear_values(at);
        barrier_wait(&shared.k_full[next.stage], next.phase);
        take_turn();
        issue_scores(next.stage);
        barrier_wait(&shared.v_full[at.stage], at.phase);
        issue_output(at.stage);
        if (warpgroup == 0 || step > 0) give_turn();  // as often as it is taken

        wgmma_wait<1>();  // S is there; P V goes on
        register_fence(scores);
        release(&shared.k_empty[next.stage]);
        score_and_softmax(step);
        wgmma_wait<0>();
        register_fence(output);
        release(&shared.v_empty[at.stage]);
        pack_operand<T>(scores, probabilities);
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) output[i] *= alpha[row_half(i)];
        at = next;
      }
      if (cleared) clear_values(at);
      barrier_wait(&shared.v_full[at.stage], at.phase);
      issue_output(at.stage);
      wgmma_wait<0>();
      register_fence(output);
      release(&shared.v_empty[at.stage]);
      at = at.next();
    }
    if (cleared || shared.repeat < 0) break;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i)
      finite = finite && (row0 + 8 * row_half(i) >= tile.count || output[i] - output[i] == 0);
    if (!finite) shared.repeat = 1;
    named_barrier_sync<128 * kConsumers + 32>(kVerdict);
    if (shared.repeat == 0) break;
    cleared = true;
  }

  // ---- sums to results ----
  float factor[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float total = quad_sum(softmax.sum[h]);
    const RowEnd end = tile.owned ? end_of_row(p, tile.head, softmax.max[h], total) : RowEnd{0.f, 0.f, 0.};
    factor[h] = end.total == 0 ? 0.f : end.beside_sink / end.total;
    const int row = row0 + 8 * h;
    if (row < tile.count && threadIdx.x % 4 == 0)
      store_row_state(p, s.row(p, tile.head, tile.begin + row), softmax.max[h], end);
  }
  const int64_t query_begin = s.query_begin + tile.begin + warpgroup * 64;
  store_rows<T>(output, factor, tile.count - warpgroup * 64, int(p.value_dim), p.out.dim,
                in_16_bytes(p.out, p.value_dim),
                [&](int row) { return token_at<T>(p.out, s.batch, query_begin + row, tile.head); });
  if (!cleared) return;
  __syncwarp();
  const int warp = threadIdx.x / 32;
  for (int row = warp * 16; row < warp * 16 + 16 && row < tile.count; ++row)
    simt::attend_row<T>(p, s, tile.head, tile.begin + row, 0, true, shared.room[warp]);
}

}  // namespace genai_kernels::sm90
