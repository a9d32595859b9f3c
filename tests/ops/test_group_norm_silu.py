"""group_norm_silu and group_norm_stats beyond their samples: bits, layouts, refusals, memory, the module."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import same_bits
from torch.nn import functional as F

import genai_kernels as gk
from genai_kernels.accuracy import compare
from genai_kernels.nn import GroupNormSiLU

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROOT = Path(__file__).resolve().parent.parent.parent


def last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def first(t):
    return t


each_layout = pytest.mark.parametrize("layout", [first, last], ids=["channels_first", "channels_last"])
# small groups; groups of several chunks; fewer groups than threads, so that threads share one
SHAPES = [((5, 24, 9, 7), 24), ((3, 12, 48, 65), 3), ((1, 64, 40, 128), 2), ((2, 6, 130, 131), 1), ((7, 20), 4)]


def everything(shape, groups, layout, dtype, seed=0):
    """All the tensors of a call with every option, those of an image in a layout."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    n, c = shape[:2]
    images = [layout(make(*shape)) for _ in range(4)]
    return images, [make(c), make(c), make(n, c), make(n, c)]


def results(images, parameters, groups, activation="silu"):
    """Outputs, statistics and gradients."""
    x, residual, dy, dsum = images
    leaves = [t.detach().requires_grad_() for t in (x, residual, *parameters)]
    y, s = gk.group_norm_silu(
        leaves[0], groups, *leaves[2:4], scale=leaves[4], shift=leaves[5], residual=leaves[1], activation=activation
    )
    return [y.detach(), s.detach(), *gk.group_norm_stats(x, groups), *torch.autograd.grad([y, s], leaves, [dy, dsum])]


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_layout
def test_same_bits_for_every_thread_count(shape, groups, dtype, layout):
    """Threads share slabs, blocks of a slab, or neither: which of them, depends on how many there are."""
    given = everything(shape, groups, layout, dtype)
    torch.set_num_threads(1)
    expected = results(*given, groups)
    for threads in (2, 3, 7, 16):
        torch.set_num_threads(threads)
        assert same_bits(results(*given, groups), expected), threads


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
@each_layout
def test_a_sample_has_the_same_bits_in_any_batch(shape, groups, layout):
    images, (w, b, scale, shift) = everything((6, *shape[1:]), groups, layout, torch.float32)
    whole = results(images, (w, b, scale, shift), groups)
    per_sample = (0, 1, 2, 3, 4, 5, 8, 9)  # y, sum, mean, rstd, dx, dresidual, dscale, dshift
    for rows in (slice(0, 1), slice(2, 3), slice(3, 6)):
        some = results([t[rows] for t in images], (w, b, scale[rows], shift[rows]), groups)
        assert same_bits([some[i] for i in per_sample], [whole[i][rows] for i in per_sample])


@each_layout
def test_a_group_does_not_see_the_others(layout):
    x = layout(torch.randn(2, 12, 5, 9))
    spoilt = x.clone(memory_format=torch.preserve_format)
    spoilt[:, 4:8] = torch.nan
    spoilt[1, 8:] = torch.inf
    y, clean = gk.group_norm_silu(spoilt, 3), gk.group_norm_silu(x, 3)
    assert same_bits(y[:, :4], clean[:, :4])
    assert same_bits(y[0, 8:], clean[0, 8:])
    assert y[:, 4:8].isnan().all()
    assert y[1, 8:].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_layout
def test_the_residual_is_added_before_everything_else(dtype, layout):
    """And so, bit for bit, the norm of the sum that is returned."""
    x, r = (layout(torch.randn(2, 24, 7, 9).to(dtype)) for _ in range(2))
    y, s = gk.group_norm_silu(x, 4, residual=r)
    assert same_bits(s, x + r)
    assert same_bits(y, gk.group_norm_silu(x + r, 4))


@pytest.mark.parametrize("shape", [(2, 12, 6, 5), (2, 12, 31), (2, 12, 3, 4, 5), (3, 12), (2, 12, 1, 1)], ids=str)
@each_layout
def test_the_result_has_the_memory_format_of_x(shape, layout):
    x = layout(torch.randn(shape)).requires_grad_()
    y, s = gk.group_norm_silu(x, 3, residual=torch.randn(shape))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.stride() == s.stride() == dx.stride() == x.stride()
    fake = x.to("meta")
    assert gk.group_norm_silu(fake, 3).stride() == gk.group_norm_silu(x, 3).stride()


@each_layout
def test_other_strides_give_the_same_bits(layout):
    (x, r, dy, dsum), parameters = everything((3, 12, 6, 10), 3, layout, torch.float32)
    expected = results((x, r, dy, dsum), parameters, 3)

    def holey(t):
        wide = torch.full((2 * t.shape[0], *t.shape[1:]), torch.nan)
        wide = layout(wide)[::2]
        return wide.copy_(t)

    assert holey(x).stride(0) != x.stride(0)
    assert same_bits(results([holey(t) for t in (x, r, dy, dsum)], parameters, 3), expected)
    strided = [p.new_full((*p.shape, 2), torch.nan)[..., 0].copy_(p) for p in parameters]
    assert same_bits(results((x, r, dy, dsum), strided, 3), expected)
    other = first if layout is last else last
    assert same_bits(results((x, other(r), other(dy).contiguous(), dsum), parameters, 3), expected)
    by_hand = gk.group_norm_silu(x.transpose(2, 3).contiguous().transpose(2, 3), 3)
    assert same_bits(by_hand, gk.group_norm_silu(x.contiguous(), 3))


@pytest.mark.parametrize("mean", [0.0, 100.0, -3000.0])
@each_layout
@pytest.mark.parametrize("size", [24, 100])
def test_a_large_mean_costs_no_digits(mean, layout, size):
    """In either layout as exact as at mean 0: at mean/std = 100 PyTorch's channels_last has lost four digits."""
    x = layout(torch.randn(4, 32, size, size) + mean)
    y = gk.group_norm_silu(x, 8, activation="none")
    exact = F.group_norm(x.double(), 8, eps=1e-5)
    assert (y.double() - exact).abs().max() < 4 * 2**-24 * exact.abs().max()
    mean_of, rstd = gk.group_norm_stats(x, 8)
    groups = x.double().reshape(4, 8, -1)
    # its own rounding, and a fiftieth of that of a deviation
    off = (mean_of.double() - groups.mean(-1)).abs()
    assert (off <= 2**-24 * (groups.mean(-1).abs() + groups.std(-1) / 50)).all()
    assert torch.allclose(rstd.double(), (groups.var(-1, correction=0) + 1e-5).rsqrt(), rtol=2**-23, atol=0)


@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh", "relu"])
def test_every_tail(activation):
    """Every width of a group and every number of pixels from 1 to 40, in both layouts, judged together."""
    found = {way: ([], [], []) for way in ("y", "dx")}
    for n in range(1, 41):
        for layout in (first, last):
            shape = (2, 2 * (7 * n % 40 + 1), n)
            x, dy, b = layout(torch.randn(shape)), layout(torch.randn(shape)), torch.randn(shape[1])
            for i, dtype in enumerate((torch.float32, torch.float32, torch.float64)):
                leaf = x.detach().to(dtype).requires_grad_()
                with gk.use_backend("reference" if i else "auto"):
                    y = gk.group_norm_silu(leaf, 2, None, b.to(dtype), activation=activation)
                found["y"][i].append(y.detach().flatten())
                found["dx"][i].append(torch.autograd.grad(y, leaf, dy.to(dtype))[0].flatten())
    for name, k, k_rms in (("y", 1.0, 1.0), ("dx", 1.5, 1.1)):
        verdict = compare(name, *(torch.cat(t) for t in found[name]), k, k_rms)
        assert verdict.ok, f"{name}: {verdict.complaint}"


@each_layout
def test_no_pixels(layout):
    x = layout(torch.randn(2, 6, 0, 4)).requires_grad_()
    w, scale = torch.randn(6, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    y = gk.group_norm_silu(x, 3, w, scale=scale)
    dx, dw, dscale = torch.autograd.grad(y.sum(), (x, w, scale))
    assert y.shape == dx.shape == x.shape
    assert same_bits([dw, dscale], [torch.zeros(6), torch.zeros(2, 6)])
    mean, rstd = gk.group_norm_stats(x.detach(), 3, eps=0.25)
    assert same_bits([mean, rstd], [torch.zeros(2, 3), torch.full((2, 3), 2.0)])


def test_only_one_of_the_two_results_is_used():
    x, r = torch.randn(2, 6, 5, requires_grad=True), torch.randn(2, 6, 5, requires_grad=True)
    y, s = gk.group_norm_silu(x, 2, residual=r)
    alone = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    both = torch.autograd.grad(y.sum() + (2 * s).sum(), x, retain_graph=True)[0]
    assert torch.allclose(both, alone + 2, atol=1e-6)
    assert torch.equal(torch.autograd.grad((2 * s).sum(), r)[0], torch.full_like(r, 2))


# ---- refusals ----

X, W = torch.randn(2, 6, 4, 5), torch.randn(6)
norm, stats = gk.group_norm_silu, gk.group_norm_stats
REFUSED = {
    "x of one dimension": (lambda: norm(W, 2), ValueError, "silu: x: expected [batch, channels, ...], got shape [6]"),
    "x of integers": (lambda: norm(X.int(), 2), TypeError, "silu: x: expected float32, bfloat16, float16 or float64"),
    "groups that do not divide": (lambda: norm(X, 4), ValueError, "num_groups: expected a divisor of the 6 channels"),
    "no groups": (lambda: norm(X, 0), ValueError, "num_groups: expected a divisor of the 6 channels of x, got 0"),
    "groups of stats": (lambda: stats(X, 4), ValueError, "stats: num_groups: expected a divisor of the 6 channels"),
    "negative eps": (lambda: norm(X, 2, eps=-1.0), ValueError, "eps: expected >= 0, got -1"),
    "eps of nan": (lambda: stats(X, 2, eps=float("nan")), ValueError, "eps: expected >= 0, got nan"),
    "weight of a group": (lambda: norm(X, 2, W[:3]), ValueError, "weight: expected shape [6], the channels of x, got"),
    "bias of pixels": (lambda: norm(X, 2, W, torch.randn(5)), ValueError, "bias: expected shape [6], the channels"),
    "weight of integers": (lambda: norm(X, 2, W.int()), TypeError, "weight: expected float32"),
    "scale of channels": (lambda: norm(X, 2, scale=W), ValueError, "scale: expected shape [2, 6], the samples and"),
    "shift of one sample": (lambda: norm(X, 2, shift=W[None]), ValueError, "shift: expected shape [2, 6], the samples"),
    "scale of pixels": (lambda: norm(X, 2, scale=X), ValueError, "scale: expected shape [2, 6], the samples"),
    "residual broadcast": (lambda: norm(X, 2, residual=X[:1]), ValueError, "residual: expected the shape of x"),
    "residual of float64": (lambda: norm(X, 2, residual=X.double()), TypeError, "residual: expected the dtype of x"),
    "activation unknown": (lambda: norm(X, 2, activation="mish"), ValueError, "activation: expected one of none, silu"),
}


@pytest.mark.parametrize(("call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refused(call, error, text):
    before = [X.clone(), W.clone()]
    with pytest.raises(error, match=re.escape(text)) as raised:
        call()
    assert re.fullmatch(r"genai_kernels\.group_norm_\w+: \w+: expected [^\n]+, got [^\n]+", str(raised.value))
    assert same_bits([X, W], before)


def test_the_torch_ops_refuse_what_the_function_prepares():
    op = torch.ops.genai_kernels
    numbers = (2, 1e-5, 1)
    with pytest.raises(ValueError, match="x: expected channels first, each sample contiguous, or channels last"):
        op.group_norm_silu(X.transpose(2, 3), None, None, None, None, *numbers)
    with pytest.raises(ValueError, match="residual: expected the memory format of x, channels first"):
        op.add_group_norm_silu(X, last(X), None, None, None, None, *numbers)
    with pytest.raises(ValueError, match="activation: expected 0 to 4, got 5"):
        op.group_norm_silu(X, None, None, None, None, 2, 1e-5, 5)
    wanted = (False,) * 4
    with pytest.raises(ValueError, match="stats: expected a contiguous"):
        op.group_norm_silu_bwd(X, None, X, *[None] * 4, torch.zeros(2, 3, 2).double(), *numbers, *wanted)
    with pytest.raises(ValueError, match="dy: expected the memory format of x, channels first"):
        op.group_norm_silu_bwd(last(X), None, X, *[None] * 4, torch.zeros(2, 2, 2).double(), *numbers, *wanted)


def test_stats_has_no_gradient_and_says_so():
    with pytest.raises(NotImplementedError, match="group_norm_stats: it has no gradient"):
        gk.group_norm_stats(X.clone().requires_grad_(), 2)


def test_double_backward_is_refused():
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(gk.group_norm_silu(x, 2).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dx.sum().backward()


# ---- torch's machinery ----


@pytest.mark.parametrize("name", ["group_norm_silu", "add_group_norm_silu", "group_norm_stats", "group_norm_silu_bwd"])
@each_layout
def test_opcheck(name, layout):
    x, numbers = layout(torch.randn(2, 6, 4, 5)), (2, 1e-5, 1)
    parameters = [torch.randn(6), torch.randn(6), torch.randn(2, 6), torch.randn(2, 6)]
    args = {
        "group_norm_silu": (x, *parameters, *numbers),
        "add_group_norm_silu": (x, layout(torch.randn(2, 6, 4, 5)), *parameters, *numbers),
        "group_norm_stats": (x, 2, 1e-5),
        "group_norm_silu_bwd": (x, x, x, *parameters, torch.rand(2, 2, 2).double(), *numbers, *(True,) * 4),
    }[name]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.genai_kernels, name).default, args, test_utils=tests)
    if not name.endswith(("_bwd", "_stats")):
        args = tuple(a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(getattr(torch.ops.genai_kernels, name).default, args)


@each_layout
def test_compile_fullgraph(layout):
    torch._dynamo.reset()
    given = everything((2, 12, 5, 6), 3, layout, torch.float32)
    compiled = torch.compile(gk.group_norm_silu, fullgraph=True, backend="aot_eager")

    def run(function):
        x, residual, dy, _ = given[0]
        leaves = [t.detach().requires_grad_() for t in (x, residual, *given[1])]
        y, _ = function(leaves[0], 3, *leaves[2:4], scale=leaves[4], shift=leaves[5], residual=leaves[1])
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    assert same_bits(run(compiled), run(gk.group_norm_silu))


def test_scale_and_shift_as_diffusers_broadcasts_them():
    x, temb = torch.randn(3, 8, 4, 4), torch.randn(3, 16)
    scale, shift = temb.chunk(2, dim=1)
    images = [t[:, :, None, None] for t in (scale, shift)]
    expected = gk.group_norm_silu(x, 2, scale=scale, shift=shift)
    assert same_bits(gk.group_norm_silu(x, 2, scale=images[0], shift=images[1]), expected)


# ---- memory ----

MEMORY = """
import resource, sys, torch, genai_kernels as gk
torch.set_num_threads(2)
def step(size):
    x = torch.randn(2, 64, size, size)
    if sys.argv[1] == "last": x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    y = gk.group_norm_silu(x, int(sys.argv[2]), torch.ones(64, requires_grad=True))
    y.backward(torch.ones(()).expand_as(y).contiguous(memory_format=torch.channels_last)
               if sys.argv[1] == "last" else torch.ones_like(y))
step(16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(256)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize("order", ["first", "last"])
def test_nothing_else_of_the_size_of_x(order, groups):
    """x, y, dy and dx are 32 MiB each; nothing normalised is kept, and there is no other copy."""
    command = [sys.executable, "-c", MEMORY, order, str(groups)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    # the format of the random numbers is changed once, before anything else is there
    assert int(result.stdout) < (4 * 32 + 12) * 1024, f"{int(result.stdout) / 1024:.0f} MiB"


def test_what_backward_keeps():
    x, w = torch.randn(2, 64, 32, 32, requires_grad=True), torch.ones(64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gk.group_norm_silu(x, 32, w)
    assert sorted(t.numel() for t in kept) == [64, 2 * 32 * 2, x.numel()]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


# ---- the module ----


@pytest.mark.parametrize("activation", ["silu", "none"])
def test_module(activation):
    peer = torch.nn.GroupNorm(4, 12, eps=1e-6)
    torch.nn.init.normal_(peer.weight)
    torch.nn.init.normal_(peer.bias)
    module = GroupNormSiLU(4, 12, eps=1e-6, activation=activation)
    module.load_state_dict(peer.state_dict())
    peer.load_state_dict(module.state_dict())
    x = torch.randn(2, 12, 5, 5)
    expected = F.silu(peer(x)) if activation == "silu" else peer(x)
    assert torch.allclose(module(x), expected, atol=1e-5)
    y, s = module(x, residual=x, scale=torch.zeros(2, 12), shift=torch.zeros(2, 12))
    assert same_bits([y, s], [module(2 * x), 2 * x])
    assert GroupNormSiLU(4, 12, affine=False).state_dict() == torch.nn.GroupNorm(4, 12, affine=False).state_dict() == {}
