"""The parts by which large attention results are checked, and the peers, are what they claim to be."""

import pytest
import torch

import genai_kernels  # noqa: F401  the peers are in a room of its ops
from genai_kernels.ops.flash_attention import peers
from genai_kernels.ops.flash_attention.reference import flash_attention_reference
from genai_kernels.registry import Make

OPTIONS = [
    {},
    {"causal": True},
    {"window_size": (63, 0)},
    {"window_size": (40, 9)},
    {"window_size": (30, -1), "causal": True, "softmax_scale": 0.5},
]


def call(tokens, kv_heads=1):
    make = Make(torch.float64)
    return make(2, tokens, 2, 8), make(2, tokens, kv_heads, 8), make(2, tokens, kv_heads, 8)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parts_are_parts_of_the_whole(monkeypatch, options):
    monkeypatch.setattr(peers, "_WHOLE", 0)
    monkeypatch.setattr(peers, "_ROWS", 20)
    q, k, v = (t.requires_grad_() for t in call(300))
    whole = flash_attention_reference(q, k, v, **options)
    upstream = torch.randn_like(whole)
    gradients = torch.autograd.grad(whole, (q, k, v), upstream)
    parts = peers.parts(q, k, v, **options)
    assert len(parts) == (3 if options.get("window_size", (-1,))[-1] == 0 or "softmax_scale" in options else 2)
    for part in parts:
        inner = [t.requires_grad_() for t in part.args]
        out = flash_attention_reference(*inner, **part.kwargs)
        where = part.outputs[0]
        torch.testing.assert_close(out, whole[where], rtol=1e-10, atol=1e-10)
        found = torch.autograd.grad(out, inner, upstream[where])
        for large, small, (of_whole, of_part) in zip(gradients, found, part.gradients, strict=True):
            assert small[of_part].numel() > 0
            torch.testing.assert_close(small[of_part], large[of_whole], rtol=1e-10, atol=1e-10)


def test_small_calls_and_calls_with_options_are_checked_whole():
    q, k, v = call(40)
    assert peers.parts(q, k, v) == []
    assert peers.parts(q, k, v, causal=True, sink=torch.zeros(2)) == []


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("peer", [peers.sdpa, peers.sdpa_chunked])
def test_peers_compute_the_same(peer, options):
    q, k, v = call(300, kv_heads=2)
    left, right = peers._bounds(options.get("window_size", (-1, -1)), options.get("causal", False))
    if peer is peers.sdpa_chunked and min(left, right) < 0:
        with pytest.raises(NotImplementedError, match="only for windows"):
            peer(q, k, v, **options)
        return
    expected = flash_attention_reference(q, k, v, **options)
    torch.testing.assert_close(peer(q, k, v, **options), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(NotImplementedError, match="no option softcap"):
        peer(q, k, v, softcap=3.0)
