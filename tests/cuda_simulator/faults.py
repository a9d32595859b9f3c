"""Planted faults of the CUDA kernels: each must be caught by the simulator or by a wrong result.

A fault is one edit of a file of csrc. The file it concerns, or for a header one that includes it, is compiled again from
a copy of csrc, linked with the objects of the simulator's library, and judged: `checks.py judge OPS`, or another of its
checks. tests/test_cuda_simulator.py runs the `daily` ones every day, all of them with `pytest -m slow`.
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS = "csrc/cuda/norm_rows.cuh"
BACKWARD = "csrc/cuda/norm_rows_bwd.cuh"
REDUCE = "csrc/cuda/reduce.cuh"
VECTORS = "csrc/cuda/vectors.cuh"
RMS = "csrc/ops/rms_norm/rms_norm.cu"
FUSED = "csrc/ops/fused_add_rms_norm/fused_add_rms_norm.cu"
LAYER = "csrc/ops/layer_norm/layer_norm.cu"
GATED = "csrc/ops/gated_activations/gated_activations.cu"
ROTARY = "csrc/ops/rotary_embedding/rotary_embedding.cu"
MERGE = "csrc/ops/merge_attention_states/merge_attention_states.cu"
SUM_BLOCKS = "csrc/cuda/sum_blocks.cu"
ATTENTION = "csrc/ops/flash_attention/"
HOPPER_TILE = "csrc/cuda/hopper_tile.cuh"


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str  # occurs once in the file
    new: str
    unit: str  # the .cu file to compile again
    check: tuple[str, ...]  # what checks.py is told
    daily: bool = False
    guarded: bool = False  # judged with a guard page behind every tensor instead
    capability: int = 80  # of the card that is played


def judge(ops: str) -> tuple[str, ...]:
    return ("judge", ops)


FAULTS = [
    # ---- sums over threads ----
    Fault("no barrier in a sum over a block", REDUCE, "    __syncthreads();\n", "", RMS, judge("rms_norm"), daily=True),
    Fault("wrong lanes in a shuffle", REDUCE, "x[k] += __shfl_xor_sync(~0u, x[k], offset);\n    if (size",
          "x[k] += __shfl_xor_sync(~0u, x[k], offset | 1);\n    if (size", RMS, judge("rms_norm")),
    Fault("a step of a sum is missing", REDUCE, "int offset = within / 2; offset > 0", "int offset = within / 2; offset > 1",
          LAYER, judge("layer_norm")),
    Fault("one buffer for all sums", REDUCE, "    turn ^= 1;\n", "", LAYER, ("repeat", "layer_norm")),
    Fault("the last warp is not summed", REDUCE, "lane < warps ?", "lane < warps - 1 ?", RMS, judge("rms_norm")),
    Fault("threads of a short row leave early", ROWS, "  const View x = view(p.x), residual",
          "  if (length == 0) return;\n  const View x = view(p.x), residual", RMS, judge("rms_norm")),
    # ---- vectors and rows ----
    Fault("a vector too many", VECTORS, "v[j] = at < length ? Vector<T>::of", "v[j] = at <= length ? Vector<T>::of", RMS,
          (), guarded=True, daily=True),
    Fault("an element too many", VECTORS, "if (at + i < length) last.set_raw", "if (at + i <= length) last.set_raw", RMS,
          (), guarded=True),
    Fault("an element written too many", VECTORS, "i < kPer && at + i < length; ++i", "i < kPer && at + i <= length; ++i",
          LAYER, (), guarded=True),
    Fault("16 bytes at once from any address", VECTORS, "reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&",
          "reinterpret_cast<uintptr_t>(rows.data) % 2 == 0 &&", RMS, ("layouts", "rms_norm")),
    Fault("the pitch of rows is not looked at", VECTORS, "rows.stride[d] * bytes_of_element % 16 == 0",
          "rows.stride[d] * bytes_of_element % 2 == 0", RMS, ("layouts", "rms_norm")),
    Fault("halves of a word exchanged", VECTORS, "return to_float(T{uint16_t(word[i / 2] >> 16 * (i % 2))});",
          "return to_float(T{uint16_t(word[i / 2] >> 16 * (1 - i % 2))});", RMS, judge("rms_norm")),
    Fault("the outer dimensions in the wrong order", VECTORS, "for (int d = rows.dims - 1; d >= 0; --d) {\n    const uint32_t",
          "for (int d = 0; d < rows.dims; ++d) {\n    const uint32_t", RMS, judge("rms_norm")),
    # ---- norms ----
    Fault("elements beyond the row in the variance", ROWS, ": i < left ? (tile(k, i) - center) * scale : 0;",
          ": (tile(k, i) - center) * scale;", LAYER, judge("layer_norm"), daily=True),
    Fault("the weight of the next vector", ROWS, "static_cast<const T*>(p.data) + vector * kPer));",
          "static_cast<const T*>(p.data) + (vector ? vector - 1 : 0) * kPer));", LAYER, judge("layer_norm")),
    Fault("a held weight of the wrong place", ROWS, "w[i] = v[kHeld ? j : 0][i];", "w[i] = v[0][i];", RMS, judge("rms_norm")),
    Fault("squares are not rescued", ROWS, "return sum_of_squares < 0x1p126 ? 1.0f : 0x1p-96f;", "return 1.0f;", RMS,
          judge("rms_norm")),
    Fault("eps outside of the root", ROWS, "reciprocal_root((variance < 0 ? 0 : variance) + p.eps)",
          "reciprocal_root(variance < 0 ? 0 : variance) + p.eps", RMS, judge("rms_norm")),
    Fault("the rounding of the mean is lost", ROWS, "float((center - mean) * exact_rstd)", "0.0f", LAYER,
          judge("layer_norm")),
    Fault("the sum is rounded before the norm", ROWS, "    return v[j][i] + w[sizeof(T) == 4 ? 0 : j][i];",
          "    return to_float(from_float<T>(v[j][i] + w[sizeof(T) == 4 ? 0 : j][i]));", FUSED, judge("fused_add_rms_norm")),
    Fault("vectors are not passed on", VECTORS, "  v[kVectors - 1] = first;", "  v[kVectors - 1] = v[0];", RMS,
          ("lengths", "rms_norm", "16400")),
    # ---- norms, backward ----
    Fault("the last row of a block is left out", BACKWARD, "begin < blocks.end(block); begin +=",
          "begin < blocks.end(block) - 1; begin +=", RMS, judge("rms_norm"), daily=True),
    Fault("blocks of rows overlap", BACKWARD, "Index length = row < blocks.end(block) ?", "Index length = row < p.x.count ?",
          RMS, judge("rms_norm")),
    Fault("column sums are not cleared", BACKWARD, "if (dw) sum_dw.clear();", "", RMS, judge("rms_norm")),
    Fault("dw and db in the same place", BACKWARD, "(dw ? Columns::bytes(blockDim.x) : 0)", "0", LAYER, judge("layer_norm")),
    Fault("the first group of rows only", BACKWARD, "g < group.count(); ++g", "g < 1; ++g", RMS, judge("rms_norm")),
    Fault("no barrier before the groups are added", BACKWARD, "if (group.count() > 1) __syncthreads();", "", RMS,
          judge("rms_norm")),
    Fault("the mean of g is forgotten", BACKWARD, "__fadd_rn(__fmul_rn(d, w[i]), -mean_g)", "__fmul_rn(d, w[i])", LAYER,
          judge("layer_norm")),
    Fault("rest of the mean in the pull", BACKWARD, "sums[1] * unscale - rest * sum_g", "sums[1] * unscale + 1e6 * rest * sum_g",
          LAYER, judge("layer_norm")),
    Fault("the gradient of the sum is dropped", BACKWARD, "__fadd_rn(own, dsum(j, i)) : own", "own : own", FUSED,
          judge("fused_add_rms_norm")),
    Fault("a slice of blocks is left out", SUM_BLOCKS, "for (int s = 1; s < kSlices; ++s)", "for (int s = 1; s < kSlices - 1; ++s)",
          SUM_BLOCKS, judge("rms_norm")),
    Fault("no barrier between the slices", SUM_BLOCKS, "  __syncthreads();\n", "", SUM_BLOCKS, judge("rms_norm")),
    # ---- gated activations ----
    Fault("gate and factor exchanged", GATED, "RowView<T>(p.dx, at.row, wide, n, n).store(at.column, rounded<T>(dup))",
          "RowView<T>(p.dx, at.row, wide, n, n).store(at.column, rounded<T>(dgate))", GATED, judge("silu_and_mul")),
    Fault("a row further", GATED, "if (at.row >= p.y.count) return;", "if (at.row > p.y.count) return;", GATED, (),
          guarded=True),
    # ---- rotary ----
    Fault("the angle of the wrong pair", ROTARY, "load_table<T, kPer>(p.sin, p.table_dtype, row, first,",
          "load_table<T, kPer>(p.sin, p.table_dtype, row, first ? first - 1 : 0,", ROTARY, judge("rotary_embedding"), daily=True),
    Fault("a position is not checked", ROTARY, "known = row >= 0 && row < p.cos.count;", "known = row < p.cos.count;",
          ROTARY, judge("rotary_embedding")),
    Fault("the last head is left out", ROTARY, "if (head >= p.heads) break;", "if (head >= p.heads - 1) break;", ROTARY,
          judge("rotary_embedding")),
    # ---- merging ----
    Fault("weights are read before they are there", MERGE, "  group.sum(dot);\n  __syncthreads();", "  group.sum(dot);", MERGE,
          judge("merge_attention_states"), daily=True),
    Fault("heads and tokens exchanged", MERGE, "head * values.head + token * values.token",
          "head * values.token + token * values.head", MERGE, judge("merge_attention_states")),
    Fault("an empty side is looked at", MERGE, "if (w.a_empty || w.b_empty) return w;", "", MERGE,
          judge("merge_attention_states")),
]  # fmt: skip


def hopper(name: str, file: str, old: str, new: str, check: str = "forward", daily: bool = False) -> Fault:
    unit = f"{ATTENTION}flash_attention_{'bwd' if check == 'backward' else 'fwd'}_sm90.cu"
    return Fault(name, file, old, new, unit, ("hopper", check), daily, capability=90)


FORWARD_90 = ATTENTION + "flash_attention_fwd_sm90.cuh"
BACKWARD_90 = ATTENTION + "flash_attention_bwd_sm90.cuh"
FRAGMENT_90 = ATTENTION + "fragment_sm90.cuh"

FAULTS += [
    # ---- Hopper: copies and barriers ----
    hopper("K is not waited for", FORWARD_90,
           "        barrier_wait(&shared.k_full[next.stage], next.phase);\n", "", daily=True),
    hopper("V is not waited for", FORWARD_90, "        barrier_wait(&shared.v_full[at.stage], at.phase);\n", ""),
    hopper("Q is not waited for", FORWARD_90, "      barrier_wait(&shared.q_full, 0);\n", ""),
    hopper("a stage is filled before it is empty", FORWARD_90,
           "barrier_wait(&shared.k_empty[at.stage], at.phase ^ 1);  // in the first round, nothing is to be waited for",
           ""),
    hopper("the wrong phase of an empty stage", FORWARD_90, "barrier_wait(&shared.v_empty[at.stage], at.phase ^ 1);",
           "barrier_wait(&shared.v_empty[at.stage], at.phase);", daily=True),
    hopper("the phase of a ring never flips", HOPPER_TILE, "RingPosition{0, phase ^ 1}", "RingPosition{0, phase}"),
    hopper("a stage is never released", FORWARD_90, "        release(&shared.k_empty[next.stage]);\n", "", daily=True),
    hopper("a stage is released before its products are done", FORWARD_90,
           "        wgmma_wait<0>();\n        register_fence(output);\n        release(&shared.v_empty[at.stage]);",
           "        release(&shared.v_empty[at.stage]);\n        wgmma_wait<0>();\n        register_fence(output);"),
    hopper("too few bytes are expected", FORWARD_90,
           "&shared.v_full[at.stage], shared.v[0].kBytes", "&shared.v_full[at.stage], 64"),
    hopper("too many bytes are expected", FORWARD_90,
           "&shared.q_full, shared.q.kBytes", "&shared.q_full, 2 * shared.q.kBytes"),
    hopper("an arrival of each warpgroup is expected", FORWARD_90, "barrier_init(&shared.k_empty[stage], kWarps);",
           "barrier_init(&shared.k_empty[stage], kConsumers);"),
    hopper("no __syncthreads after the barriers are made", FORWARD_90, "  __syncthreads();\n", ""),
    hopper("no fence after the barriers are made", FORWARD_90, "    barrier_init_fence();\n", ""),
    hopper("a turn is given that nobody takes", FORWARD_90,
           "if (warpgroup == 0 || step > 0) give_turn();", "give_turn();"),
    hopper("the first turn is not given", FORWARD_90, "      if (warpgroup == 1 && steps > 1) give_turn();\n", ""),
    # ---- Hopper: products ----
    hopper("scores are read before they are there", FORWARD_90,
           "        wgmma_wait<1>();  // S is there; P V goes on\n", "",
           daily=True),
    hopper("P is overwritten under its product", FORWARD_90,
           "        wgmma_wait<0>();\n        register_fence(output);\n        release(&shared.v_empty[at.stage]);\n"
           "        pack_operand<T>(scores, probabilities);\n",
           "        pack_operand<T>(scores, probabilities);\n"
           "        wgmma_wait<0>();\n        register_fence(output);\n        release(&shared.v_empty[at.stage]);\n"),
    hopper("no wgmma.fence", FORWARD_90, "const auto issue_output = [&](int stage) {\n    wgmma_fence();",
           "const auto issue_output = [&](int stage) {"),
    hopper("the wrong distance between boxes", HOPPER_TILE,
           "16 * k * kBox, kRows * kLine)", "16 * k * kBox, 8 * kLine)", daily=True),
    hopper("the wrong distance between groups of lines", HOPPER_TILE,
           "uint64_t(8 * kLine >> 4)", "uint64_t(4 * kLine >> 4)"),
    hopper("the wrong swizzle", HOPPER_TILE, "kSwizzle = kLine == 128 ? 1 : 2;", "kSwizzle = 1;"),
    hopper("the columns of a box twice", HOPPER_TILE,
           "row * kBox + column % kBox, 16)", "row * kBox + column % 32, 16)"),
    hopper("rows of V of the step before", HOPPER_TILE, "descriptor(elements + 16 * k * kBox, kRows",
           "descriptor(elements + 16 * (k ? k - 1 : 0) * kBox, kRows"),
    hopper("both warpgroups take the first queries", FORWARD_90, "shared.q.along_columns(warpgroup * 64, k)",
           "shared.q.along_columns(0, k)"),
    hopper("rows of a fragment exchanged", FRAGMENT_90, "int row_half(int i) { return i >> 1 & 1; }",
           "int row_half(int i) { return i & 1; }", daily=True),
    hopper("registers of an operand exchanged", FRAGMENT_90, "to[i / 4][i % 4] = pack", "to[i / 4][i % 4 ^ 1] = pack"),
    hopper("a quad's pieces in the wrong order", FRAGMENT_90, "const bool upper = threadIdx.x & distance;",
           "const bool upper = threadIdx.x & 1;"),
    # ---- Hopper: attention ----
    hopper("the last key is hidden", FRAGMENT_90,
           "column_of(i) <= last[row_half(i)]", "column_of(i) < last[row_half(i)]", daily=True),
    hopper("the end of the keys is not hidden", FORWARD_90,
           "else if (!visit.full(key))", "else if (p.right >= 0 && !visit.full(key))"),
    hopper("O is not rescaled", FORWARD_90, "output[i] *= alpha[row_half(i)];", ";"),
    hopper("half a quad's sum", FRAGMENT_90, "return x + __shfl_xor_sync(~0u, x, 2);", "return x;"),
    hopper("the wrong word of dropout", FRAGMENT_90, "mine[e] = odd ? words[2 + e] : words[e];",
           "mine[e] = odd ? words[e] : words[2 + e];"),
    hopper("V is not cleared", FORWARD_90, "        if (cleared) clear_values(at);\n", "", "nonfinite"),
    hopper("NaN does not arrive", FORWARD_90, "simt::attend_row<T>(", "if (false) simt::attend_row<T>(", "nonfinite"),
    # ---- Hopper: backward ----
    hopper("the states of the queries are not waited for", BACKWARD_90, "barrier_init(&shared.full[stage], 2);",
           "barrier_init(&shared.full[stage], 1);", "backward", daily=True),
    hopper("dP is read before it is there", BACKWARD_90,
           "          wgmma_wait<kValues ? 1 : 0>();  // dP is there; P^T dO goes on\n", "", "backward"),
    hopper("Q is released before dK is done", BACKWARD_90,
           "        wgmma_wait<0>();\n        if constexpr (kKeys)\n",
           "        release(&shared.empty[at.stage]);\n        wgmma_wait<0>();\n        if constexpr (kKeys)\n",
           "backward"),
    hopper("K is released before dQ is done", BACKWARD_90,
           "      wgmma_wait<0>();\n      register_fence(dq);\n      release(&shared.empty[at.stage]);\n",
           "      release(&shared.empty[at.stage]);\n      wgmma_wait<0>();\n      register_fence(dq);\n", "backward"),
    hopper("the state of the wrong query", BACKWARD_90,
           "shared.state[at.stage] + column_of(0);", "shared.state[at.stage];", "backward"),
    hopper("the window of the wrong key", BACKWARD_90, "queries_to_visit(p, s, tile.begin + row0 + 8 * h, 1, 1)",
           "queries_to_visit(p, s, tile.begin + row0, 1, 1)", "backward"),
    hopper("the scale of dQ is forgotten", BACKWARD_90,
           "store_rows<T>(dq, by_scale,", "store_rows<T>(dq, {1.f, 1.f},", "backward"),
]  # fmt: skip
