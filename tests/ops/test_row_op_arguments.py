"""out=, in place, and refusals of the row-wise ops: each names the op and the argument, and changes nothing."""

import re

import pytest
import torch

import genai_kernels as gk

X, W = torch.randn(6, 8), torch.randn(8)
COS = SIN = torch.randn(9, 4)
Q = torch.randn(5, 2, 8)
AT = torch.arange(5)


def expanded(*shape):
    return torch.zeros(1, *shape[1:]).expand(*shape)


def overlapping():
    base = torch.randn(7, 8)
    return base[:6], base[1:]


REFUSED = [
    (lambda: gk.rms_norm(torch.tensor(1.0)), ValueError, "rms_norm: x: expected at least one dimension"),
    (lambda: gk.rms_norm(X, torch.randn(7)), ValueError, "rms_norm: weight: expected shape [8]"),
    (lambda: gk.rms_norm(X, W, -1.0), ValueError, "rms_norm: eps: expected >= 0, got -1"),
    (lambda: gk.rms_norm(X.int()), TypeError, "rms_norm: x: expected float32"),
    (lambda: gk.rms_norm(X, W.int()), TypeError, "rms_norm: weight: expected float32"),
    (lambda: gk.rms_norm(X, out=expanded(6, 8)), ValueError, "rms_norm: out: expected a tensor without internal"),
    (lambda: gk.rms_norm(X, out=torch.empty(5, 8)), ValueError, "rms_norm: out: expected the shape of x, [6, 8]"),
    (lambda: gk.rms_norm(X, out=torch.empty(6, 8).double()), TypeError, "rms_norm: out: expected the dtype of x"),
    (lambda: (lambda p: gk.rms_norm(p[0], out=p[1]))(overlapping()), ValueError, "rms_norm: out: expected memory"),
    (lambda: gk.rms_norm(W[None], W, out=W[None]), ValueError, "rms_norm: out: expected memory that does not overlap"),
    (lambda: gk.fused_add_rms_norm(X, X[:5]), ValueError, "fused_add_rms_norm: residual: expected the shape of x"),
    (lambda: gk.fused_add_rms_norm(X, X.double()), TypeError, "fused_add_rms_norm: residual: expected the dtype of x"),
    (lambda: (lambda o: gk.fused_add_rms_norm(X, X, out=(o, o)))(torch.empty(6, 8)), ValueError, "out[1]: expected"),
    (lambda: gk.layer_norm(X, W, torch.randn(1)), ValueError, "layer_norm: bias: expected shape [8]"),
    (lambda: gk.layer_norm(X, residual=X[:, :4]), ValueError, "layer_norm: residual: expected the shape of x"),
    (lambda: gk.silu_and_mul(X[:, :7]), ValueError, "silu_and_mul: x: expected a last dimension of even size"),
    (lambda: gk.silu_and_mul(torch.tensor(1.0)), ValueError, "silu_and_mul: x: expected a last dimension of even size"),
    (lambda: gk.gelu_and_mul(X.int()), TypeError, "gelu_and_mul: x: expected float32"),
    (lambda: gk.gelu_and_mul(X, out=torch.empty(6, 8)), ValueError, "gelu_and_mul: out: expected half the last"),
    (lambda: gk.gelu_tanh_and_mul(X, out=X[:, :4]), ValueError, "gelu_tanh_and_mul: out: expected memory that"),
    (lambda: gk.rotary_embedding(Q, COS, SIN, AT.float()), TypeError, "rotary_embedding: positions: expected int32"),
    (lambda: gk.rotary_embedding(Q, COS, SIN, AT + 5), IndexError, "positions[4]: expected 0 <= position < 9, got 9"),
    (lambda: gk.rotary_embedding(Q, COS, SIN, AT - 1), IndexError, "positions[0]: expected 0 <= position < 9, got -1"),
    (lambda: gk.rotary_embedding(Q, COS, SIN, AT[:4]), ValueError, "positions: expected dimensions that broadcast"),
    (lambda: gk.rotary_embedding(Q, COS, SIN), ValueError, "cos: expected dimensions that broadcast to the tokens"),
    (lambda: gk.rotary_embedding(Q, COS, SIN[:4], AT), ValueError, "embedding: sin: expected the shape"),
    (lambda: gk.rotary_embedding(Q, torch.randn(9, 5), torch.randn(9, 5), AT), ValueError, "cos: expected at most"),
    (lambda: gk.rotary_embedding(Q[0], COS, SIN, AT), ValueError, "rotary_embedding: x: expected [..., tokens"),
    (lambda: gk.rotary_embedding(Q, COS, SIN, AT, out=expanded(5, 2, 8)), ValueError, "out: expected a tensor without"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "text"), REFUSED, ids=[f"{i}-{t[:40]}" for i, (_, _, t) in enumerate(REFUSED)]
)
def test_refused(call, error, text):
    shared = (X, W, COS, Q, AT)
    before = [t.clone() for t in shared]
    with pytest.raises(error, match=re.escape(text)) as raised:
        call()
    assert str(raised.value).startswith("genai_kernels.")
    assert all(torch.equal(t, c) for t, c in zip(shared, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_and_in_place_give_the_same_bits(dtype):
    x, r, w = torch.randn(5, 70).to(dtype), torch.randn(5, 70).to(dtype), torch.randn(70).to(dtype)
    y = gk.rms_norm(x, w)
    columns = torch.empty(70, 5, dtype=dtype).t()
    assert gk.rms_norm(x, w, out=columns) is columns
    assert torch.equal(columns, y)
    own = x.clone()
    gk.rms_norm(own, w, out=own)
    assert torch.equal(own, y)
    y, s = gk.fused_add_rms_norm(x, r, w)
    own_x, own_r = x.clone(), r.clone()
    gk.fused_add_rms_norm(own_x, own_r, w, out=(own_x, own_r))
    assert torch.equal(own_x, y)
    assert torch.equal(own_r, s)
    swapped_x, swapped_r = x.clone(), r.clone()
    gk.fused_add_rms_norm(swapped_x, swapped_r, w, out=(swapped_r, swapped_x))
    assert torch.equal(swapped_r, y)
    assert torch.equal(swapped_x, s)
    y, s = gk.layer_norm(x, w, w, residual=r)
    own_x, own_r = x.clone(), r.clone()
    gk.layer_norm(own_x, w, w, residual=own_r, out=(own_x, own_r))
    assert torch.equal(own_x, y)
    assert torch.equal(own_r, s)
    half = torch.empty(5, 35, dtype=dtype)
    assert torch.equal(gk.silu_and_mul(x, out=half), gk.silu_and_mul(x))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_in_place_in_a_packed_tensor(interleaved):
    qkv = torch.randn(2, 5, 9, 16)
    angle = torch.randn(7, 6)
    at = torch.tensor([[0, 1, 2, 3, 4], [6, 5, 0, 0, 1]], dtype=torch.int32)
    before, q = qkv.clone(), qkv[:, :, 2:5]
    expected = gk.rotary_embedding(q, angle.cos(), angle.sin(), at, interleaved=interleaved)
    assert gk.rotary_embedding(q, angle.cos(), angle.sin(), at, interleaved=interleaved, out=q) is q
    assert torch.equal(q, expected)
    assert torch.equal(qkv[:, :, :2], before[:, :, :2])
    assert torch.equal(qkv[:, :, 5:], before[:, :, 5:])
    assert torch.equal(q[..., 12:], before[:, :, 2:5, 12:])
    assert not torch.equal(q[..., :12], before[:, :, 2:5, :12])
