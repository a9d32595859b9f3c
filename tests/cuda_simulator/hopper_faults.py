"""Planted faults of the Hopper kernels of flash_attention, as those of faults.py; judged by hopper_checks.py."""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION = "csrc/ops/flash_attention/"
HOPPER_TILE = "csrc/cuda/hopper_tile.cuh"


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str  # occurs once in the file
    new: str
    check: str = "forward"  # of hopper_checks.py
    daily: bool = False

    @property
    def unit(self) -> str:
        return f"{ATTENTION}flash_attention_{'bwd' if self.check == 'backward' else 'fwd'}_sm90.cu"


FORWARD_90 = ATTENTION + "flash_attention_fwd_sm90.cuh"
BACKWARD_90 = ATTENTION + "flash_attention_bwd_sm90.cuh"
FRAGMENT_90 = ATTENTION + "fragment_sm90.cuh"

FAULTS = [
    # ---- copies and barriers ----
    Fault("K is not waited for", FORWARD_90,
          "        barrier_wait(&shared.k_full[next.stage], next.phase);\n", "", daily=True),
    Fault("V is not waited for", FORWARD_90, "        barrier_wait(&shared.v_full[at.stage], at.phase);\n", ""),
    Fault("Q is not waited for", FORWARD_90, "      barrier_wait(&shared.q_full, 0);\n", ""),
    Fault("a stage is filled before it is empty", FORWARD_90,
          "barrier_wait(&shared.k_empty[at.stage], at.phase ^ 1);  // in the first round, nothing is to be waited for",
          ""),
    Fault("the wrong phase of an empty stage", FORWARD_90, "barrier_wait(&shared.v_empty[at.stage], at.phase ^ 1);",
          "barrier_wait(&shared.v_empty[at.stage], at.phase);", daily=True),
    Fault("the phase of a ring never flips", HOPPER_TILE, "RingPosition{0, phase ^ 1}", "RingPosition{0, phase}"),
    Fault("a stage is never released", FORWARD_90, "        release(&shared.k_empty[next.stage]);\n", ""),
    Fault("a stage is released before its products are done", FORWARD_90,
          "        wgmma_wait<0>();\n        register_fence(output);\n        release(&shared.v_empty[at.stage]);",
          "        release(&shared.v_empty[at.stage]);\n        wgmma_wait<0>();\n        register_fence(output);"),
    Fault("too few bytes are expected", FORWARD_90,
          "&shared.v_full[at.stage], shared.v[0].kBytes", "&shared.v_full[at.stage], 64"),
    Fault("too many bytes are expected", FORWARD_90,
          "&shared.q_full, shared.q.kBytes", "&shared.q_full, 2 * shared.q.kBytes"),
    Fault("an arrival of each warpgroup is expected", FORWARD_90, "barrier_init(&shared.k_empty[stage], kWarps);",
          "barrier_init(&shared.k_empty[stage], kConsumers);"),
    Fault("no __syncthreads after the barriers are made", FORWARD_90, "  __syncthreads();\n", ""),
    Fault("no fence after the barriers are made", FORWARD_90, "    barrier_init_fence();\n", ""),
    Fault("a turn is given that nobody takes", FORWARD_90,
          "if (warpgroup == 0 || step > 0) give_turn();", "give_turn();"),
    Fault("the first turn is not given", FORWARD_90, "      if (warpgroup == 1 && steps > 1) give_turn();\n", ""),
    # ---- products ----
    Fault("scores are read before they are there", FORWARD_90,
          "        wgmma_wait<1>();  // S is there; P V goes on\n", "",
          daily=True),
    Fault("P is overwritten under its product", FORWARD_90,
          "        wgmma_wait<0>();\n        register_fence(output);\n        release(&shared.v_empty[at.stage]);\n"
          "        pack_operand<T>(scores, probabilities);\n",
          "        pack_operand<T>(scores, probabilities);\n"
          "        wgmma_wait<0>();\n        register_fence(output);\n        release(&shared.v_empty[at.stage]);\n"),
    Fault("no wgmma.fence", FORWARD_90, "const auto issue_output = [&](int stage) {\n    wgmma_fence();",
          "const auto issue_output = [&](int stage) {"),
    Fault("the wrong distance between boxes", HOPPER_TILE,
          "16 * k * kBox, kRows * kLine)", "16 * k * kBox, 8 * kLine)", daily=True),
    Fault("the wrong distance between groups of lines", HOPPER_TILE,
          "uint64_t(8 * kLine >> 4)", "uint64_t(4 * kLine >> 4)"),
    Fault("the wrong swizzle", HOPPER_TILE, "kSwizzle = kLine == 128 ? 1 : 2;", "kSwizzle = 1;"),
    Fault("the columns of a box twice", HOPPER_TILE,
          "row * kBox + column % kBox, 16)", "row * kBox + column % 32, 16)"),
    Fault("rows of V of the step before", HOPPER_TILE, "descriptor(elements + 16 * k * kBox, kRows",
          "descriptor(elements + 16 * (k ? k - 1 : 0) * kBox, kRows"),
    Fault("both warpgroups take the first queries", FORWARD_90, "shared.q.along_columns(warpgroup * 64, k)",
          "shared.q.along_columns(0, k)"),
    Fault("rows of a fragment exchanged", FRAGMENT_90, "int row_half(int i) { return i >> 1 & 1; }",
          "int row_half(int i) { return i & 1; }", daily=True),
    Fault("registers of an operand exchanged", FRAGMENT_90, "to[i / 4][i % 4] = pack", "to[i / 4][i % 4 ^ 1] = pack"),
    Fault("a quad's pieces in the wrong order", FRAGMENT_90, "const bool upper = threadIdx.x & distance;",
          "const bool upper = threadIdx.x & 1;"),
    # ---- attention ----
    Fault("the last key is hidden", FRAGMENT_90,
          "column_of(i) <= last[row_half(i)]", "column_of(i) < last[row_half(i)]"),
    Fault("the end of the keys is not hidden", FORWARD_90,
          "else if (!visit.full(key))", "else if (p.right >= 0 && !visit.full(key))"),
    Fault("O is not rescaled", FORWARD_90, "output[i] *= alpha[row_half(i)];", ";"),
    Fault("half a quad's sum", FRAGMENT_90, "return x + __shfl_xor_sync(~0u, x, 2);", "return x;"),
    Fault("the wrong word of dropout", FRAGMENT_90, "mine[e] = odd ? words[2 + e] : words[e];",
          "mine[e] = odd ? words[e] : words[2 + e];"),
    Fault("V is not cleared", FORWARD_90, "        if (cleared) clear_values(at);\n", "", "nonfinite"),
    Fault("NaN does not arrive", FORWARD_90, "simt::attend_row<T>(", "if (false) simt::attend_row<T>(", "nonfinite"),
    # ---- backward ----
    Fault("the states of the queries are not waited for", BACKWARD_90, "barrier_init(&shared.full[stage], 2);",
          "barrier_init(&shared.full[stage], 1);", "backward", daily=True),
    Fault("dP is read before it is there", BACKWARD_90,
          "          wgmma_wait<kValues ? 1 : 0>();  // dP is there; P^T dO goes on\n", "", "backward"),
    Fault("Q is released before dK is done", BACKWARD_90,
          "        wgmma_wait<0>();\n        if constexpr (kKeys)\n",
          "        release(&shared.empty[at.stage]);\n        wgmma_wait<0>();\n        if constexpr (kKeys)\n",
          "backward"),
    Fault("K is released before dQ is done", BACKWARD_90,
          "      wgmma_wait<0>();\n      register_fence(dq);\n      release(&shared.empty[at.stage]);\n",
          "      release(&shared.empty[at.stage]);\n      wgmma_wait<0>();\n      register_fence(dq);\n", "backward"),
    Fault("the state of the wrong query", BACKWARD_90,
          "shared.state[at.stage] + column_of(0);", "shared.state[at.stage];", "backward"),
    Fault("the window of the wrong key", BACKWARD_90, "queries_to_visit(p, s, tile.begin + row0 + 8 * h, 1, 1)",
          "queries_to_visit(p, s, tile.begin + row0, 1, 1)", "backward"),
    Fault("the scale of dQ is forgotten", BACKWARD_90,
          "store_rows<T>(dq, by_scale,", "store_rows<T>(dq, {1.f, 1.f},", "backward"),
]  # fmt: skip
