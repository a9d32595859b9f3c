"""conv2d's Winograd in tiles of 4 x 4: its error against float64, its tails and bits, what it refuses."""

import re

import pytest
import torch
from torch.nn import functional as F

import genai_kernels as gk
from genai_kernels.accuracy import UNIT_ROUNDOFF

B = torch.tensor(
    [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
     [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
).double()  # fmt: skip
G = torch.tensor(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
).double() / torch.tensor([24, 24, 24, 24, 24, 24])[:, None]  # fmt: skip
A = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]).double()


def winograd(x, w, b, g, a):
    """F(4 x 4, 3 x 3) in float64 with these matrices, of x with its padding."""
    height, width = x.shape[2] - 2, x.shape[3] - 2
    x = F.pad(x.double(), (0, -width % 4, 0, -height % 4))
    tiles = x.unfold(2, 6, 4).unfold(3, 6, 4)
    v = torch.einsum("ij,nchwjk,lk->nchwil", b, tiles, b)
    u = torch.einsum("ij,ocjk,lk->ocil", g, w.double(), g)
    m = torch.einsum("nchwil,ocil->nohwil", v, u)
    y = torch.einsum("ij,nohwjk,lk->nohwil", a, m, a)
    return y.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def errors(c, out, size, seed, **options):
    """Of results in float32 to those in float64, and the size of the terms that the algorithm adds up."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, c, *size, generator=generator)
    w = torch.randn(out, c, 3, 3, generator=generator) * (9 * c) ** -0.5
    y = gk.conv2d(x.contiguous(memory_format=torch.channels_last), w, padding=1, **options)
    exact = F.conv2d(x.double(), w.double(), padding=1)
    terms = winograd(F.pad(x.abs(), (1, 1, 1, 1)), w.abs(), B.abs(), G.abs(), A.abs())
    return (y - exact).abs(), terms


@pytest.mark.parametrize("size", [(8, 8), (13, 7), (1, 1), (34, 37)], ids=str)
def test_error_is_that_of_its_terms(size):
    """Per element: sums of C products of transformed numbers, each of which is a sum of six; and the root of their
    number for all that is rounded on the way, as for any product."""
    for c, out in ((3, 5), (40, 48), (130, 33)):
        error, terms = errors(c, out, size, c, algorithm="winograd_f4")
        assert (error <= c**0.5 * UNIT_ROUNDOFF[torch.float32] * terms).all(), (c, out)


def test_error_is_some_seven_times_that_of_smaller_tiles():
    """The figures that the README states. It is another algorithm: none of the others passes for it."""
    rms = {}
    for name in ("direct", "winograd", "winograd_f4"):
        rms[name] = errors(128, 64, (16, 16), 0, algorithm=name)[0].square().mean().sqrt().item()
    assert 3 * rms["winograd"] < rms["winograd_f4"] < 30 * rms["winograd"], rms
    assert rms["winograd_f4"] < 1e-5, rms


def test_the_transforms_are_those_of_the_formulas():
    """Small integers: every sum is exact but for G's thirds, whose errors do not grow."""
    x, w = torch.randint(-4, 5, (1, 2, 9, 11)).float(), 24 * torch.randint(-3, 4, (4, 2, 3, 3)).float()
    expected = winograd(x, w, B, G, A)
    torch.testing.assert_close(expected, F.conv2d(x.double(), w.double()))
    torch.testing.assert_close(gk.conv2d(x, w, algorithm="winograd_f4").double(), expected, rtol=1e-5, atol=1e-2)


def test_same_bits_for_threads_batches_formats_bands_and_packed():
    x, w, b = torch.randn(9, 36, 22, 18), torch.randn(40, 36, 3, 3) / 18, torch.randn(40)
    norm = gk.GroupNormPrologue(4)
    options = {"padding": 1, "norm": norm, "algorithm": "winograd_f4"}
    torch.set_num_threads(1)
    expected, stats = gk.conv2d(x, w, b, **options, return_stats=gk.GroupNormPrologue(8))
    assert all(torch.equal(*pair) for pair in zip(stats, gk.conv2d_stats(expected, 8), strict=True))
    packed = gk.conv2d_pack(w, algorithm="winograd_f4")
    assert packed.shape == gk.conv2d_pack(w.to("meta"), algorithm="winograd_f4").shape
    assert torch.equal(gk.conv2d(x, w, b, **options, packed=packed), expected)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(gk.conv2d(x.contiguous(memory_format=torch.channels_last), w, b, **options), expected)
        assert torch.equal(gk.conv2d(x[3:4], w, b, **options), expected[3:4])
    options["norm"] = norm._replace(stats=gk.conv2d_stats(x, 4))
    for begin, end in ((0, 8), (8, 12), (12, 22)):  # tiles begin at every fourth row
        options["padding"] = (1, 1, int(begin == 0), int(end == 22))
        band = gk.conv2d(x[:, :, max(begin - 1, 0) : min(end + 1, 22)], w, b, **options)
        assert torch.equal(band, expected[:, :, begin:end])


def test_gradients_are_direct_sums():
    x, w = torch.randn(2, 36, 6, 7, requires_grad=True), (torch.randn(40, 36, 3, 3) / 18).requires_grad_()
    dy = torch.randn(2, 40, 6, 7)
    direct, f4 = (
        torch.autograd.grad(gk.conv2d(x, w, padding=1, algorithm=name), (x, w), dy)
        for name in ("direct", "winograd_f4")
    )
    assert all(torch.equal(*pair) for pair in zip(direct, f4, strict=True))


X, W = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3)
EXPECTED = "algorithm: expected winograd_f4 for kernels of 3 by 3 with stride 1 alone, and in float32, got"
REFUSED = {
    "stride 2": (lambda f: f(X, W, stride=2), "3 by 3 with stride 2"),
    "1 x 1": (lambda f: f(X, W[:, :, :1, :1]), "1 by 1 with stride 1"),
    "bfloat16": (lambda f: f(X.bfloat16(), W.bfloat16()), "3 by 3 with stride 1 or another dtype"),
    "float64": (lambda f: f(X.double(), W.double()), "3 by 3 with stride 1 or another dtype"),
}


@pytest.mark.parametrize(("call", "text"), REFUSED.values(), ids=REFUSED)
def test_refused(call, text):
    for function in (gk.conv2d, lambda x, w, stride=1, **options: gk.conv2d_pack(w, stride, **options)):
        with pytest.raises(ValueError, match=re.escape(f"{EXPECTED} {text}")):
            call(lambda *args, function=function, **options: function(*args, algorithm="winograd_f4", **options))
    with pytest.raises(ValueError, match="packed: expected what conv2d_pack makes"):
        gk.conv2d(X, W, algorithm="winograd_f4", packed=gk.conv2d_pack(W, algorithm="winograd"))
