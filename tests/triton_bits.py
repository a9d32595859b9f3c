"""What the Triton kernels promise bit for bit; run by tests/test_triton.py."""

import pytest
import torch
from calls import SAMPLES, build, run, same_bits

import genai_kernels as gk
from genai_kernels.ops.paged_attention.samples import paged
from genai_kernels.registry import OPS, Make

FLOATS = (torch.float32, torch.bfloat16)
LARGEST = {op.name: max((s for o, s in SAMPLES if o is op), key=lambda s: len(build(op, s)[1])) for op in OPS.values()}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_the_same_bits_again(op, dtype):
    """Of the sample with the most options."""
    results = [run(op.function, build(op, LARGEST[op.name], dtype)) for _ in range(2)]
    assert same_bits(*results)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dropout_drops_what_the_cpu_drops(dtype):
    """Equal scores, and the unit matrix for V and for dout: out and dv show each probability by itself."""
    options = {"dropout_p": 0.3, "seed": 2**40 + 5, "offset": 7}
    kept = []
    for backend in ("triton", "cpu"):
        q, k = (torch.zeros(2, n, 2, 16, dtype=dtype) for n in (100, 60))
        v, dout = (torch.eye(n, 100, dtype=dtype)[None, :, None].repeat(2, 1, 2, 1) for n in (60, 100))
        v.requires_grad_()
        with gk.use_backend(backend):
            out = gk.flash_attention(q, k, v, **options)
            (dv,) = torch.autograd.grad(out, v, dout)
        kept.append((out != 0, dv != 0))
    for ours, theirs in zip(*kept, strict=True):
        assert 0.6 < ours[..., :60].float().mean() < 0.8
        assert torch.equal(ours, theirs)


def attend(q, k, v, dout, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = gk.flash_attention(*leaves, causal=True, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_of_a_sequence_does_not_depend_on_the_others(dtype):
    q, k, v, dout = (torch.randn(3, 90, 2, 24).to(dtype) for _ in range(4))
    together = attend(q, k, v, dout)
    for b in range(3):
        alone = attend(*(t[b : b + 1] for t in (q, k, v, dout)))
        assert same_bits([t[b : b + 1].contiguous() for t in together], alone)
    packed = [t.flatten(0, 1).requires_grad_() for t in (q, k, v)]
    lengths = torch.arange(4, dtype=torch.int32) * 90
    out = gk.flash_attention_varlen(*packed, lengths, lengths, causal=True)
    gradients = torch.autograd.grad(out, packed, dout.flatten(0, 1))
    assert same_bits([t.view(3, 90, 2, 24) for t in (out.detach(), *gradients)], together)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_of_a_query_does_not_depend_on_the_chunk(dtype):
    q, k, v, dout = (torch.randn(1, 200, 2, 24).to(dtype) for _ in range(4))
    whole = attend(q, k, v, dout)
    for first in (37, 150):
        chunk = attend(q[:, first:], k, v, dout[:, first:])
        assert same_bits([t[:, first:].contiguous() for t in whole[:2]], chunk[:2])  # out and dq


@pytest.mark.parametrize("norm", [gk.rms_norm, gk.layer_norm], ids=["rms_norm", "layer_norm"])
def test_a_norm_of_a_row_does_not_depend_on_the_others(norm):
    x, dy = torch.randn(150, 70), torch.randn(150, 70)

    def both(rows):
        leaf = x[rows].clone().requires_grad_()
        y = norm(leaf)
        return [y.detach(), *torch.autograd.grad(y, leaf, dy[rows])]

    assert same_bits([t[71:].contiguous() for t in both(slice(None))], both(slice(71, None)))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16], ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
def test_paged_attention_of_a_token_does_not_depend_on_the_others(dtype, int8):
    """Alone, a program for each range; in a chunk of many, one program for all ranges; in a mixed batch."""
    new = [1, 90, 2]
    (q, k, v, table, lens), options = paged(Make(dtype), [700, 1100, 530], new, heads=6, kv_heads=2, int8=int8)
    bounds = options.pop("cu_seqlens_q")
    together = gk.paged_attention(q, k, v, table, lens, cu_seqlens_q=bounds, return_lse=True, **options)
    for b, token in ((0, 0), (1, 0), (1, 41), (1, 89), (2, 0)):
        at, length = int(bounds[b]) + token, lens[b : b + 1] - (new[b] - 1 - token)
        alone = gk.paged_attention(q[at : at + 1], k, v, table[b : b + 1], length, return_lse=True, **options)
        assert same_bits(alone, [together[0][at : at + 1], together[1][:, at : at + 1].contiguous()]), (b, token)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_append_kv_cache_rotates_as_rotary_embedding_does(dtype, interleaved):
    k, angle = torch.randn(20, 2, 34).to(dtype), torch.randn(20, 15)
    caches = torch.zeros(2, 5, 4, 2, 34, dtype=dtype)
    tables = {"cos": angle.cos(), "sin": angle.sin(), "interleaved": interleaved}
    gk.append_kv_cache(k, k, *caches, torch.arange(20), **tables)
    assert same_bits(caches[0].flatten(0, 1), gk.rotary_embedding(k, **tables))
    assert same_bits(caches[1].flatten(0, 1), k)


def test_append_kv_cache_quantizes_as_the_cpu_does():
    k = torch.randn(9, 2, 40) * torch.logspace(-42, 30, 9)[:, None, None]
    k[3, 0, 7], k[4, 1, 0], k[5, 0] = float("nan"), float("inf"), 0
    found = []
    for backend in ("triton", "cpu"):
        caches, scales = torch.zeros(2, 3, 4, 2, 40, dtype=torch.int8), torch.zeros(2, 3, 4, 2)
        with gk.use_backend(backend):
            gk.append_kv_cache(k, 2 * k, *caches, torch.arange(9), k_scale=scales[0], v_scale=scales[1])
        found.append([caches, scales.nan_to_num(-1.0)])
    assert same_bits(*found)
