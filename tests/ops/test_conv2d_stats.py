"""conv2d's statistics: given, returned, and taken of a whole map; the block that hands them on."""

import re

import pytest
import torch
from calls import same_bits

import genai_kernels as gk
from genai_kernels.accuracy import compare
from genai_kernels.nn import ResBlock, resblock
from genai_kernels.ops.conv2d.reference import conv2d_reference, conv2d_stats_reference

F32, BF16 = torch.float32, torch.bfloat16
Norm = gk.GroupNormPrologue
# several cells, with Winograd two to a tile; several images to a tile; odd; one pixel; a single row; direct
SHAPES = [(2, 40, 64, (40, 45)), (9, 34, 40, (6, 6)), (1, 33, 64, (24, 70)), (5, 8, 8, (1, 1)), (2, 40, 48, (1, 600)),
          (2, 12, 52, (19, 35))]  # fmt: skip


def last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def first(t):
    return t


each_layout = pytest.mark.parametrize("layout", [first, last], ids=["channels_first", "channels_last"])


def convolution(n, c, out, size, layout, dtype=F32, shift=0.0):
    x = layout(torch.randn(n, c, *size).to(dtype))
    return x, (torch.randn(out, c, 3, 3) * (9 * c) ** -0.5).to(dtype), torch.randn(out).add(shift).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_layout
def test_returned_are_those_of_a_pass_over_the_result(shape, layout):
    """Bit for bit, for any number of threads, and the result itself is what it is without them."""
    for dtype in (F32, BF16):
        x, w, b = convolution(*shape, layout, dtype)
        torch.set_num_threads(1)
        expected = gk.conv2d(x, w, b, padding=1)
        stats = gk.conv2d_stats(expected, 4, 1e-6)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, found = gk.conv2d(x, w, b, padding=1, return_stats=Norm(4, eps=1e-6))
            assert same_bits([y, *found], [expected, *stats]), (dtype, threads)
        some = gk.conv2d(x[1:], w, b, padding=1, return_stats=Norm(4, eps=1e-6))[1]
        assert same_bits(some, [t[1:] for t in stats])


@each_layout
def test_returned_are_exact_where_the_mean_is_100_deviations(layout):
    """To a few units of float64: as exact as at a mean of 0."""
    for dtype in (F32, BF16):
        x, w, b = convolution(2, 40, 48, (33, 20), layout, dtype, shift=100.0)
        y, found = gk.conv2d(x, w, b, padding=1, return_stats=Norm(8))
        mean, rstd = conv2d_stats_reference(y.double(), 8)
        assert ((found[0] - mean) / mean).abs().max() < 1e-15
        assert ((found[1] - rstd) / rstd).abs().max() < 1e-13


@each_layout
def test_given_change_no_bit(layout):
    images = [layout(torch.randn(2, c, 19, 37)) for c in (24, 8)]
    w, scale, shift = torch.randn(40, 32, 3, 3) / 17, torch.randn(2, 32), torch.randn(2, 32)
    norm = Norm(4, torch.randn(32), torch.randn(32), eps=1e-3, scale=scale, shift=shift)
    stats = gk.conv2d_stats(images[0], 4, 1e-3, skip=images[1])
    for algorithm in ("direct", "winograd"):
        expected = gk.conv2d(images[0], w, padding=1, skip=images[1], norm=norm, algorithm=algorithm)
        norm_of = norm._replace(stats=stats, eps=0.0)  # which is not used
        found = gk.conv2d(images[0], w, padding=1, skip=images[1], norm=norm_of, algorithm=algorithm)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
@each_layout
def test_a_map_in_bands_has_the_bits_of_the_whole(algorithm, layout):
    """Winograd's tiles begin at even rows, and so do its bands."""
    x, w = layout(torch.randn(1, 40, 23, 9)), torch.randn(40, 40, 3, 3) / 19
    norm = Norm(8, torch.randn(40), torch.randn(40))
    whole = gk.conv2d(x, w, padding=1, norm=norm, algorithm=algorithm)
    norm = norm._replace(stats=gk.conv2d_stats(x, 8))
    for begin, end in ((0, 4), (4, 10), (10, 23)) if algorithm == "winograd" else ((0, 5), (5, 12), (12, 23)):
        sides = (1, 1, int(begin == 0), int(end == 23))
        band = x[:, :, max(begin - 1, 0) : min(end + 1, 23)]
        assert torch.equal(gk.conv2d(band, w, padding=sides, norm=norm, algorithm=algorithm), whole[:, :, begin:end])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_statistics_are_used_as_given(dtype):
    """Those of another map, in float32 as group_norm_stats returns them: against the plain composition."""
    found = [[], [], []]
    for seed in range(6):
        torch.manual_seed(seed)
        x, w, b = convolution(2, 24, 20, (9, 7), last, dtype)
        norm = Norm(3, torch.randn(24).to(dtype), torch.randn(24).to(dtype))
        norm = norm._replace(stats=gk.group_norm_stats(3 * torch.randn(2, 24, 8, 8) + 1, 3))
        found[0].append(gk.conv2d(x, w, b, padding=1, norm=norm))
        found[1].append(conv2d_reference(x, w, b, padding=1, norm=norm))
        norm = norm._replace(weight=norm.weight.double(), bias=norm.bias.double())
        found[2].append(conv2d_reference(x.double(), w.double(), b.double(), padding=1, norm=norm))
    verdict = compare("y", *(torch.cat([t.flatten() for t in tensors]) for tensors in found), 1.0, 1.0)
    assert verdict.ok, verdict.complaint


def test_parameters_get_their_gradients_and_the_input_is_refused():
    x, w, b = convolution(2, 12, 10, (5, 6), last)
    leaves = [t.requires_grad_() for t in (w, b, torch.randn(12), torch.randn(12))]
    norm, stats = Norm(3, *leaves[2:]), gk.conv2d_stats(x, 3)
    dy = torch.randn(2, 10, 5, 6)
    expected = torch.autograd.grad(gk.conv2d(x, w, b, padding=1, norm=norm), leaves, dy)
    norm = norm._replace(stats=stats)
    assert same_bits(torch.autograd.grad(gk.conv2d(x, w, b, padding=1, norm=norm), leaves, dy), expected)
    text = re.escape("genai_kernels.conv2d: norm.stats: expected None where a gradient of x")
    image, known = x.clone().requires_grad_(), tuple(t.clone().requires_grad_() for t in stats)
    for given in (
        {"x": image, "norm": norm},
        {"x": x[:, 3:], "skip": image[:, :3], "norm": norm},
        {"x": x, "norm": norm._replace(stats=known)},
    ):
        with pytest.raises(NotImplementedError, match=text):
            gk.conv2d(weight=w, padding=1, **given)
    y, returned = gk.conv2d(image, w, b, padding=1, return_stats=Norm(5))
    assert y.requires_grad
    assert not any(t.requires_grad for t in (*returned, *gk.conv2d_stats(image, 3)))
    plain = gk.conv2d(image, w, b, padding=1)
    assert same_bits(torch.autograd.grad(y, image, dy), torch.autograd.grad(plain, image, dy))


X, W = torch.randn(2, 6, 4, 5), torch.randn(8, 6, 3, 3)
MEAN = torch.zeros(2, 3)
REFUSED = {
    "mean of other groups": (lambda: gk.conv2d(X, W, norm=Norm(3, stats=(MEAN[:, :2], MEAN))), ValueError,
                             "norm.stats.mean: expected shape [2, 3], got [2, 2]"),
    "rstd of other samples": (lambda: gk.conv2d(X, W, norm=Norm(3, stats=(MEAN, MEAN[:1]))), ValueError,
                              "norm.stats.rstd: expected shape [2, 3], got [1, 3]"),
    "mean of bfloat16": (lambda: gk.conv2d(X, W, norm=Norm(3, stats=(MEAN.bfloat16(), MEAN))), TypeError,
                         "norm.stats.mean: expected float32 or float64, got bfloat16"),
    "returned of groups that do not divide": (lambda: gk.conv2d(X, W, return_stats=Norm(3)), ValueError,
                                              "return_stats: expected a divisor of the 8 channels of the result"),
    "returned of no groups": (lambda: gk.conv2d(X, W, return_stats=Norm(0)), ValueError, "return_stats: expected num_"),
    "returned with a negative eps": (lambda: gk.conv2d(X, W, return_stats=Norm(2, eps=-1.0)), ValueError,
                                     "return_stats.eps: expected >= 0, got -1"),
    "stats of groups that do not divide": (lambda: gk.conv2d_stats(X, 4), ValueError, "num_groups: expected a divisor"),
    "stats of no groups": (lambda: gk.conv2d_stats(X, 0), ValueError, "num_groups: expected >= 1, got 0"),
    "stats of three dimensions": (lambda: gk.conv2d_stats(X[0], 3), ValueError, "x: expected [batch, channels, height"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refused(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_opcheck():
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.genai_kernels.conv2d_stats.default, (X, X, 4, 1e-5), test_utils=tests)


@each_layout
def test_a_block_hands_them_on_without_changing_a_bit(layout, monkeypatch):
    block, x, temb = ResBlock(16, 24, 12, groups=4).eval(), layout(torch.randn(2, 16, 17, 40)), torch.randn(2, 12)
    with torch.no_grad():
        assert not block._takes_stats(x), "a map that a cache holds"
        expected = block(x, temb)
        monkeypatch.setattr(resblock, "_LARGE_MAP", 0)
        assert block._takes_stats(x)
        assert torch.equal(block(x, temb), expected)
        with gk.use_backend("reference"):
            assert not block._takes_stats(x), "the twin is the plain composition"
    assert not block._takes_stats(x), "a gradient may be wanted"
    assert torch.equal(block(x, temb), expected)
