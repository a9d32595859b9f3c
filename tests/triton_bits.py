"""What the Triton kernels promise bit for bit; run by tests/test_triton.py."""

import pytest
import torch
from calls import SAMPLES, build, run, same_bits

import genai_kernels as gk
from genai_kernels.ops.paged_attention.samples import paged
from genai_kernels.registry import OPS, Make

FLOATS = (torch.float32, torch.bfloat16)
LARGEST = {
    op.name: max((s for o, s in SAMPLES if o is op and not s.cpu_only), key=lambda s: len(build(op, s)[1]))
    for op in OPS.values()
}


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


@pytest.mark.parametrize("last", [False, True])
def test_group_norm_of_a_sample_does_not_depend_on_the_others(last):
    x, dy = (torch.randn(3, 6, 5, 4) for _ in range(2))
    if last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    weight = torch.randn(6)

    def both(x, dy):
        x = x.detach().requires_grad_()
        y = gk.group_norm_silu(x, 2, weight)
        return [y.detach(), torch.autograd.grad(y, x, dy)[0]]

    assert same_bits([t[1:2] for t in both(x, dy)], both(x[1:2], dy[1:2]))


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


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_of_linear_does_not_depend_on_the_others(dtype):
    """Forward and dx; rows of other tiles too."""
    x, w, b, dy = (torch.randn(n).to(dtype) for n in ((150, 70), (40, 70), (40,), (150, 40)))

    def both(rows):
        leaf = x[rows].clone().requires_grad_()
        y = gk.linear(leaf, w, b)
        return [y.detach(), *torch.autograd.grad(y, leaf, dy[rows])]

    assert same_bits([t[131:132] for t in both(slice(None))], both(slice(131, 132)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rank", [8, 100])
def test_lora_linear_without_an_adapters_effect_is_linear(dtype, rank):
    x, w, a, b = (torch.randn(n).to(dtype) for n in ((9, 150), (40, 150), (rank, 150), (40, rank)))
    plain = gk.linear(x, w)
    assert same_bits(gk.lora_linear(x, w, a, b * 0), plain)
    assert same_bits(gk.lora_linear(x, w, a, b, scaling=0.0), plain)
    assert not same_bits(gk.lora_linear(x, w, a, b), plain)


@pytest.mark.parametrize("rank", [16, 33])
def test_s_summed_beside_the_product_is_s_summed_alone(rank):
    from genai_kernels.triton_lib.few_bits import Matrix
    from genai_kernels.triton_lib.linear_layer import Adapter, padded, rows_times, shrink

    x, w, a, b = (torch.randn(n).bfloat16() for n in ((140, 150), (70, 150), (rank, 150), (70, rank)))
    alone, beside = shrink(x, a, 0.7), torch.full((140, padded(rank)), float("nan"))
    y = rows_times(x, Matrix(w), None, Adapter(beside, b, a, 0.7))
    assert same_bits(beside, alone)
    assert same_bits(y, rows_times(x, Matrix(w), None, Adapter(alone, b)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_of_many_adapters_is_that_row_with_its_own(dtype):
    """Without one it has the bits of `linear`, with one those of `lora_linear`, whatever beside it is NaN."""
    x, w = torch.randn(200, 150).to(dtype), torch.randn(70, 150).to(dtype)
    pairs = [(torch.randn(r, 150).to(dtype), torch.randn(70, r).to(dtype)) for r in (8, 40, 3)]
    pairs[2][1][:] = float("nan")
    adapters = [gk.LoRAAdapter(a, b, 0.5 + i) for i, (a, b) in enumerate(pairs)]
    ids = torch.arange(200, dtype=torch.int32) % 4 - 1
    mixed = gk.lora_linear_multi(x, w, adapters, ids)
    assert same_bits(mixed[ids < 0], gk.linear(x, w)[ids < 0])
    for i, (a, b) in enumerate(pairs):
        assert same_bits(mixed[ids == i], gk.lora_linear(x, w, a, b, 0.5 + i)[ids == i]), i


@pytest.mark.parametrize("fused", [gk.linear_swiglu, gk.linear_geglu, gk.linear_geglu_tanh], ids=lambda f: f.__name__)
def test_a_gated_layer_in_float32_has_the_bits_of_its_two_steps(fused):
    """Nothing is rounded in between there."""
    gate, last = {"linear_swiglu": (gk.silu_and_mul, False), "linear_geglu": (gk.gelu_and_mul, True)}.get(
        fused.__name__, (gk.gelu_tanh_and_mul, True)
    )
    x, w, b = (t.requires_grad_() for t in (torch.randn(7, 40), torch.randn(78, 40), torch.randn(78)))
    h = gk.linear(x, w, b)
    two = gate(torch.cat(h.chunk(2, -1)[::-1], -1) if last else h)
    dy, one = torch.randn(7, 39), fused(x, w, b)
    assert same_bits([one.detach()], [two.detach()])
    assert same_bits(*(torch.autograd.grad(y, (x, w, b), dy) for y in (one, two)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_of_a_gated_layer_does_not_depend_on_the_others(dtype):
    """Nor on their adapters; and whether backward will come changes nothing."""
    x, w = torch.randn(140, 70).to(dtype), torch.randn(62, 70).to(dtype)
    pairs = [(torch.randn(4, 70).to(dtype), torch.randn(31, 4).to(dtype)) for _ in range(2)]
    adapters = [gk.LoRAAdapter(a, b, 0.5, (31 * i, 31 * i + 31)) for i, (a, b) in enumerate(pairs)]
    ids = torch.tensor([[0, 1], [-1, -1]], dtype=torch.int32).repeat(70, 1)
    y = gk.linear_geglu(x, w, None, adapters, ids)
    assert same_bits(y[1::2], gk.linear_geglu(x[1::2], w))
    assert same_bits(y[130:131], gk.linear_geglu(x[130:131].requires_grad_(), w, None, adapters).detach())
    assert not same_bits(y[::2], gk.linear_geglu(x[::2], w))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_factor_of_one_in_dora_linear_is_lora_linear(dtype):
    """And a row of it is that row alone, backward too; the norm of a row is that of the same row in another weight."""
    x, w, a, b, dy = (torch.randn(n).to(dtype) for n in ((140, 70), (40, 70), (5, 70), (40, 5), (140, 40)))
    norm = gk.dora_norm(w, a, b, 0.5)
    assert same_bits(gk.dora_norm(w[17:19], a, b[17:19], 0.5), norm[17:19])
    assert same_bits(gk.dora_linear(x, w, a, b, norm, 0.5), gk.lora_linear(x, w, a, b, 0.5))

    def both(rows):
        leaf = x[rows].clone().requires_grad_()
        y = gk.dora_linear(leaf, w, a, b, 2 * norm, 0.5, norm=norm)
        return [y.detach(), *torch.autograd.grad(y, leaf, dy[rows])]

    assert same_bits([t[131:132] for t in both(slice(None))], both(slice(131, 132)))


@pytest.mark.parametrize("rank", [3, 70])
def test_dora_norm_of_rows_that_cancel_and_of_few_bits(rank):
    """W + B A is 2^10 times smaller than either: its rows keep what rounding W leaves of them."""
    a, b = torch.randn(rank, 150), torch.randn(20, rank)
    w = (-(b.double() @ a.double()) * (1 + 2.0**-10)).float()
    exact = torch.linalg.vector_norm(w.double() + b.double() @ a.double(), dim=1)
    assert ((gk.dora_norm(w, a, b) - exact).abs() / exact).max() < 2.0**-23
    for quantize in (gk.quantize_int8, gk.quantize_int4, gk.quantize_nf4):
        few = quantize(w)
        assert same_bits(gk.dora_norm(few, a, b), gk.dora_norm(few.dense(), a, b)), quantize


def test_the_gradient_of_a_factor_is_summed_in_parts():
    """Of integers, whose sums are exact, over more rows than one part has."""
    dy, inner = (torch.randint(-3, 4, (300, 9)).float() for _ in range(2))
    scale = torch.arange(9.0)
    d_inner, d_scale = torch.ops.genai_kernels.scale_columns_bwd(dy, scale, inner)
    from genai_kernels.torch_ops import kernel

    ours = kernel("scale_columns_bwd")(dy, scale, inner)
    assert same_bits(ours, [d_inner, d_scale])
    assert same_bits(ours, [dy * scale, (dy * inner).sum(0)])


def test_errors_of_dora_and_of_gated_layers_name_the_op_and_the_argument():
    x, w, a, b = (torch.randn(n) for n in ((3, 20), (5, 20), (2, 20), (5, 2)))
    with pytest.raises(ValueError, match=r"dora_linear: x: expected a last dimension of 20 as weight has, got shape"):
        gk.dora_linear(x[:, :19], w, a, b, torch.ones(5))
    with pytest.raises(ValueError, match=r"dora_norm: lora_b: expected \[5, 2\]"):
        gk.dora_norm(w, a, b[:, :1])
    with pytest.raises(
        ValueError, match=r"linear_geglu: weight: expected \[2 n, in\], a gate and what it .* got 5 rows"
    ):
        gk.linear_geglu(x, w)


def test_lora_linear_multi_refuses_wrong_ids():
    x, w = torch.randn(3, 20), torch.randn(5, 20)
    one = gk.LoRAAdapter(torch.randn(2, 20), torch.randn(5, 2))
    with pytest.raises(IndexError, match=r"adapter_ids\[1, 0\]: expected -1 <= id < 1, got 1"):
        gk.lora_linear_multi(x, w, [one], torch.tensor([0, 1, 0], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"adapter_ids\[2\]: expected an adapter once for each row, got 0 again"):
        gk.lora_linear_multi(x, w, [one], torch.tensor([[0, -1], [-1, 0], [0, 0]], dtype=torch.int32))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16], ids=str)
def test_w8a8_linear_has_the_bits_of_the_cpu(dtype):
    """Exact sums of integers, and the same three operations after them; a row that is not finite is NaN."""
    x, b = (torch.randn(n).to(dtype) for n in ((140, 300), (70,)))
    x[5, 7], x[9, 0], x[11] = float("inf"), float("nan"), 0
    weight = gk.quantize_int8(torch.randn(70, 300))
    found = []
    for backend in ("triton", "cpu"):
        with gk.use_backend(backend):
            found.append(gk.w8a8_linear(x, weight, b))
    finite = torch.isfinite(found[1])
    assert torch.equal(torch.isfinite(found[0]), finite)
    assert not finite[[5, 9]].any()
    assert same_bits(*(y[finite] for y in found))


def test_what_is_ignored_is_not_read():
    """By fused_linear_cross_entropy, on the way there and back."""
    x, w, target = torch.randn(9, 20), torch.randn(30, 20), torch.arange(9)
    target[[2, 5]] = -100
    results = []
    for fill in (0.0, float("nan")):
        leaves = [torch.where((target < 0)[:, None], fill, x).requires_grad_(), w.clone().requires_grad_()]
        loss = gk.fused_linear_cross_entropy(*leaves, target)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert same_bits(*results)
    with pytest.raises(IndexError, match="target: row 3: expected 0 <= class < 30 or ignore_index -100, got 30"):
        gk.fused_linear_cross_entropy(x, w, torch.where(torch.arange(9) == 3, 30, target))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_gradient_of_a_small_weight_is_summed_in_parts(dtype):
    """Of more rows than one part has; integers, whose sums are exact."""
    x, dy = (torch.randint(-2, 3, (1100, n)).to(dtype) for n in (5, 3))
    w = torch.zeros(3, 5, dtype=dtype, requires_grad=True)
    (dw,) = torch.autograd.grad(gk.linear(x, w), w, dy)
    assert same_bits(dw, (dy.double().t() @ x.double()).to(dtype))


def test_a_sampler_step_of_a_sample_does_not_depend_on_the_others():
    x, cond, uncond = (torch.randn(3, 4, 5, 6) for _ in range(3))
    seeds = torch.tensor([3, -4, 2**40])
    step = gk.StepCoefficients(1.3, -0.8, 1.0, x=0.9, x0=0.1, noise=0.2)

    def run(which):
        guided = {"uncond": uncond[which], "guidance_scale": 3.0, "guidance_rescale": 0.5}
        return gk.cfg_step(x[which], cond[which], step, seed=seeds[which], offset=2**32 - 1, **guided)

    assert same_bits(run(slice(None))[1:2], run(slice(1, 2)))


def test_the_noise_of_a_seed_is_that_of_the_cpu():
    """But for the last bits: the CPU fuses multiplications and additions, the interpreter does not."""
    seeds, zero = torch.tensor([3, -4, 2**62 + 1]), torch.zeros(3, 1300)
    drawn = []
    for backend in ("triton", "cpu"):
        with gk.use_backend(backend):
            drawn.append([gk.seeded_normal(seeds, (1300,), offset=2**32 - 1)])
            drawn[-1] += [gk.gaussian_sample_kl(zero, zero, seed=seeds)[0]]
    for ours, theirs in zip(*drawn, strict=True):
        assert ((ours - theirs).abs() <= 4 * 2.0**-23 * theirs.abs()).all()


def test_latents_of_a_sample_do_not_depend_on_the_others():
    mean, logvar, dz = (torch.randn(3, 1100) for _ in range(3))
    seeds = torch.tensor([3, -4, 2**40])

    def both(which):
        leaves = [t[which].clone().requires_grad_() for t in (mean, logvar)]
        z, kl = gk.gaussian_sample_kl(*leaves, seed=seeds[which], offset=5)
        gradients = torch.autograd.grad([z, kl], leaves, [dz[which], torch.ones_like(kl)])
        return [z.detach(), kl.detach(), *gradients]

    assert same_bits([t[1:2] for t in both(slice(None))], both(slice(1, 2)))


def test_timesteps_in_float64():
    """Angles that float32 has no right digit of, forward and backward."""
    t = torch.tensor([1e12 + 0.25, 999.5, 0.0, float("nan")], dtype=torch.float64)
    found = []
    for backend in ("triton", "cpu"):
        leaf = t.clone().requires_grad_()
        with gk.use_backend(backend):
            y = gk.timestep_embedding(leaf, 11, flip_sin_to_cos=True, downscale_freq_shift=0)
            found.append([y.detach(), *torch.autograd.grad(y, leaf, torch.ones_like(y))])
    for ours, theirs in zip(*found, strict=True):
        for i, time in enumerate([1e12, 1e3, 1.0, 1.0]):  # an angle has its last bit, and a sum a few
            assert torch.allclose(ours[i], theirs[i], rtol=0, atol=8 * time * 2.0**-52, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_convolution_of_an_image_does_not_depend_on_the_others(dtype):
    """With a norm and without, which takes pixels of several images together; dx too."""
    x, skip, dy = (torch.randn(3, c, 5, 6).to(dtype) for c in (10, 6, 9))
    w, up = torch.randn(9, 16, 3, 3).to(dtype), torch.randn(7, 10, 3, 3).to(dtype)

    def run(which, norm):
        leaves = [t[which].clone().requires_grad_() for t in (x, skip)]
        y = gk.conv2d(leaves[0], w, skip=leaves[1], padding=1, norm=norm)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy[which]), gk.up_conv2d(x[which], up)]

    for norm in (None, gk.GroupNormPrologue(2)):
        assert same_bits([t[1:2].contiguous() for t in run(slice(None), norm)], run(slice(1, 2), norm))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_gradient_of_a_convolution_is_summed_in_parts(dtype):
    """Of more pixels than one part has; integers, whose sums are exact."""
    x, dy = (torch.randint(-2, 3, (1, n, 34, 33)).to(dtype) for n in (5, 3))
    w = torch.zeros(3, 5, 1, 1, dtype=dtype, requires_grad=True)
    (dw,) = torch.autograd.grad(gk.conv2d(x, w), w, dy)
    expected = dy.double().flatten(2)[0] @ x.double().flatten(2)[0].t()
    assert same_bits(dw, expected.to(dtype)[..., None, None])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_packed_convolution_has_the_same_bits(dtype):
    """Packed where it is used: the CPU packs in another order."""
    x, w = torch.randn(2, 5, 4, 3).to(dtype), torch.randn(32, 5, 3, 3).to(dtype)
    assert same_bits(gk.conv2d(x, w, packed=gk.conv2d_pack(w)), gk.conv2d(x, w))
    assert same_bits(gk.up_conv2d(x, w, packed=gk.up_conv2d_pack(w)), gk.up_conv2d(x, w))
    with gk.use_backend("cpu"):
        packed, up_packed = gk.conv2d_pack(w), gk.up_conv2d_pack(w)
    for function, other in ((gk.conv2d, packed), (gk.up_conv2d, up_packed)):
        with pytest.raises(ValueError, match=r"packed: expected what .*_pack makes of the weight.* on the GPU"):
            function(x, w, packed=other)


def test_conv2d_refuses_winograd():
    x, w = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 3, 3)
    for call in (lambda: gk.conv2d(x, w, algorithm="winograd"), lambda: gk.conv2d_pack(w, algorithm="winograd")):
        with pytest.raises(NotImplementedError, match="algorithm: expected auto or direct, got another"):
            call()


def test_statistics_of_a_convolution_are_those_of_its_result():
    """And, where they are given, the norm's own; not so at another mean."""
    x, w = torch.randn(2, 6, 9, 7), torch.randn(4, 6, 3, 3)
    norm = gk.GroupNormPrologue(2, eps=1e-6)
    y, stats = gk.conv2d(x, w, norm=norm, return_stats=norm)
    assert same_bits(stats, gk.conv2d_stats(y, 2, 1e-6))
    mean, rstd = gk.conv2d_stats(x, 2, 1e-6)
    assert same_bits(gk.conv2d(x, w, norm=norm._replace(stats=(mean, rstd))), y)
    assert not same_bits(gk.conv2d(x, w, norm=norm._replace(stats=(mean + 1, rstd))), y)
