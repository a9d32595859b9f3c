"""What `explain` says of a call of attention: how it multiplies, what it skips, which passes it takes."""

from __future__ import annotations

from typing import Any

import torch

from ... import backends

_KERNELS = {
    "sm90": "sm_90a (TMA, wgmma)",
    "sm80": "sm_80 (cp.async, mma.sync)",
    "simt": "one warp for a row, in float32",
    "none": "no CUDA kernel in this build",
}


def _cuda_path(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: Any, cu_k: Any, **o: Any) -> str:
    """Which CUDA kernels serve: the host function's own answer."""
    left, right = o.get("window_size", (-1, -1))
    bias, mask = o.get("attn_bias"), o.get("attn_mask")
    major, minor = backends.capability_of(q.device)
    # dropout stands for itself by a probability: its state is drawn later
    state = torch.zeros(2, dtype=torch.int64) if o.get("dropout_p") else None
    slopes, sink = (None if t is None else t.float() for t in (o.get("alibi_slopes"), o.get("sink")))
    answer = torch.ops.genai_kernels.flash_attention_cuda_path(
        q, k, v, cu_q, cu_k, slopes, bias, mask, sink, state, left, 0 if o.get("causal") else right,
        o.get("softmax_scale"), o.get("softcap", 0.0), o.get("dropout_p", 0.0), 10 * major + minor,
    )  # fmt: skip
    parts = dict(part.split() for part in answer.split(", "))
    return "; ".join(f"{which}: {_KERNELS[name]}" for which, name in parts.items())


def _visible_share(queries: int, keys: int, left: int, right: int) -> float:
    """Of all pairs of a query and a key, those within the window."""
    if queries * keys == 0:
        return 0.0
    diagonal = torch.arange(queries) + keys - queries
    first = (diagonal - left).clamp(0, keys) if left >= 0 else torch.zeros_like(diagonal)
    end = (diagonal + right + 1).clamp(0, keys) if right >= 0 else torch.full_like(diagonal, keys)
    return (end - first).clamp_min(0).sum().item() / (queries * keys)


def _multiplies(q: torch.Tensor, dropout_p: float) -> str:
    if q.dtype == torch.float64:
        return "float64 multiply-adds, in the baseline's code whatever the instruction set"
    if q.dtype == torch.bfloat16 and torch.ops.genai_kernels.isa() == "avx512_bf16" and dropout_p == 0:
        return "dot products of bfloat16 pairs (vdpbf16ps), summed in float32; backward in float32"
    return "float32 multiply-adds"


def path(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, **o: Any
) -> str:
    """One line on the code path within the kernels."""
    if q.device.type == "cuda":
        return _cuda_path(q, k, v, cu_seqlens_q, cu_seqlens_k, **o)
    left, right = o.get("window_size", (-1, -1))
    right = 0 if o.get("causal") else right
    said = [_multiplies(q, o.get("dropout_p", 0.0))]
    if left < 0 and right < 0:
        said.append("every key is read")
    elif cu_seqlens_q is None:
        share = _visible_share(q.shape[1], k.shape[1], left, right)
        said.append(f"keys outside the window are skipped in whole groups: {share:.0%} of the scores are visible")
    else:
        said.append("keys outside the window of each sequence are skipped in whole groups")
    scale = o.get("softmax_scale")
    extra = ["softcap"] if o.get("softcap") else []
    extra += [name for name in ("alibi_slopes", "attn_bias", "attn_mask") if o.get(name) is not None]
    extra += ["softmax_scale <= 0"] if scale is not None and scale <= 0 else []
    said.append(f"a pass over the scores for {', '.join(extra)}" if extra else "softmax straight on the products")
    if o.get("dropout_p"):
        said.append("dropout's bits are drawn in the tile")
    pairs = (q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1) * k.shape[-2]
    threads = torch.get_num_threads()
    together = "in one pass" if pairs >= threads else f"apart, there being fewer key heads ({pairs}) than threads"
    said.append(f"backward computes the gradients of keys and queries {together}")
    return "; ".join(said)
