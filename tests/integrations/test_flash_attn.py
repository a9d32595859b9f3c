"""The flash-attn front end: its interface to the letter, its results against attention written out here."""

import inspect
import math
import re
import subprocess
import sys

import pytest
import torch

import genai_kernels.integrations.flash_attn as flash_attn
from genai_kernels.accuracy import compare
from genai_kernels.integrations.flash_attn.bert_padding import index_first_axis, pad_input, unpad_input

# flash-attn 2's signatures: names, order, defaults.
OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
VARLEN = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {OPTIONS})",
    "flash_attn_kvpacked_func": f"(q, kv, {OPTIONS})",
    "flash_attn_qkvpacked_func": f"(qkv, {OPTIONS})",
    "flash_attn_varlen_func": f"(q, k, v, {VARLEN}, {OPTIONS}, block_table=None)",
    "flash_attn_varlen_kvpacked_func": f"(q, kv, {VARLEN}, {OPTIONS})",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {OPTIONS})",
    "flash_attn_with_kvcache": "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    found = inspect.signature(getattr(flash_attn, name))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    assert str(inspect.Signature(plain)) == SIGNATURES[name]
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in plain)
    assert getattr(flash_attn.flash_attn_interface, name) is getattr(flash_attn, name)


def attention(q, k, v, *, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None):
    """out and lse by definition, in float64: [batch, tokens, heads, dim] with heads repeated."""
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bihd,bjhd->bhij", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    at = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)  # how far key j lies behind query i
    if slopes is not None:
        s = s - (slopes if slopes.dim() == 2 else slopes[None])[:, :, None, None] * at.abs()
    hidden = torch.zeros_like(at, dtype=torch.bool)
    if window[0] >= 0:
        hidden |= at > window[0]
    if window[1] >= 0 or causal:
        hidden |= at < -(0 if causal else window[1])
    s = s.masked_fill(hidden, -math.inf)
    lse = s.logsumexp(-1)
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0)[..., None])
    return torch.einsum("bhij,bjhd->bihd", p, v), lse


def qkv(b=2, tq=9, tk=13, h=4, hk=2, d=16, dv=None, dtype=torch.float64):
    return [torch.randn(*shape, dtype=dtype) for shape in ((b, tq, h, d), (b, tk, hk, d), (b, tk, hk, dv or d))]


CASES = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "scale": ({"softmax_scale": 0.3}, {"scale": 0.3}),
    "window": ({"window_size": (3, 1)}, {"window": (3, 1)}),
    "window_left_and_causal": ({"window_size": (2, 7), "causal": True}, {"window": (2, 0)}),
    "no_window_by_any_negative": ({"window_size": (-5, -7)}, {}),
    "softcap": ({"softcap": 2.0, "softmax_scale": 1.0}, {"softcap": 2.0, "scale": 1.0}),
    "no_softcap_by_a_negative": ({"softcap": -1.0}, {}),
    "deterministic": ({"deterministic": True}, {}),
}


@pytest.mark.parametrize("lengths", [(9, 13), (13, 9), (1, 7)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_dense(case, lengths):
    options, expected_options = CASES[case]
    call = [t.requires_grad_() for t in qkv(tq=lengths[0], tk=lengths[1])]
    out, lse, probabilities = flash_attn.flash_attn_func(*call, **options, return_attn_probs=True)
    expected, expected_lse = attention(*call, **expected_options)
    torch.testing.assert_close((out, lse), (expected, expected_lse))
    assert probabilities is None
    cotangent = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(o, call, cotangent, retain_graph=True) for o in (out, expected))
    torch.testing.assert_close(found, wanted)
    assert torch.equal(flash_attn.flash_attn_func(*call, **options), out)


@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=str)
def test_alibi(shape):
    slopes = torch.rand(shape)
    call = qkv()
    out = flash_attn.flash_attn_func(*call, causal=True, alibi_slopes=slopes)
    torch.testing.assert_close(out, attention(*call, causal=True, slopes=slopes.double())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_at_least_as_exact_as_torch(dtype):
    q, k, v = qkv(tq=40, tk=40, h=3, hk=3, d=32, dtype=dtype)
    out = flash_attn.flash_attn_func(q, k, v, causal=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        peer = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
    exact = attention(q.double(), k.double(), v.double(), causal=True)[0]
    verdict = compare("out", out, peer.transpose(1, 2), exact, k=1.0, k_rms=1.0)
    assert verdict.ok, verdict.complaint


def test_a_row_without_keys():
    call = [t.requires_grad_() for t in qkv(tq=6, tk=2)]
    out, lse, _ = flash_attn.flash_attn_func(*call, causal=True, return_attn_probs=True)
    assert not out[:, :4].any()
    assert (lse[:, :, :4] == -math.inf).all()
    assert not torch.autograd.grad(out.sum(), call[0])[0][:, :4].any()


def test_packed_tensors_are_views_of_the_plain_call():
    packed = torch.randn(2, 11, 3, 4, 16, dtype=torch.float64, requires_grad=True)
    q, k, v = packed.unbind(2)
    expected = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(4, 0))
    found = flash_attn.flash_attn_qkvpacked_func(packed, causal=True, window_size=(4, 0))
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(o.square().sum(), packed)[0] for o in (found, expected)))
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, packed[:, :, 1:], causal=True, window_size=(4, 0)), found)

    cu, rows = torch.tensor([0, 4, 11], dtype=torch.int32), packed[0]
    expected = flash_attn.flash_attn_varlen_func(*rows.unbind(1), cu, cu, 7, 7, softcap=3.0)
    assert torch.equal(flash_attn.flash_attn_varlen_qkvpacked_func(rows, cu, 7, softcap=3.0), expected)
    found = flash_attn.flash_attn_varlen_kvpacked_func(rows[:, 0], rows[:, 1:], cu, cu, 7, 7, softcap=3.0)
    assert torch.equal(found, expected)


def test_varlen_is_dense_per_sequence():
    lengths_q, lengths_k = [5, 0, 9, 2], [7, 3, 9, 0]
    q, k, v = (torch.randn(n, h, 16, dtype=torch.float64) for n, h in ((16, 4), (19, 2), (19, 2)))
    call = [t.requires_grad_() for t in (q, k, v)]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k))
    out, lse, _ = flash_attn.flash_attn_varlen_func(*call, cu_q, cu_k, 9, 9, causal=True, return_attn_probs=True)
    parts = [
        attention(q[None, a:b], k[None, c:d], v[None, c:d], causal=True)
        for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)
    ]
    expected, expected_lse = torch.cat([o[0] for o, _ in parts]), torch.cat([s[0] for _, s in parts], -1)
    torch.testing.assert_close((out, lse), (expected, expected_lse))
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(o, call, cotangent) for o in (out, expected)))


def test_probabilities_show_what_dropout_dropped():
    q, k, v = qkv(tq=30, tk=40)
    torch.manual_seed(3)
    out, lse, s = flash_attn.flash_attn_func(q, k, v, 0.25, causal=True, return_attn_probs=True)
    assert s.shape == (2, 4, 30, 40)
    seen = torch.ones(30, 40, dtype=torch.bool).tril(10).expand_as(s)
    assert 0.2 < (s < 0)[seen].double().mean() < 0.3
    torch.testing.assert_close(s.abs().sum(-1), torch.ones_like(lse))
    torch.testing.assert_close(lse, attention(q, k, v, causal=True)[1])
    kept = s.clamp_min(0) / 0.75
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", kept, v.repeat_interleave(2, 2)))


def test_probabilities_of_packed_sequences():
    q, k, v = (torch.randn(12, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    torch.manual_seed(3)
    out, _, s = flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, 8, 8, dropout_p=0.3, return_attn_probs=True)
    assert s.shape == (2, 4, 8, 8)
    assert not s[0, :, 5:].any()
    assert not s[0, :, :, 5:].any()
    assert (s < 0).any()
    second = torch.einsum("hij,jhd->ihd", s[1, :, :7, :7].clamp_min(0) / 0.7, v[5:].repeat_interleave(2, 1))
    torch.testing.assert_close(out[5:], second)


# ---- the cache ----


def caches(rows=3, capacity=12, hk=2, d=16, dtype=torch.float64):
    """Two caches whose unused slots must not be seen."""
    return [torch.randn(rows, capacity, hk, d, dtype=dtype) for _ in range(2)]


def rotated(x, angle, interleaved):
    """x [..., heads, dim] turned by angle [..., rotary_dim / 2], by complex numbers."""
    half = angle.shape[-1]
    part, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = part.unflatten(-1, (half, 2)) if interleaved else part.unflatten(-1, (2, half)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angle)[..., None, :])
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat([turned, rest], -1)


def one_by_one(q, k_cache, v_cache, k, v, held, rows, leftpad, angles=None, interleaved=True, **options):
    """What flash_attn_with_kvcache promises, a sequence at a time; the caches are copied, not written."""
    k_cache, v_cache, outs = k_cache.clone(), v_cache.clone(), []
    follows = options.get("causal") or max(options.get("window", (-1, -1))) >= 0
    slopes = options.pop("slopes", None)
    for b, (row, length, first) in enumerate(zip(rows, held, leftpad, strict=True)):
        new, query = k.shape[1] if k is not None else 0, q[b]
        if k is not None:
            key = k[b]
            if angles is not None:
                key = rotated(key, angles[length : length + new], interleaved)
                at = length + torch.arange(q.shape[1]) * int(follows)
                query = rotated(query, angles[at], interleaved)
            k_cache[row, length : length + new], v_cache[row, length : length + new] = key, v[b]
        part = (slice(row, row + 1), slice(first, length + new))
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[b : b + 1]
        outs.append(attention(query[None], k_cache[part], v_cache[part], slopes=own, **options))
    return torch.cat([o for o, _ in outs]), torch.cat([s for _, s in outs]), k_cache, v_cache


CACHE_CASES = {
    "one_length": {"held": [4, 4, 4]},
    "lengths": {"held": [4, 0, 9]},
    "rows": {"held": [4, 1, 9], "rows": [4, 0, 2]},
    "leftpad": {"held": [4, 5, 9], "leftpad": [1, 0, 7]},
    "all": {"held": [4, 5, 9], "rows": [3, 0, 1], "leftpad": [1, 0, 7]},
    "nothing_new": {"held": [4, 12, 9], "new": 0},
    "many_queries": {"held": [4, 5, 9], "rows": [1, 4, 2], "queries": 6},
}


@pytest.mark.parametrize("rotary", [None, "interleaved", "halves"])
@pytest.mark.parametrize("how", [{}, {"causal": True}, {"window_size": (3, 1)}], ids=str)
@pytest.mark.parametrize("case", CACHE_CASES)
def test_cache(case, how, rotary):
    held, rows, leftpad, new, queries = (
        CACHE_CASES[case].get(key, default)
        for key, default in (("held", None), ("rows", None), ("leftpad", None), ("new", 3), ("queries", 3))
    )
    if rotary and not new:
        pytest.skip("there is no rotation without new keys")
    k_cache, v_cache = caches(rows=5)
    q, k, v = (torch.randn(3, n, h, 16, dtype=torch.float64) for n, h in ((queries, 4), (new, 2), (new, 2)))
    k, v = (k, v) if new else (None, None)
    angles = torch.rand(20, 4, dtype=torch.float64) * 6 if rotary else None
    options = {"causal": how.get("causal", False), "window": how.get("window_size", (-1, -1))}
    expected = one_by_one(
        q, k_cache, v_cache, k, v, held, rows or [0, 1, 2], leftpad or [0, 0, 0], angles, rotary == "interleaved",
        **options,
    )  # fmt: skip
    table = (None, None) if angles is None else (angles.cos(), angles.sin())
    integers = (None if n is None else torch.tensor(n, dtype=torch.int32) for n in (held, rows, leftpad))
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, *table, *integers, rotary_interleaved=rotary == "interleaved",
        return_softmax_lse=True, **how,
    )  # fmt: skip
    torch.testing.assert_close((out, lse, k_cache, v_cache), expected)


@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=str)
def test_cache_alibi_follows_its_sequence(shape):
    k_cache, v_cache = caches(rows=4)
    q, slopes, held, rows = torch.randn(3, 2, 4, 16, dtype=torch.float64), torch.rand(shape), [5, 2, 9], [3, 0, 2]
    expected = one_by_one(q, k_cache, v_cache, None, None, held, rows, [0] * 3, causal=True, slopes=slopes.double())
    out = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=torch.tensor(held, dtype=torch.int32), causal=True, alibi_slopes=slopes,
        cache_batch_idx=torch.tensor(rows, dtype=torch.int32),
    )  # fmt: skip
    torch.testing.assert_close(out, expected[0])


def test_cache_shared_by_two_sequences_when_only_read():
    k_cache, v_cache = caches()
    q, held, rows = torch.randn(3, 1, 4, 16, dtype=torch.float64), [5, 2, 9], [2, 0, 2]
    expected = one_by_one(q, k_cache, v_cache, None, None, held, rows, [0, 0, 0])
    out = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=torch.tensor(held, dtype=torch.int32),
        cache_batch_idx=torch.tensor(rows, dtype=torch.int32),
    )  # fmt: skip
    torch.testing.assert_close(out, expected[0])


def test_cache_of_no_stated_length_is_full():
    k_cache, v_cache = caches()
    q = torch.randn(3, 1, 4, 16, dtype=torch.float64)
    torch.testing.assert_close(
        flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache), attention(q, k_cache, v_cache)[0]
    )


def test_cache_slots_that_are_not_held_are_not_seen():
    k_cache, v_cache = caches()
    q = torch.randn(3, 1, 4, 16, dtype=torch.float64)
    for held in (5, torch.tensor([5, 3, 8], dtype=torch.int32)):
        clean = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=held)
        dirty_k, dirty_v = k_cache.clone(), v_cache.clone()
        for b, length in enumerate([held] * 3 if isinstance(held, int) else held.tolist()):
            dirty_k[b, length:], dirty_v[b, length:] = math.nan, math.inf
        assert torch.equal(flash_attn.flash_attn_with_kvcache(q, dirty_k, dirty_v, cache_seqlens=held), clean)


def test_decoding_with_the_cache_is_the_whole_attention():
    q, k, v = qkv(tq=10, tk=10)
    whole = flash_attn.flash_attn_func(q, k, v, causal=True)
    k_cache, v_cache = caches(rows=2)
    for t in range(10):
        now = (x[:, t : t + 1] for x in (k, v))
        out = flash_attn.flash_attn_with_kvcache(
            q[:, t : t + 1].requires_grad_(), k_cache, v_cache, *now, cache_seqlens=t, causal=True
        )
        torch.testing.assert_close(out, whole[:, t : t + 1])
        assert not out.requires_grad


# ---- errors ----

INT = {"dtype": torch.int32}
CACHE_ERRORS = {
    "full": (ValueError, "cache_seqlens[1]: expected 0 <= length <= 9, ",
             {"cache_seqlens": torch.tensor([1, 10, 2], **INT)}),
    "negative": (ValueError, "cache_seqlens[0]: expected 0 <= length", {"cache_seqlens": -1}),
    "no_length": (ValueError, "cache_seqlens: expected an int or a tensor where k is given", {"cache_seqlens": None}),
    "float_length": (TypeError, "cache_seqlens: expected int32, got torch.float32", {"cache_seqlens": torch.ones(3)}),
    "lengths": (ValueError, "cache_seqlens: expected shape [3], got [2]", {"cache_seqlens": torch.ones(2, **INT)}),
    "row": (IndexError, "cache_batch_idx[2]: expected 0 <= index < 3, got 3",
            {"cache_batch_idx": torch.tensor([0, 1, 3], **INT)}),
    "rows": (ValueError, "cache_batch_idx: expected distinct caches",
             {"cache_batch_idx": torch.tensor([0, 1, 1], **INT)}),
    "leftpad": (ValueError, "cache_leftpad[1]: expected 0 <= leftpad <= 7, got 8",
                {"cache_leftpad": torch.tensor([0, 8, 0], **INT)}),
    "only_k": (ValueError, "k: expected k and v together", {"v": None}),
    "heads": (ValueError, "v: expected shape [3, 3, 2, 16], got [3, 3, 1, 16]", {"v": torch.zeros(3, 3, 1, 16)}),
    "dtype": (TypeError, "k: expected the cache's torch.float32, got torch.bfloat16",
              {"k": torch.zeros(3, 3, 2, 16).bfloat16()}),
    "half_a_rotation": (ValueError, "rotary_cos: expected rotary_cos, rotary_sin, k and v",
                        {"rotary_cos": torch.ones(12, 8)}),
    "short_table": (IndexError, "rotary_embedding: positions",
                    {"rotary_cos": torch.ones(6, 8), "rotary_sin": torch.ones(6, 8)}),
    "pages": (NotImplementedError, "block_table: expected None, got a tensor: paged caches need "
              "genai_kernels.paged_attention", {"block_table": torch.zeros(3, 1, **INT)}),
    "attention": (ValueError, "alibi_slopes", {"alibi_slopes": torch.ones(7)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CACHE_ERRORS)
def test_cache_error_leaves_the_caches_as_they_were(case):
    kind, text, change = CACHE_ERRORS[case]
    k_cache, v_cache = caches(dtype=torch.float32)
    before = k_cache.clone(), v_cache.clone()
    q, k, v = torch.randn(3, 3, 4, 16), torch.randn(3, 3, 2, 16), torch.randn(3, 3, 2, 16)
    with pytest.raises(kind, match=re.escape(text)):
        flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, **{"k": k, "v": v, "cache_seqlens": 4, **change})
    assert torch.equal(k_cache, before[0])
    assert torch.equal(v_cache, before[1])


def test_errors():
    q, cu = torch.zeros(5, 2, 8), torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"flash_attn_varlen_func: max_seqlen_k: expected at least .* 5, got 4"):
        flash_attn.flash_attn_varlen_func(q, q, q, cu, cu, 5, 4)
    with pytest.raises(NotImplementedError, match="flash_attn_varlen_func: block_table: expected None"):
        flash_attn.flash_attn_varlen_func(q, q, q, cu, cu, 5, 5, block_table=cu)
    with pytest.raises(ValueError, match=re.escape("qkv: expected [batch, tokens, 3, heads, head_dim], got [5, 2, 8]")):
        flash_attn.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match=re.escape("kv: expected [tokens, 2, heads, head_dim], got [5, 3, 2, 8]")):
        flash_attn.flash_attn_varlen_kvpacked_func(q, torch.zeros(5, 3, 2, 8), cu, cu, 5, 5)


# ---- bert_padding, and packages that import flash_attn themselves ----


def test_padding_and_back():
    x = torch.randn(3, 5, 2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]])
    packed, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    assert torch.equal(packed, x[mask.bool()])
    assert (cu_seqlens.tolist(), cu_seqlens.dtype, longest, used.tolist()) == ([0, 3, 3, 6], torch.int32, 3, [3, 0, 3])
    back = pad_input(packed, indices, 3, 5)
    assert torch.equal(back, x * mask[:, :, None, None])
    (gradient,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(gradient, mask[:, :, None, None].expand_as(x).double())

    unused = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]])
    packed, _, cu_seqlens, longest, used = unpad_input(x, mask.bool(), unused.bool())
    assert (len(packed), cu_seqlens.tolist(), longest, used.tolist()) == (8, [0, 4, 4, 8], 4, [3, 0, 3])


def test_index_first_axis_adds_gradients_of_repeated_rows():
    x = torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(index_first_axis(x, torch.tensor([1, 1, 3])).sum(), x)
    assert gradient[:, 0].tolist() == [0, 2, 0, 1]


def test_stands_in_for_the_package():
    program = """
import sys, torch
import genai_kernels.integrations.flash_attn
sys.modules["flash_attn"] = genai_kernels.integrations.flash_attn
import flash_attn
from flash_attn import flash_attn_func
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_varlen_func
assert tuple(map(int, flash_attn.__version__.split("."))) >= (2, 1, 0)
q = torch.randn(1, 4, 2, 8, requires_grad=True)
flash_attn_func(q, q, q, causal=True).sum().backward()
packed, _, cu, longest, _ = unpad_input(q, torch.ones(1, 4))
print(flash_attn_varlen_func(packed, packed, packed, cu, cu, longest, longest).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "torch.Size([4, 2, 8])\n", done.stderr
