"""What the samples of dora_linear and dora_norm cannot say: against lora_linear, PEFT's formula and quantized bases."""

from __future__ import annotations

import pytest
import torch

import genai_kernels as gk

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def layer(dtype=torch.float32, rows=50, inputs=130, outputs=60, rank=8):
    torch.manual_seed(3)
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    return x, weight, torch.randn(rank, inputs).to(dtype), torch.randn(outputs, rank).to(dtype), torch.randn(outputs)


@DTYPES
def test_a_factor_of_one_changes_no_bit(dtype):
    x, weight, a, b, _ = layer(dtype)
    bias = torch.randn(60).to(dtype)
    norm = gk.dora_norm(weight, a, b, 0.5)
    plain = gk.lora_linear(x, weight, a, b, 0.5, bias)
    assert torch.equal(gk.dora_linear(x, weight, a, b, norm, 0.5, bias), plain)
    assert torch.equal(gk.dora_linear(x, weight, a, b, 2 * norm, 0.5), 2 * gk.lora_linear(x, weight, a, b, 0.5))


@DTYPES
def test_a_row_is_what_it_is_alone(dtype):
    x, weight, a, b, magnitude = layer(dtype)
    y, threads = gk.dora_linear(x, weight, a, b, magnitude), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for begin, end in ((0, 1), (11, 43)):
                assert torch.equal(gk.dora_linear(x[begin:end], weight, a, b, magnitude), y[begin:end])
    finally:
        torch.set_num_threads(threads)


def test_the_norm_is_that_of_its_rows_whatever_the_threads():
    _, weight, a, b, _ = layer(outputs=3000, inputs=70)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        norm = gk.dora_norm(weight, a, b, 1.5)
        torch.set_num_threads(3)
        assert torch.equal(gk.dora_norm(weight, a, b, 1.5), norm)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(gk.dora_norm(weight[200:211], a, b[200:211], 1.5), norm[200:211])


def test_a_row_that_cancels_keeps_its_digits():
    _, weight, a, b, _ = layer()
    exact = weight.double()
    exact[:20] = -(b[:20].double() @ a.double()) * (1 + 2.0**-10)
    weight = exact.float()
    expected = torch.linalg.vector_norm(weight.double() + b.double() @ a.double(), dim=1)
    expanded = weight.square().sum(1) + 2 * ((weight @ a.t()) * b).sum(1) + ((b @ (a @ a.t())) * b).sum(1)
    lost = ((expanded.clamp_min(0).sqrt() - expected).abs() / expected)[:20].max()
    kept = ((gk.dora_norm(weight, a, b) - expected).abs() / expected).max()
    # what rounding the elements of the row loses: they are 2^10 times smaller than what they are sums of
    assert kept < 2.0**-24 * 2**10 * 4 < lost


def test_gradients_are_those_of_the_formula():
    """The norm takes no gradient; magnitude, both matrices, x, the weight and the bias do."""
    x, weight, a, b, magnitude = layer(torch.float64)
    bias = torch.randn(60, dtype=torch.float64)
    leaves = [t.double().requires_grad_() for t in (x, weight, a, b, magnitude, bias)]
    x, weight, a, b, magnitude, bias = leaves
    norm = torch.linalg.vector_norm(weight + 0.7 * b @ a, dim=1).detach()
    expected = (x @ (weight + 0.7 * b @ a).t()) * (magnitude / norm) + bias
    ours = gk.dora_linear(x, weight, a, b, magnitude, 0.7, bias)
    torch.testing.assert_close(ours, expected)
    cotangent = torch.randn_like(expected)
    for got, want in zip(torch.autograd.grad(ours, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent),
                         strict=True):  # fmt: skip
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone_has_the_bits_it_has_with_the_others(wanted):
    leaves = layer()
    for t in leaves:
        t.requires_grad_()
    cotangent = torch.randn(50, 60)
    every = torch.autograd.grad(gk.dora_linear(*leaves), leaves, cotangent)
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(leaves)]
    (one,) = torch.autograd.grad(gk.dora_linear(*alone), [alone[wanted]], cotangent)
    assert torch.equal(one, every[wanted])


@pytest.mark.parametrize("quantize", [gk.quantize_int8, gk.quantize_int4, gk.quantize_nf4])
def test_a_quantized_base(quantize):
    """The bits of the same layer on the matrix that it stands for, forward and backward."""
    x, weight, a, b, magnitude = layer()
    few = quantize(weight)
    for t in (x, a, b, magnitude):
        t.requires_grad_()
    cotangent = torch.randn(50, 60)

    def run(base):
        y = gk.dora_linear(x, base, a, b, magnitude, 0.5)
        return [gk.dora_norm(base, a, b, 0.5), y, *torch.autograd.grad(y, (x, a, b, magnitude), cotangent)]

    for ours, dense in zip(run(few), run(few.dense()), strict=True):
        assert torch.equal(ours, dense)


def test_errors_name_the_op_and_the_argument():
    x, weight, a, b, magnitude = layer()
    with pytest.raises(ValueError, match=r"genai_kernels.dora_linear: magnitude: expected \[60\].*\[59\]"):
        gk.dora_linear(x, weight, a, b, magnitude[:59])
    with pytest.raises(ValueError, match=r"genai_kernels.dora_linear: x: expected a last dimension of 130"):
        gk.dora_linear(x[:, :129], weight, a, b, magnitude)
    with pytest.raises(ValueError, match=r"genai_kernels.dora_norm: lora_b: expected \[60, 8\]"):
        gk.dora_norm(weight, a, b[:, :7])
    with pytest.raises(TypeError, match=r"genai_kernels.dora_norm: lora_a: expected float64"):
        gk.dora_norm(weight.double(), a, b)
    few = gk.quantize_nf4(torch.randn(60, 97))
    with pytest.raises(ValueError, match=r"genai_kernels.lora_linear: x: expected a last dimension of 97"):
        gk.lora_linear(x[:, :98], few, a[:, :98], b)
