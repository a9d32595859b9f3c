"""Malformed calls: refused with the op, the argument, what was expected and what came; nothing has changed after it.

tests/ops holds the refusals of single ops that grew with them; these are the known faults of the field, op by op.
"""

import re

import pytest
import torch
from calls import bits

import genai_kernels as gk

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
INT = torch.int32


def r(*shape, dtype=F32):
    return torch.randn(shape, dtype=dtype)


def cu(*lengths, dtype=INT):
    return torch.tensor(lengths, dtype=dtype)


def dense(**changed):
    given = {"q": r(2, 5, 4, 8), "k": r(2, 7, 2, 8), "v": r(2, 7, 2, 6), **changed}
    return gk.flash_attention, given


def packed(**changed):
    given = {
        "q": r(9, 4, 8),
        "k": r(11, 2, 8),
        "v": r(11, 2, 6),
        "cu_seqlens_q": cu(0, 4, 9),
        "cu_seqlens_k": cu(0, 5, 11),
    }
    return gk.flash_attention_varlen, {**given, **changed}


def merge(**changed):
    given = {"o_a": r(2, 5, 3, 8), "lse_a": r(2, 3, 5), "o_b": r(2, 5, 3, 8), "lse_b": r(2, 3, 5)}
    return gk.merge_attention_states, {**given, **changed}


def rows(function, **given):
    return function, {"x": r(6, 8), **given}


def rotary(**changed):
    return gk.rotary_embedding, {
        "x": r(5, 2, 8),
        "cos": r(9, 4),
        "sin": r(9, 4),
        "positions": torch.arange(5),
        **changed,
    }


def window_of(memory, begin, rows=6, columns=8):
    return memory[begin : begin + rows * columns].view(rows, columns)


def overlapping(function, shift, *names, **more):
    """Arguments that are views of one memory, `shift` elements apart."""
    memory = r(200)
    return function, {**{name: window_of(memory, shift * i) for i, name in enumerate(names)}, **more}


V, T, I = ValueError, TypeError, IndexError
REFUSED = {
    # ---- shapes: every pair that must agree (a key or value shorter than the other is an over-read) ----
    "v shorter than k": (dense(v=r(2, 6, 2, 6)), V, "v: expected 7 tokens, the same sequence length as k, got 6"),
    "v longer than k": (dense(v=r(2, 64, 2, 6)), V, "v: expected 7 tokens, the same sequence length as k, got 64"),
    "v with other heads": (dense(v=r(2, 7, 4, 6)), V, "v: expected 2 heads as k, got 4"),
    "k with another head_dim": (dense(k=r(2, 7, 2, 9)), V, "k: expected head_dim 8 as q, got 9"),
    "k of another batch": (dense(k=r(1, 7, 2, 8)), V, "k: expected batch 2 as q, got 1"),
    "v of another batch": (dense(v=r(3, 7, 2, 6)), V, "v: expected batch 2 as q, got 3"),
    "heads that do not divide": (
        dense(k=r(2, 7, 3, 8), v=r(2, 7, 3, 6)),
        V,
        "k: expected a number of heads that divides 4",
    ),
    "more key heads than heads": (
        dense(k=r(2, 7, 8, 8), v=r(2, 7, 8, 6)),
        V,
        "k: expected a number of heads that divides 4",
    ),
    "no key heads": (dense(k=r(2, 7, 0, 8), v=r(2, 7, 0, 6)), V, "k: expected a number of heads that divides 4"),
    "no head_dim": (dense(q=r(2, 5, 4, 0), k=r(2, 7, 2, 0), softmax_scale=1.0), V, "q: expected head_dim >= 1, got 0"),
    "q of three dimensions": (dense(q=r(5, 4, 8)), V, "q: expected [batch, tokens, heads, dim], got shape [5, 4, 8]"),
    "k of three dimensions": (dense(k=r(7, 2, 8)), V, "k: expected [batch, tokens, heads, dim], got shape [7, 2, 8]"),
    "v of five dimensions": (dense(v=r(1, 2, 7, 2, 6)), V, "v: expected [batch, tokens, heads, dim]"),
    # ---- dtypes ----
    "q of integers": (
        dense(q=torch.ones(2, 5, 4, 8, dtype=INT)),
        T,
        "q: expected float32, bfloat16, float16 or float64, got int32",
    ),
    "k of another dtype": (dense(k=r(2, 7, 2, 8, dtype=BF16)), T, "k: expected the dtype of q, float32, got bfloat16"),
    "v of another dtype": (dense(v=r(2, 7, 2, 6, dtype=F64)), T, "v: expected the dtype of q, float32, got float64"),
    # ---- windows, probabilities ----
    "window left of -1": (
        dense(window_size=(-2, 0)),
        V,
        "window_size: expected each >= -1 (-1: no limit), got (-2, 0)",
    ),
    "window right of -1": (
        dense(window_size=(4, -7)),
        V,
        "window_size: expected each >= -1 (-1: no limit), got (4, -7)",
    ),
    "negative softcap": (dense(softcap=-1.0), V, "softcap: expected >= 0 (0: none), got -1"),
    "softcap nan": (dense(softcap=float("nan")), V, "softcap: expected >= 0 (0: none), got nan"),
    "negative dropout": (dense(dropout_p=-0.1), V, "dropout_p: expected 0 <= p < 1, got -0.1"),
    "dropout of everything": (dense(dropout_p=1.0), V, "dropout_p: expected 0 <= p < 1, got 1"),
    "negative offset": (dense(dropout_p=0.5, seed=1, offset=-1), V, "offset: expected 0 <= offset < 2^32, got -1"),
    "offset of 2^32": (
        dense(dropout_p=0.5, seed=1, offset=2**32),
        V,
        "offset: expected 0 <= offset < 2^32, got 4294967296",
    ),
    # ---- bias, mask, slopes, sink ----
    "bias of more keys": (
        dense(attn_bias=r(2, 4, 5, 8)),
        V,
        "attn_bias: expected a shape that broadcasts to [2, 4, 5, 7], got [2, 4, 5, 8]",
    ),
    "bias of fewer queries": (
        dense(attn_bias=r(4, 7)),
        V,
        "attn_bias: expected a shape that broadcasts to [2, 4, 5, 7], got [4, 7]",
    ),
    "bias of key heads": (dense(attn_bias=r(2, 2, 5, 7)), V, "attn_bias: expected a shape that broadcasts"),
    "bias of five dimensions": (dense(attn_bias=r(1, 1, 1, 1, 7)), V, "attn_bias: expected a shape that broadcasts"),
    "bias of integers": (dense(attn_bias=torch.ones(5, 7, dtype=INT)), T, "attn_bias: expected float32"),
    "bias of float64": (
        dense(attn_bias=r(5, 7, dtype=F64)),
        T,
        "attn_bias: expected the dtype of q or float32, got float64",
    ),
    "mask of floats": (dense(attn_mask=r(5, 7)), T, "attn_mask: expected bool, got float32"),
    "mask of bytes": (dense(attn_mask=torch.ones(5, 7, dtype=torch.uint8)), T, "attn_mask: expected bool, got"),
    "mask of fewer keys": (
        dense(attn_mask=torch.ones(2, 1, 1, 6, dtype=torch.bool)),
        V,
        "attn_mask: expected a shape that broadcasts to [2, 4, 5, 7], got [2, 1, 1, 6]",
    ),
    "mask of no keys": (
        dense(attn_mask=torch.ones(0, dtype=torch.bool)),
        V,
        "attn_mask: expected a shape that broadcasts",
    ),
    "slopes of key heads": (dense(alibi_slopes=r(2)), V, "alibi_slopes: expected a contiguous [4] or [2, 4], got [2]"),
    "slopes transposed": (
        dense(alibi_slopes=r(4, 2)),
        V,
        "alibi_slopes: expected a contiguous [4] or [2, 4], got [4, 2]",
    ),
    "sink of key heads": (dense(sink=r(2)), V, "sink: expected a contiguous [4], got [2]"),
    "sink per batch": (dense(sink=r(2, 4)), V, "sink: expected a contiguous [4], got [2, 4]"),
    # ---- packed sequences ----
    "cu_seqlens_q not from 0": (packed(cu_seqlens_q=cu(1, 4, 9)), V, "cu_seqlens_q[0]: expected 0, got 1"),
    "cu_seqlens_k not from 0": (packed(cu_seqlens_k=cu(-1, 4, 9)), V, "cu_seqlens_k[0]: expected 0, got -1"),
    "cu_seqlens_q decreasing": (packed(cu_seqlens_q=cu(0, 6, 4)), V, "cu_seqlens_q[2]: expected at least 6, got 4"),
    "cu_seqlens_k decreasing": (packed(cu_seqlens_k=cu(0, 11, 5)), V, "cu_seqlens_k[2]: expected at least 11, got 5"),
    "cu_seqlens_q past the tokens": (
        packed(cu_seqlens_q=cu(0, 4, 10)),
        V,
        "cu_seqlens_q[2]: expected at most 9, the number of tokens, got 10",
    ),
    "cu_seqlens_k past the tokens": (
        packed(cu_seqlens_k=cu(0, 4, 2**31 - 1)),
        V,
        "cu_seqlens_k[2]: expected at most 11, the number of tokens, got 2147483647",
    ),
    "cu_seqlens that wrap": (
        packed(cu_seqlens_q=cu(0, 2**31 - 1, -(2**31))),
        V,
        "cu_seqlens_q[2]: expected at least 2147483647, got -2147483648",
    ),
    "cu_seqlens_q of int64": (
        packed(cu_seqlens_q=cu(0, 4, 9, dtype=torch.int64)),
        T,
        "cu_seqlens_q: expected int32, got int64",
    ),
    "cu_seqlens_k of floats": (
        packed(cu_seqlens_k=cu(0, 4, 9, dtype=F32)),
        T,
        "cu_seqlens_k: expected int32, got float32",
    ),
    "cu_seqlens of other lengths": (
        packed(cu_seqlens_k=cu(0, 4, 9, 11)),
        V,
        "cu_seqlens_k: expected 3 elements as cu_seqlens_q, got 4",
    ),
    "cu_seqlens_q empty": (
        packed(cu_seqlens_q=cu()),
        V,
        "cu_seqlens_q: expected a contiguous [batch + 1], got shape [0]",
    ),
    "cu_seqlens_q of two dimensions": (
        packed(cu_seqlens_q=cu(0, 4, 9)[None]),
        V,
        "cu_seqlens_q: expected a contiguous [batch + 1], got shape [1, 3]",
    ),
    "cu_seqlens_k strided": (
        packed(cu_seqlens_k=cu(0, 0, 5, 0, 11)[::2]),
        V,
        "cu_seqlens_k: expected a contiguous [batch + 1], got shape [3]",
    ),
    "packed q of four dimensions": (
        packed(q=r(1, 9, 4, 8)),
        V,
        "q: expected [tokens, heads, dim], got shape [1, 9, 4, 8]",
    ),
    "packed v shorter than k": (
        packed(v=r(10, 2, 6)),
        V,
        "v: expected 11 tokens, the same sequence length as k, got 10",
    ),
    "packed bias of all keys": (
        packed(attn_bias=r(9, 11)),
        V,
        "attn_bias: expected a shape that broadcasts to [2, 4, 5, 6], got [9, 11]",
    ),
    # ---- merging ----
    "states of other shapes": (
        merge(o_b=r(2, 5, 3, 9)),
        V,
        "o_b: expected the shape of o_a, [2, 5, 3, 8], got [2, 5, 3, 9]",
    ),
    "states of other dtypes": (
        merge(o_b=r(2, 5, 3, 8, dtype=BF16)),
        T,
        "o_b: expected the dtype of o_a, float32, got bfloat16",
    ),
    "lse with tokens before heads": (
        merge(lse_a=r(2, 5, 3)),
        V,
        "lse_a: expected shape [batch, heads, tokens] = [2, 3, 5], got [2, 5, 3]",
    ),
    "lse of fewer tokens": (
        merge(lse_b=r(2, 3, 4)),
        V,
        "lse_b: expected shape [batch, heads, tokens] = [2, 3, 5], got [2, 3, 4]",
    ),
    "lse of bfloat16": (
        merge(lse_a=r(2, 3, 5, dtype=BF16)),
        T,
        "lse_a: expected float32 where o is float32, got bfloat16",
    ),
    "a state of two dimensions": (
        merge(o_a=r(5, 8), o_b=r(5, 8)),
        V,
        "o_a: expected [batch, tokens, heads, dim] or [tokens, heads, dim], got shape [5, 8]",
    ),
    # ---- rows ----
    "weight of another length": (
        rows(gk.layer_norm, weight=r(9)),
        V,
        "weight: expected shape [8], the last dimension of x, got [9]",
    ),
    "weight of two dimensions": (
        rows(gk.rms_norm, weight=r(1, 8)),
        V,
        "weight: expected shape [8], the last dimension of x, got [1, 8]",
    ),
    "eps negative": (rows(gk.layer_norm, eps=-1e-5), V, "eps: expected >= 0, got -1e-05"),
    "eps nan": (rows(gk.fused_add_rms_norm, residual=r(6, 8), eps=float("nan")), V, "eps: expected >= 0, got nan"),
    "residual broadcast": (
        rows(gk.fused_add_rms_norm, residual=r(8)),
        V,
        "residual: expected the shape of x, [6, 8], got [8]",
    ),
    "out over part of x": (
        overlapping(gk.rms_norm, 8, "x", "out"),
        V,
        "out: expected memory that does not overlap x (or is exactly it), got",
    ),
    "out one element after x": (
        overlapping(gk.layer_norm, 1, "x", "out"),
        V,
        "out: expected memory that does not overlap x",
    ),
    "out expanded": (
        rows(gk.rms_norm, out=torch.zeros(1, 8).expand(6, 8)),
        V,
        "out: expected a tensor without internal overlap, got stride 0 in dimension 0",
    ),
    "out of float64": (
        rows(gk.rms_norm, out=torch.zeros(6, 8, dtype=F64)),
        T,
        "out: expected the dtype of x, float32, got float64",
    ),
    "activation of an odd size": (
        rows(gk.gelu_tanh_and_mul, x=r(6, 9)),
        V,
        "x: expected a last dimension of even size",
    ),
    "activation out of the whole size": (
        rows(gk.silu_and_mul, out=r(6, 8)),
        V,
        "out: expected half the last dimension of x, [6, 8], got [6, 8]",
    ),
    "position past the table": (
        rotary(positions=torch.tensor([0, 1, 2, 9, 4])),
        I,
        "positions[3]: expected 0 <= position < 9, got 9",
    ),
    "position of -1": (
        rotary(positions=torch.tensor([0, 1, -1, 3, 4], dtype=INT)),
        I,
        "positions[2]: expected 0 <= position < 9, got -1",
    ),
    "position of 2^62": (
        rotary(positions=torch.tensor([2**62, 1, 2, 3, 4])),
        I,
        "positions[0]: expected 0 <= position < 9, got 4611686018427387904",
    ),
    "positions of fewer tokens": (
        rotary(positions=torch.arange(4)),
        V,
        "positions: expected dimensions that broadcast to the tokens of x",
    ),
    "table wider than the head": (
        rotary(cos=r(9, 5), sin=r(9, 5)),
        V,
        "cos: expected at most half of head_dim, 8, in the last dimension",
    ),
    "sin shorter than cos": (rotary(sin=r(8, 4)), V, "sin: expected the shape of cos, [9, 4], got [8, 4]"),
    "sin of another dtype": (
        rotary(sin=r(9, 4, dtype=BF16)),
        T,
        "sin: expected the dtype of cos, float32, got bfloat16",
    ),
}

FORM = re.compile(r"genai_kernels\.(\w+): [\w\[\], ]+: expected [^\n]+, got [^\n]+")


@pytest.mark.parametrize(("call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refused_and_nothing_changed(call, error, text):
    function, given = call
    tensors = {name: t for name, t in given.items() if isinstance(t, torch.Tensor)}
    before = {name: (bits(t).clone(), t._version) for name, t in tensors.items()}
    generator = torch.get_rng_state()
    with pytest.raises(error) as raised:
        function(**given)
    message = str(raised.value)
    assert type(raised.value) is error
    assert FORM.fullmatch(message), message
    assert message.startswith(f"genai_kernels.{function.__name__}: ")
    assert text in message
    for name, t in tensors.items():
        assert torch.equal(bits(t), before[name][0]), name
        assert t._version == before[name][1], name
    if given.get("seed") is not None or not given.get("dropout_p"):
        assert torch.equal(torch.get_rng_state(), generator)


def test_there_are_many():
    assert len(REFUSED) >= 60


@pytest.mark.parametrize("name", [n for n in REFUSED if n not in ("no head_dim",)])
def test_refused_without_gradients_and_under_inference_mode(name):
    (function, given), error, text = REFUSED[name]
    with torch.inference_mode(), pytest.raises(error, match=re.escape(text)):
        function(**given)


def backward_of_attention(**changed):
    q, k, v, dout = r(1, 5, 2, 8), r(1, 7, 2, 8), r(1, 7, 2, 6), r(1, 5, 2, 6)
    out, lse, state = torch.ops.genai_kernels.flash_attention(q, k, v, *[None] * 7, -1, -1, 1.0, 0.0, 0.0)
    given = {"dout": dout, "dlse": None, "q": q, "k": k, "v": v, "out": out, "lse": lse, "softmax_state": state}
    given.update(changed)
    return torch.ops.genai_kernels.flash_attention_bwd(*given.values(), *[None] * 7, -1, -1, 1.0, 0.0, 0.0, False)


BACKWARD = {
    "dout of fewer tokens": (lambda: backward_of_attention(dout=r(1, 4, 2, 6)), V),
    "dout of k's dim": (lambda: backward_of_attention(dout=r(1, 5, 2, 8)), V),
    "dout of float64": (lambda: backward_of_attention(dout=r(1, 5, 2, 6, dtype=F64)), RuntimeError),
    "dlse of fewer tokens": (lambda: backward_of_attention(dlse=r(1, 2, 4)), V),
    "state of fewer tokens": (lambda: backward_of_attention(softmax_state=r(1, 2, 4, 2)), V),
    "dlse of float64": (lambda: backward_of_attention(dlse=r(1, 2, 5, dtype=F64)), RuntimeError),
    "norm dy of fewer rows": (lambda: torch.ops.genai_kernels.rms_norm_bwd(r(5, 8), r(6, 8), None, 1e-6, False), V),
    "norm dy of bfloat16": (
        lambda: torch.ops.genai_kernels.rms_norm_bwd(r(6, 8, dtype=BF16), r(6, 8), None, 1e-6, False),
        RuntimeError,
    ),
    "activation dy of the whole size": (lambda: torch.ops.genai_kernels.silu_and_mul_bwd(r(6, 8), r(6, 8)), V),
    "merge d_o of fewer tokens": (
        lambda: torch.ops.genai_kernels.merge_attention_states_bwd(
            r(4, 3, 8), None, r(5, 3, 8), r(3, 5), r(5, 3, 8), r(3, 5)
        ),
        V,
    ),
    "out of other tokens than q": (lambda: backward_of_attention(out=r(1, 4, 2, 6), dout=r(1, 4, 2, 6)), V),
    "out of another value dim": (lambda: backward_of_attention(out=r(1, 5, 2, 3), dout=r(1, 5, 2, 3)), V),
    "out of another dtype": (lambda: backward_of_attention(out=r(1, 5, 2, 6, dtype=BF16)), RuntimeError),
    "lse of fewer tokens": (lambda: backward_of_attention(lse=r(1, 2, 4), softmax_state=r(1, 2, 4, 2)), V),
    "lse of bfloat16": (
        lambda: backward_of_attention(lse=r(1, 2, 5, dtype=BF16), softmax_state=r(1, 2, 5, 2, dtype=BF16)),
        RuntimeError,
    ),
    "lse not contiguous": (lambda: backward_of_attention(lse=r(1, 2, 10)[..., ::2]), V),
}


@pytest.mark.parametrize(("call", "error"), BACKWARD.values(), ids=BACKWARD)
def test_backward_ops_refuse(call, error):
    """The ops behind autograd, called by hand: they must not trust that forward was theirs."""
    with pytest.raises(error, match=r"genai_kernels\.\w+: \w+: expected"):
        call()


MIXED = {
    "k": lambda: dense(k=r(2, 7, 2, 8).to("meta")),
    "attn_mask": lambda: dense(attn_mask=torch.ones(5, 7, dtype=torch.bool, device="meta")),
    "residual": lambda: rows(gk.fused_add_rms_norm, residual=r(6, 8).to("meta")),
    "weight": lambda: rows(gk.rms_norm, weight=r(8).to("meta")),
    "out": lambda: rows(gk.rms_norm, out=r(6, 8).to("meta")),
    "cos": lambda: rotary(cos=r(9, 4).to("meta"), sin=r(9, 4).to("meta")),
    "positions": lambda: rotary(positions=torch.arange(5, device="meta")),
    "lse_b": lambda: merge(lse_b=r(2, 3, 5).to("meta")),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_mix_of_devices_is_refused(name):
    function, given = MIXED[name]()
    with pytest.raises(ValueError, match=f"{name}: expected device cpu"):
        function(**given)


def test_meta_tensors_touch_no_data():
    q, k, v = r(2, 5, 4, 8).to("meta"), r(2, 7, 2, 8).to("meta"), r(2, 7, 2, 6).to("meta")
    out, lse = gk.flash_attention(q, k, v, return_lse=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", (2, 5, 4, 6), (2, 4, 5))


WRITING = {
    "rms_norm": lambda x, out: gk.rms_norm(x, out=out),
    "layer_norm": lambda x, out: gk.layer_norm(x, out=out),
    "fused_add_rms_norm": lambda x, out: gk.fused_add_rms_norm(x, x, out=(out, torch.empty_like(out))),
    "silu_and_mul": lambda x, out: gk.silu_and_mul(torch.cat([x, x], -1), out=out),
    "rotary_embedding": lambda x, out: gk.rotary_embedding(x[:, None], r(6, 4), r(6, 4), out=out[:, None]),
}


@pytest.mark.parametrize("call", WRITING.values(), ids=WRITING)
def test_writing_in_place_is_seen_by_autograd(call):
    """What backward saved and a kernel then wrote over is an error, as it is with torch's own ops."""
    out = r(6, 8).requires_grad_() * 1.0
    squares = (out * out).sum()
    with torch.no_grad():
        call(r(6, 8), out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


@pytest.mark.parametrize("call", WRITING.values(), ids=WRITING)
def test_a_gradient_of_what_is_written_in_place_is_refused(call):
    with pytest.raises(RuntimeError, match=r"gradient|differentiation|requires_grad"):
        call(r(6, 8), r(6, 8).requires_grad_())
    with pytest.raises(RuntimeError, match=r"gradient|differentiation|requires_grad"):
        call(r(6, 8).requires_grad_(), r(6, 8))
