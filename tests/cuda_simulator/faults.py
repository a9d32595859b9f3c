"""Planted faults of the CUDA kernels: each must be caught by the simulator or by a wrong result.

A fault is one edit of a file of csrc. The file it concerns, or for a header one that includes it, is compiled again
from a copy of csrc, linked with the objects of the simulator's library, and judged: `checks.py judge OPS`, or another
of its checks. tests/test_cuda_simulator.py runs the `daily` ones every day, all of them with `pytest -m slow`.
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
    Fault(
        "wrong lanes in a shuffle",
        REDUCE,
        "x[k] += __shfl_xor_sync(~0u, x[k], offset);\n    if (size",
        "x[k] += __shfl_xor_sync(~0u, x[k], min(offset, 8));\n    if (size",
        RMS,
        judge("rms_norm"),
    ),
    Fault(
        "a step of a sum is missing",
        REDUCE,
        "int offset = within / 2; offset > 0",
        "int offset = within / 2; offset > 1",
        LAYER,
        judge("layer_norm"),
    ),
    Fault("one buffer for all sums", REDUCE, "    turn ^= 1;\n", "", LAYER, ("repeat", "layer_norm")),
    Fault("the last warp is not summed", REDUCE, "lane < warps ?", "lane < warps - 1 ?", RMS, judge("rms_norm")),
    Fault(
        "threads of a short row leave early",
        ROWS,
        "  const View x = view(p.x), residual",
        "  if (length == 0) return;\n  const View x = view(p.x), residual",
        RMS,
        judge("rms_norm"),
    ),
    # ---- vectors and rows ----
    Fault(
        "a vector too many",
        VECTORS,
        "v[j] = at < length ? Vector<T>::of",
        "v[j] = at <= length ? Vector<T>::of",
        RMS,
        (),
        guarded=True,
        daily=True,
    ),
    Fault(
        "an element too many",
        VECTORS,
        "if (at + i < length) last.set_raw",
        "if (at + i <= length) last.set_raw",
        RMS,
        (),
        guarded=True,
    ),
    Fault(
        "an element written too many",
        VECTORS,
        "i < kPer && at + i < length; ++i",
        "i < kPer && at + i <= length; ++i",
        LAYER,
        (),
        guarded=True,
    ),
    Fault(
        "16 bytes at once from any address",
        VECTORS,
        "reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&",
        "reinterpret_cast<uintptr_t>(rows.data) % 2 == 0 &&",
        RMS,
        ("layouts", "rms_norm"),
    ),
    Fault(
        "the pitch of rows is not looked at",
        VECTORS,
        "rows.stride[d] * bytes_of_element % 16 == 0",
        "rows.stride[d] * bytes_of_element % 2 == 0",
        RMS,
        ("layouts", "rms_norm"),
    ),
    Fault(
        "halves of a word exchanged",
        VECTORS,
        "return to_float(T{uint16_t(word[i / 2] >> 16 * (i % 2))});",
        "return to_float(T{uint16_t(word[i / 2] >> 16 * (1 - i % 2))});",
        RMS,
        judge("rms_norm"),
    ),
    Fault(
        "the outer dimensions in the wrong order",
        VECTORS,
        "for (int d = rows.dims - 1; d >= 0; --d) {\n    const uint32_t",
        "for (int d = 0; d < rows.dims; ++d) {\n    const uint32_t",
        RMS,
        judge("rms_norm"),
    ),
    # ---- norms ----
    Fault(
        "elements beyond the row in the variance",
        ROWS,
        ": i < left ? (tile(k, i) - center) * scale : 0;",
        ": (tile(k, i) - center) * scale;",
        LAYER,
        judge("layer_norm"),
        daily=True,
    ),
    Fault(
        "the weight of the next vector",
        ROWS,
        "static_cast<const T*>(p.data) + vector * kPer));",
        "static_cast<const T*>(p.data) + (vector ? vector - 1 : 0) * kPer));",
        RMS,
        ("lengths", "rms_norm", "16400"),
    ),
    Fault(
        "a held weight of the wrong place",
        ROWS,
        "w[i] = v[kHeld ? j : 0][i];",
        "w[i] = v[0][i];",
        RMS,
        judge("rms_norm"),
    ),
    Fault(
        "squares are not rescued",
        ROWS,
        "return sum_of_squares < 0x1p126 ? 1.0f : 0x1p-96f;",
        "return 1.0f;",
        RMS,
        judge("rms_norm"),
    ),
    Fault(
        "eps outside of the root",
        ROWS,
        "reciprocal_root((variance < 0 ? 0 : variance) + p.eps)",
        "reciprocal_root(variance < 0 ? 0 : variance) + p.eps",
        RMS,
        judge("rms_norm"),
    ),
    Fault(
        "the rounding of the mean is lost",
        ROWS,
        "float((center - mean) * exact_rstd)",
        "0.0f",
        LAYER,
        judge("layer_norm"),
    ),
    Fault(
        "the sum is rounded before the norm",
        ROWS,
        "    return v[j][i] + w[sizeof(T) == 4 ? 0 : j][i];",
        "    return to_float(from_float<T>(v[j][i] + w[sizeof(T) == 4 ? 0 : j][i]));",
        FUSED,
        judge("fused_add_rms_norm"),
    ),
    Fault(
        "vectors are not passed on",
        VECTORS,
        "  v[kVectors - 1] = first;",
        "  v[kVectors - 1] = v[0];",
        RMS,
        ("lengths", "rms_norm", "16400"),
    ),
    # ---- norms, backward ----
    Fault(
        "the last row of a block is left out",
        BACKWARD,
        "begin < blocks.end(block); begin +=",
        "begin < blocks.end(block) - 1; begin +=",
        RMS,
        judge("rms_norm"),
        daily=True,
    ),
    Fault(
        "a block begins a row late",
        BACKWARD,
        "int64_t begin = blocks.begin(block); begin",
        "int64_t begin = blocks.begin(block) + (block > 0); begin",
        RMS,
        judge("rms_norm"),
    ),
    Fault("column sums are not cleared", BACKWARD, "if (dw) sum_dw.clear();", "", RMS, judge("rms_norm")),
    Fault(
        "dw and db in the same place",
        BACKWARD,
        "(dw ? Columns::bytes(blockDim.x) : 0)",
        "0",
        LAYER,
        judge("layer_norm"),
    ),
    Fault("the first group of rows only", BACKWARD, "g < group.count(); ++g", "g < 1; ++g", RMS, judge("rms_norm")),
    Fault(
        "no barrier before the groups are added",
        BACKWARD,
        "if (group.count() > 1) __syncthreads();",
        "",
        RMS,
        judge("rms_norm"),
    ),
    Fault(
        "the mean of g is forgotten",
        BACKWARD,
        "__fadd_rn(__fmul_rn(d, w[i]), -mean_g)",
        "__fmul_rn(d, w[i])",
        LAYER,
        judge("layer_norm"),
    ),
    Fault(
        "rest of the mean in the pull",
        BACKWARD,
        "sums[1] * unscale - rest * sum_g",
        "sums[1] * unscale + 1e6 * rest * sum_g",
        LAYER,
        judge("layer_norm"),
    ),
    Fault(
        "the gradient of the sum is dropped",
        BACKWARD,
        "__fadd_rn(own, dsum(j, i)) : own",
        "own : own",
        FUSED,
        judge("fused_add_rms_norm"),
    ),
    Fault(
        "a slice of blocks is left out",
        SUM_BLOCKS,
        "for (int s = 1; s < kSlices; ++s)",
        "for (int s = 1; s < kSlices - 1; ++s)",
        SUM_BLOCKS,
        judge("rms_norm"),
    ),
    Fault("no barrier between the slices", SUM_BLOCKS, "  __syncthreads();\n", "", SUM_BLOCKS, judge("rms_norm")),
    # ---- gated activations ----
    Fault(
        "gate and factor exchanged",
        GATED,
        "RowView<T>(p.dx, at.row, wide, n, n).store(at.column, rounded<T>(dup))",
        "RowView<T>(p.dx, at.row, wide, n, n).store(at.column, rounded<T>(dgate))",
        GATED,
        judge("silu_and_mul"),
    ),
    Fault(
        "a row further",
        GATED,
        "if (at.row >= p.y.count) return;",
        "if (at.row > p.y.count) return;",
        GATED,
        (),
        guarded=True,
    ),
    # ---- rotary ----
    Fault(
        "the angle of the wrong pair",
        ROTARY,
        "load_table<T, kPer>(p.sin, p.table_dtype, row, first,",
        "load_table<T, kPer>(p.sin, p.table_dtype, row, first ? first - 1 : 0,",
        ROTARY,
        judge("rotary_embedding"),
        daily=True,
    ),
    Fault(
        "a position is not checked",
        ROTARY,
        "known = row >= 0 && row < p.cos.count;",
        "known = row < p.cos.count;",
        ROTARY,
        judge("rotary_embedding"),
    ),
    Fault(
        "the last head is left out",
        ROTARY,
        "if (head >= p.heads) break;",
        "if (head >= p.heads - 1) break;",
        ROTARY,
        judge("rotary_embedding"),
    ),
    # ---- merging ----
    Fault(
        "weights are read before they are there",
        MERGE,
        "  group.sum(dot);\n  __syncthreads();",
        "  group.sum(dot);",
        MERGE,
        judge("merge_attention_states"),
        daily=True,
    ),
    Fault(
        "heads and tokens exchanged",
        MERGE,
        "head * values.head + token * values.token",
        "head * values.token + token * values.head",
        MERGE,
        judge("merge_attention_states"),
    ),
    Fault(
        "an empty side is looked at",
        MERGE,
        "Vector<T> out = w.a_empty ? b : a;",
        "Vector<T> out = a;",
        MERGE,
        judge("merge_attention_states"),
    ),
]
