"""What the samples of linear cannot say: the bits of a row are its own, and so are those of every gradient."""

from __future__ import annotations

import pytest
import torch

import genai_kernels as gk

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
SHAPES = pytest.mark.parametrize(("width", "out"), [(192, 320), (1100, 70), (33, 50)])


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@DTYPES
@SHAPES
def test_a_row_has_the_same_bits_in_any_company(width, out, dtype):
    x, weight, bias = torch.randn(530, width).to(dtype), torch.randn(out, width).to(dtype), torch.randn(out).to(dtype)
    expected = gk.linear(x, weight, bias)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in (0, 1, 2, 3, 4, 5, 8, 9, 15, 33, 97, 130, 529):
            assert torch.equal(gk.linear(x[:rows], weight, bias), expected[:rows]), rows
        assert torch.equal(gk.linear(x[77], weight, bias), expected[77])
        assert torch.equal(gk.linear(x.roll(7, 0), weight, bias).roll(-7, 0), expected)


@DTYPES
def test_a_column_has_the_same_bits_beside_any_other(dtype):
    """Nor does it matter where a weight lies: gate and up as one product are what they are as two."""
    x, weight = torch.randn(20, 300).to(dtype), torch.randn(70, 300).to(dtype)
    expected = gk.linear(x, weight)
    for begin, end in ((0, 1), (3, 40), (64, 70)):
        assert torch.equal(gk.linear(x, weight[begin:end]), expected[:, begin:end])
    assert torch.equal(gk.linear(x, weight.t().contiguous().t()), expected)
    assert torch.equal(gk.linear(x.t().contiguous().t(), weight), expected)


@DTYPES
@SHAPES
def test_gradients_do_not_depend_on_threads_nor_dx_on_company(width, out, dtype):
    x, weight = torch.randn(300, width).to(dtype).requires_grad_(), torch.randn(out, width).to(dtype).requires_grad_()
    bias, dy = torch.zeros(out, dtype=dtype, requires_grad=True), torch.randn(300, out).to(dtype)
    torch.set_num_threads(1)
    expected = torch.autograd.grad(gk.linear(x, weight, bias), (x, weight, bias), dy)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        found = torch.autograd.grad(gk.linear(x, weight, bias), (x, weight, bias), dy)
        assert all(map(torch.equal, found, expected))
    for rows in (1, 2, 5, 31, 257):
        (dx,) = torch.autograd.grad(gk.linear(x[:rows], weight, bias), (x,), dy[:rows])
        assert torch.equal(dx[:rows], expected[0][:rows])


def test_nan_stays_in_its_row_and_column():
    x, weight = torch.randn(9, 40), torch.randn(14, 40)
    expected = gk.linear(x, weight)
    x[3, 7], weight[11, 39] = torch.nan, torch.inf
    wrong = gk.linear(x, weight)
    assert wrong[3].isnan().all()
    assert not wrong[:, 11].isfinite().any()
    wrong[3], wrong[:, 11] = expected[3], expected[:, 11]
    assert torch.equal(wrong, expected)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "text"),
    [
        (
            torch.ones(2, 3),
            torch.ones(4, 5),
            None,
            ValueError,
            r"x: expected a last dimension of 5 .* \[2, 3\]",
        ),
        (torch.ones(2, 3), torch.ones(3), None, ValueError, r"weight: expected \[out, in\], got shape \[3\]"),
        (torch.tensor(1.0), torch.ones(4, 5), None, ValueError, r"x: expected \[..., in\], got shape \[\]"),
        (torch.ones(2, 3), torch.ones(4, 3).half(), None, TypeError, r"weight: expected the dtype of x, float32, got"),
        (torch.ones(2, 3).int(), torch.ones(4, 3), None, TypeError, r"x: expected float32, .* got int32"),
        (torch.ones(2, 3), torch.ones(4, 3), torch.ones(3), ValueError, r"bias: expected \[4\], got shape \[3\]"),
        (torch.ones(2, 3), torch.ones(4, 3), torch.ones(4).half(), TypeError, r"bias: expected the dtype of x"),
    ],
)
def test_errors(x, weight, bias, error, text):
    with pytest.raises(error, match=r"genai_kernels\.linear: " + text):
        gk.linear(x, weight, bias)
