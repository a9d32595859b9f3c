"""`F.scaled_dot_product_attention` on this library's attention, on a CPU, for the length of a block.

    from genai_kernels.integrations import sdpa

    with sdpa.enabled() as report:
        loss = model(x)
        loss.backward()
    print(report)

Two operators of PyTorch are replaced through its registration of flash implementations, `torch.nn.attention.
register_flash_attention_impl`: the fused CPU attention with its backward, and the composition ("math") that PyTorch
falls back to for what its fused kernel refuses: dropout, a value dimension of its own, a mask with a gradient.
Importing this module activates nothing.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from genai_kernels.ops.flash_attention import flash_attention

__all__ = ["Report", "enabled"]

_NAME = "genai_kernels"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_math = torch.ops.aten._scaled_dot_product_attention_math.default


@dataclass(eq=False)
class Report:
    """The calls of one block, by what they were: those served here, and those passed on to PyTorch, with the reason."""

    served: Counter[str] = field(default_factory=Counter)
    passed_on: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = []
        for title, calls in (("served by genai_kernels", self.served), ("passed on to PyTorch", self.passed_on)):
            lines += [f"calls of scaled_dot_product_attention {title}: {sum(calls.values())}"]
            lines += [f"{count:8}  {what}" for what, count in calls.most_common()]
        return "\n".join(lines)


_lock = threading.Lock()
_reports: list[Report] = []  # of the blocks that are open, in every thread


@contextlib.contextmanager
def enabled() -> Iterator[Report]:
    """Routes `F.scaled_dot_product_attention` on CPU tensors to `genai_kernels.flash_attention` inside the block.

    For the whole process, and undone at its end, by an exception too; blocks may be nested. Training, GQA, masks,
    `is_causal`, `scale` and dropout work as documented by PyTorch, and so does a graph made by torch.compile, in which
    the fused operator takes whichever implementation is active when it runs. `nn.MultiheadAttention` and
    `nn.TransformerEncoderLayer` in eval mode call the function too: their fast path, which does not, is off inside the
    block. A flash implementation that another library has activated is put back afterwards.

    Not seen: `nn.MultiheadAttention` with `need_weights=True` (it composes its own), empty and nested tensors,
    other devices.
    Passed on, and counted with the reason: what torch.compile traces as the composition, `sdpa_kernel` without
    `FLASH_ATTENTION`, forward-mode derivatives, tensor subclasses, shapes that need broadcasting over heads.

    Yields:
        The `Report` of the calls made while the block is open.

    Raises:
        NotImplementedError: a torch without `torch.nn.attention.register_flash_attention_impl`.

    >>> import torch
    >>> from genai_kernels.integrations import sdpa
    >>> q = k = v = torch.ones(1, 2, 4, 8)
    >>> with sdpa.enabled() as report:
    ...     y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> print(report)
    calls of scaled_dot_product_attention served by genai_kernels: 1
           1  float32, 2 heads, head_dim 8, causal
    calls of scaled_dot_product_attention passed on to PyTorch: 0
    """
    if not _available():
        raise NotImplementedError(
            "genai_kernels.integrations.sdpa.enabled: expected a torch with torch.nn.attention."
            f"register_flash_attention_impl (2.13 has it), got {torch.__version__}; call genai_kernels.flash_attention"
        )
    attention, mha = torch.nn.attention, torch.backends.mha
    report = Report()
    with _lock:
        if not _reports:
            _before["impl"], _before["fast path"] = attention.current_flash_attention_impl(), mha.get_fastpath_enabled()
            attention.activate_flash_attention_impl(_NAME)
            mha.set_fastpath_enabled(False)
        _reports.append(report)
    try:
        yield report
    finally:
        with _lock:
            _reports.remove(report)
            if not _reports:
                mha.set_fastpath_enabled(_before["fast path"])
                if attention.current_flash_attention_impl() == _NAME:
                    attention.restore_flash_attention_impl()
                    if _before["impl"] is not None:
                        attention.activate_flash_attention_impl(_before["impl"])


_before: dict = {}  # what the outermost block found, and puts back


class _Registration:
    """What torch.nn.attention asks for: its life is that of the replacement."""

    def __init__(self) -> None:
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():  # PyTorch warns of any replaced kernel, once
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            library.impl("_scaled_dot_product_flash_attention_for_cpu", _forward, "CPU")
            library.impl("_scaled_dot_product_flash_attention_for_cpu_backward", _backward, "CPU")
            # a composite operator: with and without autograd
            library.impl("_scaled_dot_product_attention_math", _composition, "AutogradCPU")
            library.impl("_scaled_dot_product_attention_math", _composition, "CPU")
        self.library: torch.library.Library | None = library

    def remove(self) -> None:
        self.library = None


def _available() -> bool:
    return hasattr(torch.nn.attention, "register_flash_attention_impl")


if (
    _available()
):  # registered, not active: `torch.nn.attention.activate_flash_attention_impl("genai_kernels")` works too
    torch.nn.attention.register_flash_attention_impl(_NAME, register_fn=_Registration)


def _count(which: str, what: str) -> None:
    with _lock:
        for report in _reports:
            getattr(report, which)[what] += 1


def _description(query, key, value, attn_mask, dropout_p, is_causal) -> str:
    """What tells calls apart, but for their lengths, of which there may be many."""
    heads, kv_heads, dim, value_dim = query.shape[-3], key.shape[-3], query.shape[-1], value.shape[-1]
    return (
        f"{str(query.dtype).removeprefix('torch.')}, {heads} heads"
        + (f" on {kv_heads}" if kv_heads != heads else "")
        + f", head_dim {dim}"
        + (f" to {value_dim}" if value_dim != dim else "")
        + (", causal" if is_causal else "")
        + (", mask" if attn_mask is not None else "")
        + (f", dropout {dropout_p:g}" if dropout_p else "")
    )


def _visible(queries: int, keys: int, is_causal: bool) -> tuple[int, tuple[int, int]]:
    """How many keys any query sees, and the window among them.

    `is_causal` is aligned at the top left: query i sees the keys up to i. Windows are aligned at the bottom right:
    query i sees the keys up to `i + keys - queries + right`. Keys that no query sees are left out first.
    """
    if not is_causal:
        return keys, (-1, -1)
    keys = min(keys, queries)
    return keys, (-1, queries - keys)


def _bias(attn_mask: torch.Tensor | None, keys: int, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask to be added, in four dimensions and a dtype that flash_attention takes."""
    if attn_mask is None:
        return None
    mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    mask = mask if mask.dtype in (dtype, torch.float32) else mask.to(dtype)
    return mask if mask.shape[-1] == 1 else mask[..., :keys]


def _laid_out_like(query: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """PyTorch gives out the strides of the query, and compiled graphs rely on it."""
    expected = torch.empty_like(query) if out.shape == query.shape else None
    return out if expected is None or expected.stride() == out.stride() else expected.copy_(out)


def _forward(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    """aten::_scaled_dot_product_flash_attention_for_cpu, below autograd: `[batch, heads, tokens, dim]`."""
    if dropout_p:
        raise NotImplementedError(
            f"genai_kernels.integrations.sdpa: dropout_p: expected 0 in PyTorch's fused operator, got {dropout_p}; "
            f"F.scaled_dot_product_attention takes another path"
        )
    keys, window = _visible(query.shape[2], key.shape[2], is_causal)
    q, k, v = query.transpose(1, 2), key[:, :, :keys].transpose(1, 2), value[:, :, :keys].transpose(1, 2)
    bias = _bias(attn_mask, keys, query.dtype)
    out, lse = flash_attention(q, k, v, window_size=window, softmax_scale=scale, attn_bias=bias, return_lse=True)
    _count("served", _description(query, key, value, attn_mask, 0.0, is_causal))
    # as PyTorch's own: lse 0 for a row that sees no key, tokens before heads in memory. Either backward may follow.
    lse = lse.masked_fill_(lse == float("-inf"), 0).transpose(1, 2).contiguous().transpose(1, 2)
    return _laid_out_like(query, out.transpose(1, 2)), lse


def _backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None):
    """aten::_scaled_dot_product_flash_attention_for_cpu_backward, after either implementation's forward."""
    keys, (left, right) = _visible(query.shape[2], key.shape[2], is_causal)
    d_out, q, k, v, o = (t.transpose(1, 2) for t in (grad_out, query, key[:, :, :keys], value[:, :, :keys], out))
    dq, *dkv = torch.ops.genai_kernels.flash_attention_bwd(
        dout=d_out, dlse=None, q=q, k=k, v=v, out=o, lse=logsumexp.contiguous(), softmax_state=None, cu_seqlens_q=None,
        cu_seqlens_k=None, alibi_slopes=None, attn_bias=_bias(attn_mask, keys, query.dtype), attn_mask=None, sink=None,
        rng_state=None, window_left=left, window_right=right, softcap=0.0, dropout_p=0.0, bias_grad=False,
        softmax_scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )[:3]  # fmt: skip
    unseen = key.shape[2] - keys
    if unseen:
        dkv = [torch.nn.functional.pad(d, (0, 0, 0, 0, 0, unseen)) for d in dkv]
    _count("served", "backward of " + _description(query, key, value, attn_mask, 0.0, is_causal))
    return tuple(d.transpose(1, 2) for d in (dq, *dkv))


def _composition(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, dropout_mask=None, *, scale=None,
    enable_gqa=False,
):  # fmt: skip
    """aten::_scaled_dot_product_attention_math, what PyTorch's fused operator refuses, differentiated by our op."""
    reason = _why_not(query, key, value, attn_mask, dropout_p, is_causal, dropout_mask)
    if reason is None:
        q, k, v = (t.unsqueeze(1) if t.dim() == 3 else t for t in (query, key, value))
        reason = _why_not_these_shapes(q, k, v, enable_gqa)
    if reason is not None:
        _count("passed_on", reason)
        return _math.decompose(
            query, key, value, attn_mask, dropout_p, is_causal, dropout_mask, scale=scale, enable_gqa=enable_gqa
        )
    keys, window = _visible(q.shape[2], k.shape[2], is_causal)
    if attn_mask is not None and query.dim() == 3 and attn_mask.dim() == 3:
        attn_mask = attn_mask.unsqueeze(1)
    masks = {"attn_mask" if attn_mask.dtype == torch.bool else "attn_bias": attn_mask} if attn_mask is not None else {}
    if "attn_bias" in masks:
        masks["attn_bias"] = _bias(attn_mask, keys, query.dtype)
    out: Any = flash_attention(
        q.transpose(1, 2),
        k[:, :, :keys].transpose(1, 2),
        v[:, :, :keys].transpose(1, 2),
        window_size=window,
        softmax_scale=scale,
        dropout_p=dropout_p,
        **masks,
    )
    out = out.transpose(1, 2)
    _count("served", _description(q, k, v, attn_mask, dropout_p, is_causal))
    # The operator's second result, the probabilities, does not exist here; F.scaled_dot_product_attention drops it. For
    # whoever calls the operator itself it is NaN, which nobody can take for probabilities.
    nothing = query.new_full((), float("nan")).expand(*out.shape[:-1], k.shape[2])
    out = _laid_out_like(q, out)
    return (out, nothing) if query.dim() == 4 else (out.squeeze(1), nothing.squeeze(1))


def _why_not(query, key, value, attn_mask, dropout_p, is_causal, dropout_mask) -> str | None:
    """Why a call is left to PyTorch, or None."""
    tensors = [t for t in (query, key, value, attn_mask) if t is not None]
    for t in tensors:
        if type(t) not in (torch.Tensor, torch.nn.Parameter):
            return f"{type(t).__name__}: torch.compile traces the composition, or a tensor subclass is used"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "sdpa_kernel excludes FLASH_ATTENTION"
    if any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        return "forward-mode derivatives"
    if any(t.dtype not in _DTYPES or t.dtype != query.dtype for t in tensors[:3]):
        return f"dtypes {', '.join(str(t.dtype) for t in tensors[:3])}"
    if any(t.device.type != "cpu" for t in tensors):
        return "tensors on different devices"
    if dropout_mask is not None or dropout_p >= 1:
        return "dropout of everything, or by a mask"
    if is_causal and attn_mask is not None:
        return "is_causal with a mask"
    if len({t.dim() for t in tensors[:3]}) > 1 or any(t.dim() > query.dim() for t in tensors):
        return "tensors of different dimensions"
    return None


def _why_not_these_shapes(q, k, v, enable_gqa: bool) -> str | None:
    batch, heads, _, dim = q.shape if q.dim() == 4 else (0, 0, 0, 0)
    same = all(t.dim() == 4 and t.shape[0] == batch for t in (q, k, v))
    if not same or k.shape[1:3] != v.shape[1:3] or k.shape[3] != dim:
        return "shapes that need broadcasting, or other than 3 or 4 dimensions"
    grouped = k.shape[1] == heads or (enable_gqa and k.shape[1] > 0 and heads % k.shape[1] == 0)
    return None if grouped else "heads that need broadcasting"
