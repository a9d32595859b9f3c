"""The same bits: from run to run, for any number of threads, and whatever else a sequence or row is computed with."""

import pytest
import torch
from calls import SAMPLE_IDS, SAMPLES, bits, build, run, same_bits

import genai_kernels as gk

THREADS = (1, 2, 3, 5, 8, 16)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("op", "sample"), SAMPLES, ids=SAMPLE_IDS)
def test_repeats_and_threads(op, sample):
    call = build(op, sample, torch.float32)
    torch.set_num_threads(1)
    expected = run(op.function, call)
    for threads in (*THREADS, 1):
        torch.set_num_threads(threads)
        assert same_bits(run(op.function, call), expected), f"{threads} threads"


def test_a_thousand_repeats_with_as_many_threads_as_there_are():
    """Fewer heads than threads: backward is then cut by keys and rows, which are handed out by chance."""
    torch.set_num_threads(4)
    q, k, v = (torch.randn(1, 150, h, 16, requires_grad=True) for h in (2, 1, 1))
    call = ((q, k, v), {"causal": True, "return_lse": True})
    expected = run(gk.flash_attention, call)
    for _ in range(1000):
        assert same_bits(run(gk.flash_attention, call), expected)


# ---- attention: a sequence alone, in a batch, padded, packed, in chunks ----


def attention_case(name, queries, keys, heads, dtype):
    """Options of one call, and the tensors among them that are cut with the queries and keys."""
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(1, heads, queries, keys, generator=generator).to(dtype)
    return {
        "plain": {},
        "causal": {"causal": True},
        "window": {"window_size": (37, 11)},
        "window_causal": {"window_size": (70, -1), "causal": True},
        "softcap_sink": {"softcap": 4.0, "sink": torch.linspace(-1, 1, heads), "causal": True},
        "alibi": {"alibi_slopes": torch.linspace(0.1, 0.5, heads), "causal": True},
        "bias": {"attn_bias": bias},
        "mask": {"attn_mask": torch.rand(1, 1, queries, keys, generator=generator) < 0.8, "causal": True},
    }[name]


OPTIONS = ["plain", "causal", "window", "window_causal", "softcap_sink", "alibi", "bias", "mask"]
each_option = pytest.mark.parametrize("options", OPTIONS)
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def tokens(*shape, dtype):
    return torch.randn(shape).to(dtype).requires_grad_()


def attend(q, k, v, dout, dlse, **options):
    """out, lse, dq, dk, dv."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out, lse = gk.flash_attention(q, k, v, return_lse=True, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], [q, k, v], [dout, dlse])]


@each_dtype
@each_option
def test_a_sequence_alone_and_in_a_batch_at_any_position(options, dtype):
    queries, keys, heads = 83, 131, 4
    options = attention_case(options, queries, keys, heads, dtype)
    q, k, v = tokens(7, queries, heads, 24, dtype=dtype), *(tokens(7, keys, 2, 24, dtype=dtype) for _ in range(2))
    dout, dlse = torch.randn(7, queries, heads, 24).to(dtype), torch.randn(7, heads, queries)
    torch.set_num_threads(3)
    whole = attend(q, k, v, dout, dlse, **options)
    for picked in ([0], [3], [6], [5, 1], [2, 2, 4]):
        part = attend(*(t[picked] for t in (q, k, v, dout, dlse)), **options)
        assert same_bits(part, [t[picked] for t in whole])


@each_dtype
@each_option
def test_heads_alone_and_together(options, dtype):
    """Query heads 2 i and 2 i + 1 share key head i: the group alone gives the bits of the group among others."""
    queries, keys, heads = 61, 70, 6
    options = attention_case(options, queries, keys, heads, dtype)
    q, k, v = tokens(2, queries, heads, 24, dtype=dtype), *(tokens(2, keys, 3, 24, dtype=dtype) for _ in range(2))
    dout, dlse = torch.randn(2, queries, heads, 24).to(dtype), torch.randn(2, heads, queries)
    out, lse, dq, dk, dv = attend(q, k, v, dout, dlse, **options)
    for group in range(3):
        of, key = slice(2 * group, 2 * group + 2), slice(group, group + 1)
        own = dict(options)
        for name in ("sink", "alibi_slopes"):
            if name in own:
                own[name] = own[name][of]
        if "attn_bias" in own:
            own["attn_bias"] = own["attn_bias"][:, of]
        part = attend(q[:, :, of], k[:, :, key], v[:, :, key], dout[:, :, of], dlse[:, of], **own)
        expected = [out[:, :, of], lse[:, of], dq[:, :, of], dk[:, :, key], dv[:, :, key]]
        assert same_bits(part, expected)


@each_dtype
@pytest.mark.parametrize("options", ["plain", "causal", "window", "window_causal", "softcap_sink", "alibi"])
def test_packed_gives_the_bits_of_each_sequence_alone(options, dtype):
    heads, lengths_q, lengths_k = 4, [5, 0, 97, 1, 64, 33], [5, 7, 97, 80, 0, 200]
    options = attention_case(options, 1, 1, heads, dtype)
    q, k, v = tokens(200, heads, 24, dtype=dtype), *(tokens(389, 2, 24, dtype=dtype) for _ in range(2))
    cu_q, cu_k = (torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32) for n in (lengths_q, lengths_k))
    dout, dlse = torch.randn(200, heads, 24).to(dtype), torch.randn(heads, 200)
    torch.set_num_threads(2)
    out, lse = gk.flash_attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, **options)
    dq, dk, dv = torch.autograd.grad([out, lse], [q, k, v], [dout, dlse])
    for b in range(len(lengths_q)):
        at, key = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = attend(q[None, at], k[None, key], v[None, key], dout[None, at], dlse[None, :, at], **options)
        assert same_bits(alone, [out[None, at], lse[None, :, at], dq[None, at], dk[None, key], dv[None, key]])


@each_dtype
def test_padding_at_the_right_changes_no_bit(dtype):
    """Keys past the end of a sequence hidden by a mask, against the sequence without them."""
    q, dout, dlse = tokens(1, 50, 4, 24, dtype=dtype), torch.randn(1, 50, 4, 24).to(dtype), torch.randn(1, 4, 50)
    k, v = (tokens(1, 300, 2, 24, dtype=dtype) for _ in range(2))
    for keys in (1, 7, 64, 65, 131, 256, 299):
        own = torch.ones(1, 1, 1, keys, dtype=torch.bool)  # the masked path for both
        alone = attend(q, k[:, :keys], v[:, :keys], dout, dlse, attn_mask=own)
        padded = attend(q, k, v, dout, dlse, attn_mask=torch.arange(300).view(1, 1, 1, -1) < keys)
        for t in padded[3:]:
            assert not t[:, keys:].any()
        assert same_bits([*padded[:3], *(t[:, :keys] for t in padded[3:])], alone), keys


@each_dtype
@pytest.mark.parametrize("window", [(-1, -1), (90, -1)], ids=["causal", "window"])
def test_queries_in_chunks(window, dtype):
    """Chunked prefill: chunk i of the queries against keys[:end] has the bits of the whole call's rows."""
    q, k, v = tokens(2, 301, 4, 40, dtype=dtype), *(tokens(2, 301, 2, 40, dtype=dtype) for _ in range(2))
    out, lse = gk.flash_attention(q, k, v, causal=True, window_size=window, return_lse=True)
    for size in (1, 5, 48, 64, 100):
        for begin in range(0, 301, size if size > 5 else 37):
            end = min(301, begin + size)
            part = gk.flash_attention(
                q[:, begin:end], k[:, :end], v[:, :end], causal=True, window_size=window, return_lse=True
            )
            assert same_bits(part, [out[:, begin:end], lse[:, :, begin:end]]), (begin, end)


@each_dtype
def test_layout_changes_no_bit(dtype):
    q, k, v = tokens(2, 45, 4, 24, dtype=dtype), *(tokens(2, 77, 2, 24, dtype=dtype) for _ in range(2))
    dout, dlse = torch.randn(2, 45, 4, 24).to(dtype), torch.randn(2, 4, 45)
    expected = attend(q, k, v, dout, dlse, causal=True)

    def strided(t):
        holey = torch.full((*t.shape, 3), torch.nan, dtype=t.dtype)[..., 1]
        return holey.copy_(t.detach())

    def heads_first(t):
        return t.detach().transpose(1, 2).contiguous().transpose(1, 2)

    for layout in (strided, heads_first):
        ours = attend(layout(q), layout(k), layout(v), layout(dout), strided(dlse), causal=True)
        assert same_bits(ours, expected)


def test_expanded_keys_and_cotangent():
    q = tokens(3, 20, 4, 16, dtype=torch.float32)
    k, v = (torch.randn(1, 33, 1, 16).expand(3, 33, 4, 16) for _ in range(2))
    one = torch.ones(()).expand(3, 20, 4, 16)
    dlse = torch.zeros(()).expand(3, 4, 20)
    expanded = attend(q, k, v, one, dlse, causal=True)
    assert same_bits(
        expanded, attend(q, k.contiguous(), v.contiguous(), one.contiguous(), dlse.contiguous(), causal=True)
    )


# ---- merging, rows ----


@each_dtype
def test_merged_rows_alone_and_together(dtype):
    o_a, o_b = (torch.randn(5, 30, 3, 20).to(dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(5, 3, 30) * 3 for _ in range(2))
    whole = gk.merge_attention_states(o_a, lse_a, o_b, lse_b)
    for b, token in ((slice(0, 1), slice(0, 1)), (slice(4, 5), slice(7, 30)), (slice(1, 3), slice(29, 30))):
        part = gk.merge_attention_states(o_a[b, token], lse_a[b, :, token], o_b[b, token], lse_b[b, :, token])
        assert same_bits(part, [whole[0][b, token], whole[1][b, :, token]])


NORMS = {
    "rms_norm": lambda x, r, w, b: (gk.rms_norm(x, w),),
    "fused_add_rms_norm": lambda x, r, w, b: gk.fused_add_rms_norm(x, r, w),
    "layer_norm": lambda x, r, w, b: (gk.layer_norm(x, w, b),),
    "layer_norm_residual": lambda x, r, w, b: gk.layer_norm(x, w, b, residual=r),
    "silu_and_mul": lambda x, r, w, b: (gk.silu_and_mul(x),),
    "gelu_and_mul": lambda x, r, w, b: (gk.gelu_and_mul(x),),
    "gelu_tanh_and_mul": lambda x, r, w, b: (gk.gelu_tanh_and_mul(x),),
}


def row_call(call, x, r, w, b, seed_of_row):
    """Outputs and the gradients of the rows; every row's cotangent follows from its own seed."""
    x, r = (t.detach().requires_grad_() for t in (x, r))
    outputs = call(x, r, w, b)
    cotangents = []
    for i, o in enumerate(outputs):
        rows = [torch.randn(o.shape[-1], generator=torch.Generator().manual_seed(s + 1000 * i)) for s in seed_of_row]
        cotangents.append(torch.stack(rows).to(o.dtype))
    found = torch.autograd.grad(outputs, [x, r], cotangents, allow_unused=True)
    return [o.detach() for o in outputs] + [g for g in found if g is not None]


@each_dtype
@pytest.mark.parametrize("call", NORMS.values(), ids=NORMS)
def test_a_row_and_its_gradient_alone_and_in_any_batch(call, dtype):
    rows, n = 41, 214
    x, r = (torch.randn(rows, n).to(dtype) for _ in range(2))
    w, b = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    whole = row_call(call, x, r, w, b, range(rows))
    for picked in ([0], [40], [7, 8], [3, 1, 40, 0, 2], list(range(13, 30))):
        part = row_call(call, x[picked], r[picked], w, b, picked)
        assert same_bits(part, [t[picked] for t in whole]), picked


@each_dtype
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_tokens_alone_and_with_positions(interleaved, dtype):
    x, angle = torch.randn(2, 40, 3, 28).to(dtype), torch.randn(40, 10)
    cos, sin = angle.cos(), angle.sin()
    whole = gk.rotary_embedding(x, cos, sin, interleaved=interleaved)
    for at in (slice(0, 1), slice(17, 40), slice(39, 40)):
        part = gk.rotary_embedding(x[:, at], cos[at], sin[at], interleaved=interleaved)
        assert torch.equal(bits(part), bits(whole[:, at]))
    order = torch.randperm(40)
    shuffled = gk.rotary_embedding(x[:, order], cos, sin, order, interleaved=interleaved)
    assert torch.equal(bits(shuffled), bits(whole[:, order]))
