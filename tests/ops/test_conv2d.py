"""conv2d beyond its samples: bits, tails, formats, refusals, the module."""

import copy
import pickle
import re

import pytest
import torch
from calls import same_bits
from torch.nn import functional as F

import genai_kernels as gk
from genai_kernels.accuracy import compare
from genai_kernels.nn import Conv2d, ResBlock, UpConv2d, prepack
from genai_kernels.ops.conv2d.reference import conv2d_reference, up_conv2d_reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def first(t):
    return t


each_layout = pytest.mark.parametrize("layout", [first, last], ids=["channels_first", "channels_last"])


def block(n, c, skip, out, size, layout, dtype=torch.float32, seed=0, **geometry):
    """All the tensors of a call with every option."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    height, width = size
    w = make(out, c + skip, 3, 3, scale=(9 * (c + skip)) ** -0.5)
    images = [layout(make(n, k, height, width)) for k in (c, skip, out, out)]  # x, skip, residual, dy
    per_sample = [make(n, k) for k in (c + skip, c + skip, out)]  # scale, shift, channel_bias
    return images, per_sample, [w, make(out), make(c + skip), make(c + skip)]


def results(images, per_sample, shared, groups=4, **options):
    """The output and all gradients, first those that are each image's own."""
    *inputs, dy = images
    x, skip, residual, scale, shift, channel_bias, w, b, nw, nb = leaves = [
        t.detach().requires_grad_() for t in (*inputs, *per_sample, *shared)
    ]
    norm = gk.GroupNormPrologue(groups, nw, nb, scale=scale, shift=shift)
    y = gk.conv2d(
        x, w, b, padding=1, skip=skip, norm=norm, channel_bias=channel_bias, residual=residual, output_scale=0.5,
        **options,
    )  # fmt: skip
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


# several tiles; several images to a tile; blocks of channels; one pixel
SHAPES = [(2, 24, 8, 40, (40, 45)), (9, 16, 4, 33, (6, 6)), (2, 200, 60, 50, (7, 5)), (5, 8, 4, 12, (1, 1))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_layout
def test_same_bits_for_every_thread_count(shape, layout):
    given = block(*shape, layout)
    torch.set_num_threads(1)
    expected = results(*given)
    for threads in (2, 3, 16):
        torch.set_num_threads(threads)
        assert same_bits(results(*given), expected), threads


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_layout
def test_an_image_has_the_same_bits_in_any_batch(shape, layout):
    images, per_sample, shared = block(7, *shape[1:], layout)
    whole = results(images, per_sample, shared)
    for rows in (slice(0, 1), slice(2, 3), slice(3, 7)):
        some = results([t[rows] for t in images], [t[rows] for t in per_sample], shared)
        own = 7  # y, and the gradients of x, skip, residual, scale, shift, channel_bias
        assert same_bits(some[:own], [t[rows] for t in whole[:own]])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_memory_format_changes_no_bit(dtype):
    for shape in SHAPES:
        images, per_sample, shared = block(*shape, first, dtype)
        expected = results(images, per_sample, shared)
        found = results([last(t) for t in images], per_sample, shared)
        assert same_bits(found[:1], expected[:1])
        assert same_bits(found[7:9], expected[7:9])  # dw, db
        packed = {"packed": gk.conv2d_pack(shared[0])}
        assert same_bits(results(images, per_sample, shared, **packed), expected)


def any_call(seed):
    """A convolution of any shape, kernel, stride and padding: x, weight, and the options."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    n, c, out, height, width = pick(1, 3), pick(1, 40), pick(1, 70), pick(1, 13), pick(1, 19)
    kernel, stride, layout = (pick(1, 4), pick(1, 4)), pick(1, 3), (first, last)[pick(0, 1)]
    sides = tuple(pick(0, 3) for _ in range(4))
    if height + sides[2] + sides[3] < kernel[0] or width + sides[0] + sides[1] < kernel[1]:
        sides = (3, 3, 3, 3)
    w = torch.randn(out, c, *kernel, generator=generator) * (c * kernel[0] * kernel[1]) ** -0.5
    return layout(torch.randn(n, c, height, width, generator=generator)), w, {"stride": stride, "padding": sides}


def test_every_tail():
    found = {name: ([], [], []) for name in ("y", "dx", "dw")}
    for seed in range(80):
        x, w, options = any_call(seed)
        for i, dtype in enumerate((torch.float32, torch.float32, torch.float64)):
            leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w)]
            y = (conv2d_reference if i else gk.conv2d)(*leaves, **options)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            for name, t in zip(found, (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True):
                found[name][i].append(t.flatten())
    for name, tensors in found.items():
        verdict = compare(name, *(torch.cat(t) for t in tensors), *((1.0, 1.0) if name == "y" else (1.5, 1.1)))
        assert verdict.ok, f"{name}: {verdict.complaint}"
        worst = (torch.cat(tensors[0]) - torch.cat(tensors[2])).abs().max()
        assert worst < 1e-4, f"{name}: a fault in one call that the others outweigh"


def test_winograd_of_every_tail():
    found = {name: ([], [], []) for name in ("y", "dx")}
    for seed in range(60):
        x, _, options = any_call(seed)
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(seed + 1, x.shape[1], 3, 3, generator=generator) * (9 * x.shape[1]) ** -0.5
        options = {"padding": tuple(max(side, 1) for side in options["padding"])}
        for i, dtype in enumerate((torch.float32, torch.float32, torch.float64)):
            leaf = x.detach().to(dtype).requires_grad_()
            if i:
                y = conv2d_reference(leaf, w.to(dtype), **options)
            else:
                y = gk.conv2d(leaf, w, algorithm="winograd", **options)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            for name, t in zip(found, (y.detach(), *torch.autograd.grad(y, leaf, dy)), strict=True):
                found[name][i].append(t.flatten())
    for name, tensors in found.items():
        verdict = compare(name, *(torch.cat(t) for t in tensors), *((1.0, 1.0) if name == "y" else (1.5, 1.1)))
        assert verdict.ok, f"{name}: {verdict.complaint}"


def test_a_smaller_tile_needs_no_more_scratch():
    """The last tiles of a map have fewer rows: more channels of them would fit in a chunk."""
    for out, size in ((32, (13, 32)), (4, (15, 32)), (8, (41, 33))):
        x, w = last(torch.randn(1, 1280, *size)), torch.randn(out, 1280, 1, 1) / 36
        assert torch.allclose(gk.conv2d(x, w), F.conv2d(x, w), atol=1e-4)


def test_auto_takes_winograd_from_32_channels_on():
    for channels, out, takes in ((31, 64, False), (64, 31, False), (32, 32, True)):
        x, w = last(torch.randn(1, channels, 6, 6)), torch.randn(out, channels, 3, 3)
        auto, named = gk.conv2d(x, w), gk.conv2d(x, w, algorithm="winograd" if takes else "direct")
        assert torch.equal(auto, named)
        assert not torch.equal(auto, gk.conv2d(x, w, algorithm="direct" if takes else "winograd"))
        assert torch.equal(gk.conv2d(x, w, packed=gk.conv2d_pack(w)), auto)


def test_a_direct_pixel_depends_on_what_it_sees_alone():
    """So a map in bands, with what their first and last pixels see beside them, has the bits of the map as a whole."""
    x, w = last(torch.randn(1, 40, 23, 9)), torch.randn(40, 40, 3, 3)
    whole = gk.conv2d(x, w, padding=1, algorithm="direct")
    for begin, end in ((0, 5), (5, 12), (12, 23)):
        top, bottom = max(begin - 1, 0), min(end + 1, 23)
        sides = (1, 1, int(begin == 0), int(end == 23))
        band = gk.conv2d(x[:, :, top:bottom], w, padding=sides, algorithm="direct")
        assert torch.equal(band, whole[:, :, begin:end])


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "winograd"])
def test_nan_and_infinity_stay_where_they_are_seen(direct):
    """In a pixel that sees it; with Winograd's algorithm, in the tile of one."""
    x, w = last(torch.randn(2, 6, 7, 8)), torch.randn(5, 6, 3, 3)
    options = {"padding": 1, "algorithm": "direct" if direct else "winograd"}
    clean = gk.conv2d(x, w, **options)
    x[0, 3, 4, 5], x[1, 0, 0, 0] = torch.nan, torch.inf
    y = gk.conv2d(x, w, **options)
    seen = torch.zeros_like(y, dtype=torch.bool)
    seen[0, :, 3:6, 4:7] = seen[1, :, :2, :2] = True
    assert not y[seen].isfinite().any()
    if not direct:
        seen[0, :, 2:6, 4:8] = True
    assert torch.equal(y[~seen], clean[~seen])


def test_padding_is_added_after_the_norm():
    """A border of zeros, not of normalised zeros."""
    x, w = torch.full((1, 2, 3, 3), 5.0), torch.ones(1, 2, 3, 3)
    norm = gk.GroupNormPrologue(1, None, torch.ones(2), activation="none")
    assert gk.conv2d(x, w, padding=1, norm=norm)[0, 0].tolist() == [[8, 12, 8], [12, 18, 12], [8, 12, 8]]


def test_against_the_library():
    for stride, padding in ((1, 1), (2, 1), (1, 0)):
        x, w, b = torch.randn(2, 16, 9, 9), torch.randn(8, 16, 3, 3), torch.randn(8)
        y = gk.conv2d(x, w, b, stride=stride, padding=padding)
        assert torch.allclose(y, F.conv2d(x, w, b, stride, padding), atol=1e-4)


@each_layout
def test_the_result_has_the_memory_format_of_x(layout):
    x = layout(torch.randn(2, 6, 5, 4)).requires_grad_()
    y = gk.conv2d(x, torch.randn(8, 6, 3, 3), padding=1, norm=gk.GroupNormPrologue(2))
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert y.is_contiguous() is dx.is_contiguous() is (layout is first)
    assert dx.stride() == x.stride()
    meta = gk.conv2d(x.to("meta"), torch.randn(8, 6, 3, 3, device="meta"), padding=1)
    assert meta.stride() == y.stride()


# ---- refusals ----

X, W = torch.randn(2, 6, 4, 5), torch.randn(8, 6, 3, 3)
conv, Norm = gk.conv2d, gk.GroupNormPrologue
REFUSED = {
    "x of three dimensions": (lambda: conv(X[0], W), ValueError, "x: expected [batch, channels, height, width], got"),
    "x of integers": (lambda: conv(X.int(), W), TypeError, "x: expected float32, bfloat16, float16 or float64"),
    "weight of float64": (lambda: conv(X, W.double()), TypeError, "weight: expected the dtype of x, float32"),
    "weight of other channels": (lambda: conv(X, W[:, :5]), ValueError, "weight: expected [out, 6, height, width]"),
    "weight of two dimensions": (lambda: conv(X, W[0, 0]), ValueError, "weight: expected [out, 6, height, width]"),
    "x smaller than the kernel": (lambda: conv(X[:, :, :2], W), ValueError, "x: expected with its padding at least"),
    "stride 0": (lambda: conv(X, W, stride=0), ValueError, "stride: expected >= 1, got 0"),
    "negative padding": (lambda: conv(X, W, padding=(0, -1, 0, 0)), ValueError, "padding: expected >= 0, got (0, -1"),
    "bias of inputs": (lambda: conv(X, W, torch.randn(6)), ValueError, "bias: expected shape [8], got [6]"),
    "skip of another size": (lambda: conv(X, W, skip=X[..., :4]), ValueError, "skip: expected the shape of x"),
    "skip not counted": (lambda: conv(X, W, skip=X), ValueError, "weight: expected [out, 12, height, width]"),
    "skip of float64": (lambda: conv(X, W, skip=X.double()), TypeError, "skip: expected the dtype of x"),
    "residual like x": (
        lambda: conv(X, W, residual=X),
        ValueError,
        "residual: expected the shape of the result, [2, 8",
    ),
    "channel bias of one": (
        lambda: conv(X, W, channel_bias=torch.randn(8)),
        ValueError,
        "channel_bias: expected shape",
    ),
    "groups that do not divide": (lambda: conv(X, W, norm=Norm(4)), ValueError, "num_groups: expected a divisor of"),
    "no groups": (lambda: conv(X, W, norm=Norm(0)), ValueError, "num_groups: expected >= 1, got 0"),
    "norm's weight": (lambda: conv(X, W, norm=Norm(2, X[0, :5, 0, 0])), ValueError, "norm.weight: expected shape [6]"),
    "norm's scale": (lambda: conv(X, W, norm=Norm(2, scale=W[0, 0])), ValueError, "norm.scale: expected shape [2, 6]"),
    "norm's eps": (lambda: conv(X, W, norm=Norm(2, eps=-1.0)), ValueError, "eps: expected >= 0, got -1"),
    "activation unknown": (lambda: conv(X, W, norm=Norm(2, activation="mish")), ValueError, "activation: expected one"),
    "packed of another": (lambda: conv(X, W, packed=gk.conv2d_pack(W[:, :3])), ValueError, "packed: expected what"),
}


@pytest.mark.parametrize(("call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refused(call, error, text):
    before = [X.clone(), W.clone()]
    with pytest.raises(error, match=re.escape(text)) as raised:
        call()
    assert re.fullmatch(r"genai_kernels\.conv2d: [\w.]+: expected [^\n]+, got [^\n]+", str(raised.value))
    assert same_bits([X, W], before)


def test_double_backward_is_refused():
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(gk.conv2d(x, W).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dx.sum().backward()


# ---- torch's machinery ----


@each_layout
def test_opcheck(layout):
    images, (scale, shift, cb), (w, b, nw, nb) = block(2, 8, 4, 6, (5, 4), layout)
    x, skip, residual, _ = (t.detach().requires_grad_() for t in images)
    numbers = (4, 1e-5, 1, 1, 1, 1, 1, 1, 0.5, 0, layout is last, None, 2, 1e-5)
    args = (x, skip, w.requires_grad_(), None, b, nw, nb, scale, shift, cb, residual, *numbers)
    torch.library.opcheck(torch.ops.genai_kernels.conv2d.default, args)
    torch.library.opcheck(
        torch.ops.genai_kernels.conv2d_pack.default, (w.detach(), 1, 2), test_utils=("test_schema", "test_faketensor")
    )


@each_layout
def test_compile_fullgraph(layout):
    torch._dynamo.reset()
    given = block(2, 12, 4, 8, (5, 6), layout)
    compiled = torch.compile(results, fullgraph=False, backend="aot_eager")
    assert same_bits(compiled(*given), results(*given))


# ---- the module ----


def test_module():
    peer = torch.nn.Conv2d(6, 10, 3, stride=2, padding=1)
    layer = Conv2d(6, 10, 3, stride=2, padding=1)
    layer.load_state_dict(peer.state_dict())
    assert torch.allclose(layer(X), peer(X), atol=1e-5)
    down = Conv2d(6, 10, 3, stride=2, padding=(0, 1, 0, 1))
    down.load_state_dict(peer.state_dict())
    assert torch.allclose(down(X), F.conv2d(F.pad(X, (0, 1, 0, 1)), peer.weight, peer.bias, 2), atol=1e-5)
    assert "padding=(0, 1, 0, 1)" in repr(down)


def test_prepacked_weights_are_used_and_dropped():
    layer = prepack(torch.nn.Sequential(Conv2d(6, 10, 3)).eval())[0]
    with torch.no_grad():
        expected = gk.conv2d(X, layer.weight, layer.bias)
        assert layer._ready() is not None
        assert torch.equal(layer(X), expected)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(X), expected)
        layer.weight.mul_(2)
        assert layer._ready() is None
        assert torch.equal(layer(X), gk.conv2d(X, layer.weight, layer.bias))
        layer.prepack()
        layer._packed[1].zero_()  # seen, so it is what is multiplied with
        assert torch.equal(layer(X), layer.bias.detach()[:, None, None].expand_as(expected))
    assert layer._ready() is None, "a gradient is wanted"
    assert layer.train()._packed is None
    layer.eval().prepack()
    assert layer.bfloat16()._packed is None
    with torch.inference_mode():
        layer.prepack()
        assert layer(X.bfloat16()).shape == expected.shape
        made_here = Conv2d(6, 10, 3).eval()
        made_here.prepack()
        assert torch.equal(made_here(X), gk.conv2d(X, made_here.weight, made_here.bias))


# ---- up_conv2d ----


def test_up_conv2d_of_every_tail():
    found = {name: ([], [], []) for name in ("y", "dx", "dw")}
    for seed in range(40):
        x, w, _ = any_call(seed)
        w = torch.randn(w.shape[0], w.shape[1], 3, 3, generator=torch.Generator().manual_seed(seed)) / 3
        for i, dtype in enumerate((torch.float32, torch.float32, torch.float64)):
            leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w)]
            y = (up_conv2d_reference if i else gk.up_conv2d)(*leaves)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            for name, t in zip(found, (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True):
                found[name][i].append(t.flatten())
    for name, tensors in found.items():
        verdict = compare(name, *(torch.cat(t) for t in tensors), *((1.0, 1.0) if name == "y" else (1.5, 1.1)))
        assert verdict.ok, f"{name}: {verdict.complaint}"


@each_layout
def test_up_conv2d_has_the_same_bits_for_threads_and_batches(layout):
    x, w, b = layout(torch.randn(5, 20, 9, 37)), torch.randn(40, 20, 3, 3), torch.randn(40)

    def run(x, threads):
        torch.set_num_threads(threads)
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        y = gk.up_conv2d(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, y.detach())]

    expected = run(x, 1)
    assert expected[0].is_contiguous() is (layout is first)
    for threads in (2, 5):
        assert same_bits(run(x, threads), expected)
    assert same_bits(run(x[3:4], 1)[:2], [t[3:4] for t in expected[:2]])
    assert torch.equal(gk.up_conv2d(x, w, b, packed=gk.up_conv2d_pack(w)), expected[0])


UP_REFUSED = {
    "x of three dimensions": (
        lambda: gk.up_conv2d(X[0], W),
        ValueError,
        "x: expected [batch, channels, height, width]",
    ),
    "weight of 1 x 1": (
        lambda: gk.up_conv2d(X, W[:, :, :1, :1]),
        ValueError,
        "weight: expected [out, 6, 3, 3] for the",
    ),
    "weight of float64": (lambda: gk.up_conv2d(X, W.double()), TypeError, "weight: expected the dtype of x, float32"),
    "bias of inputs": (lambda: gk.up_conv2d(X, W, torch.randn(6)), ValueError, "bias: expected shape [8], got [6]"),
    "packed for conv2d": (lambda: gk.up_conv2d(X, W, packed=gk.conv2d_pack(W)), ValueError, "packed: expected what"),
}


@pytest.mark.parametrize(("call", "error", "text"), UP_REFUSED.values(), ids=UP_REFUSED)
def test_up_conv2d_refuses(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_up_conv2d_in_torchs_machinery():
    args = (X.clone().requires_grad_(), W.clone().requires_grad_(), None, torch.randn(8, requires_grad=True), False)
    torch.library.opcheck(torch.ops.genai_kernels.up_conv2d.default, args)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.genai_kernels.up_conv2d_pack.default, (W,), test_utils=tests)


def test_up_module():
    peer, layer = torch.nn.Conv2d(6, 10, 3, padding=1), UpConv2d(6, 10).eval()
    layer.load_state_dict(peer.state_dict())
    expected = peer(F.interpolate(X, scale_factor=2.0))
    assert torch.allclose(layer(X), expected, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(prepack(layer)(X), layer.train()(X))


# ---- the block ----

BLOCKS = [
    {"temb_channels": 12},
    {"temb_channels": None, "output_scale_factor": 2**0.5},
    {"temb_channels": 12, "time_embedding_norm": "scale_shift", "out_channels": 16},
    {"temb_channels": 12, "out_channels": 24, "activation": "gelu", "eps": 1e-6},
]


def plain_block(block, x, temb):
    """The same in plain PyTorch."""
    act = F.silu if block.activation == "silu" else F.gelu
    e = (
        None
        if block.time_emb_proj is None
        else F.linear(act(temb), block.time_emb_proj.weight, block.time_emb_proj.bias)
    )
    n1, n2 = block.norm1, block.norm2
    h = act(F.group_norm(x, n1.num_groups, n1.weight, n1.bias, n1.eps))
    h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
    h = h + e[:, :, None, None] if e is not None and not block.scale_shift else h
    h = F.group_norm(h, n2.num_groups, n2.weight, n2.bias, n2.eps)
    if block.scale_shift:
        scale, shift = e[:, :, None, None].chunk(2, dim=1)
        h = h * (1 + scale) + shift
    h = F.conv2d(act(h), block.conv2.weight, block.conv2.bias, padding=1)
    s = block.conv_shortcut
    return ((x if s is None else F.conv2d(x, s.weight, s.bias)) + h) / block.output_scale_factor


@pytest.mark.parametrize("options", BLOCKS, ids=str)
@each_layout
def test_block(options, layout):
    """Two inputs as one; outputs and gradients no further from float64 than PyTorch's."""
    channels, found = options.get("out_channels", 12), ([], [], [])
    for seed in range(8):
        torch.manual_seed(seed)
        block = ResBlock(12, groups=4, **options)
        for p in block.parameters():
            torch.nn.init.normal_(p, std=0.3)
        x, temb, dy = layout(torch.randn(3, 12, 7, 6)), torch.randn(3, 12), torch.randn(3, channels, 7, 6)
        exact = copy.deepcopy(block).double()
        for i, module in enumerate((block, block, exact)):
            dtype = next(module.parameters()).dtype
            image = x.detach().to(dtype).requires_grad_()
            if i == 0:
                y = module(image[:, :7], temb, image[:, 7:])
            else:
                y = plain_block(module, image, temb.to(dtype))
            leaves = [image, *module.parameters()]
            found[i].append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))])
    for i in range(len(found[0][0])):
        three = [torch.cat([draw[i].flatten() for draw in draws]) for draws in found]
        verdict = compare(str(i), *three, *((1.0, 1.0) if i == 0 else (1.5, 1.1)), draws=8)
        assert verdict.ok, f"{i}: {verdict.complaint}"


def test_block_is_diffusers():
    resnet = pytest.importorskip("diffusers.models.resnet", reason="diffusers is an optional extra")
    torch.manual_seed(0)
    for norm in ("default", "scale_shift"):
        peer = resnet.ResnetBlock2D(
            in_channels=16, out_channels=32, temb_channels=20, groups=4, eps=1e-5, time_embedding_norm=norm,
            output_scale_factor=2.0,
        )  # fmt: skip
        ours = ResBlock(16, 32, 20, 4, time_embedding_norm=norm, output_scale_factor=2.0)
        ours.load_state_dict(peer.state_dict())
        x, temb = torch.randn(2, 16, 8, 8), torch.randn(2, 20)
        assert torch.allclose(ours(x, temb), peer(x, temb), atol=2e-6)


def test_block_in_training_drops():
    block = ResBlock(8, groups=2, dropout=0.5)
    x = torch.randn(2, 8, 5, 5)
    torch.manual_seed(0)
    first_time, second = block(x), block(x)
    torch.manual_seed(0)
    assert torch.equal(block(x), first_time)
    assert not torch.equal(first_time, second)
    assert torch.equal(block.eval()(x), ResBlock.forward(block, x))
    with pytest.raises(ValueError, match="activation: expected one of silu"):
        ResBlock(8, activation="mish")
