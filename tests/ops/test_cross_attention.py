"""cross_attention: the bits of attention over the projected context, for each image alone."""

import pytest
import torch
from calls import same_bits

import genai_kernels as gk

HEADS, DIM, FEATURES = 4, 40, 48


def inputs(dtype=torch.float32, prompts=2, images=3, tokens=11):
    generator = torch.Generator().manual_seed(1)

    def make(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    weights = [make(HEADS * DIM, FEATURES) * 0.2 for _ in range(2)]
    return make(prompts * images, 20, HEADS, DIM), make(prompts, tokens, FEATURES), weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_are_those_of_attention_on_the_projected_context(dtype):
    q, context, weights = inputs(dtype)
    kv = gk.cross_attention_kv(context, *weights, HEADS)
    out = gk.cross_attention(q, kv)
    for image in range(q.shape[0]):
        own = context[image // 3 : image // 3 + 1]
        k, v = (gk.linear(own, w).view(1, -1, HEADS, DIM) for w in weights)
        assert same_bits(out[image : image + 1], gk.flash_attention(q[image : image + 1], k, v))


def test_gradients_are_those_of_the_composition():
    q, context, weights = inputs(torch.float64)
    leaves = [t.requires_grad_() for t in (q, context, *weights)]
    bias = torch.randn(HEADS * DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 7:] = False
    kv = gk.cross_attention_kv(context, *weights, HEADS, k_bias=bias, v_bias=bias, mask=mask)
    ours = gk.cross_attention(q, kv, softmax_scale=0.3)
    k, v = (torch.nn.functional.linear(context, w, bias).view(2, 11, HEADS, DIM) for w in weights)
    k, v = (t.repeat_interleave(3, dim=0) for t in (k, v))
    seen = mask.repeat_interleave(3, dim=0)[:, None, None]
    peer = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=seen, scale=0.3
    ).transpose(1, 2)
    cotangent = torch.randn_like(peer)
    found, expected = (torch.autograd.grad(y, [*leaves, bias], cotangent) for y in (ours, peer))
    torch.testing.assert_close(ours, peer)  # float64, at PyTorch's own tolerance for it
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_twin_is_used_where_it_is_asked_for():
    q, context, weights = inputs()
    with gk.use_backend("reference"):
        kv = gk.cross_attention_kv(context, *weights, HEADS)
        out = gk.cross_attention(q, kv)
        assert torch.equal(kv.k, torch.nn.functional.linear(context, weights[0]).view(2, 11, HEADS, DIM))
    assert (out - gk.cross_attention(q, kv)).abs().max() < 1e-5 * out.abs().max()


def test_errors_name_what_is_wrong():
    q, context, weights = inputs()
    kv = gk.cross_attention_kv(context, *weights, HEADS)
    with pytest.raises(ValueError, match=r"genai_kernels.cross_attention: q: expected .* multiple of the 2 prompts"):
        gk.cross_attention(q[:5], kv)
    with pytest.raises(ValueError, match=r"k_weight: expected \[heads \* head_dim, features\] with 7 heads"):
        gk.cross_attention_kv(context, *weights, 7)
    with pytest.raises(ValueError, match=r"context: expected \[prompts, tokens, features\], got shape \[11, 48\]"):
        gk.cross_attention_kv(context[0], *weights, HEADS)
    with pytest.raises(ValueError, match=r"mask: expected bool \[2, 11\]"):
        gk.cross_attention_kv(context, *weights, HEADS, mask=torch.ones(2, 11))
