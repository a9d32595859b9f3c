"""linear_swiglu and linear_geglu: against the two steps they replace, and what is kept for backward."""

from __future__ import annotations

import pytest
import torch

import genai_kernels as gk

CASES = [(gk.linear_swiglu, gk.silu_and_mul, False), (gk.linear_geglu, gk.gelu_and_mul, True),
         (gk.linear_geglu_tanh, gk.gelu_tanh_and_mul, True)]  # fmt: skip
each_op = pytest.mark.parametrize(("fused", "activation", "gate_last"), CASES, ids=lambda c: getattr(c, "__name__", c))


def swapped(h):
    return torch.cat(h.chunk(2, -1)[::-1], -1)


@each_op
def test_float32_has_the_bits_of_the_two_steps(fused, activation, gate_last):
    """Nothing is rounded in between there, so forward and backward are the same computation."""
    torch.manual_seed(0)
    x, weight, bias = (t.requires_grad_() for t in (torch.randn(37, 70), torch.randn(2 * 45, 70), torch.randn(90)))
    h = gk.linear(x, weight, bias)
    two, one = activation(swapped(h) if gate_last else h), fused(x, weight, bias)
    assert torch.equal(one, two)
    cotangent = torch.randn_like(one)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight, bias), cotangent) for y in (one, two)), strict=True):
        assert torch.equal(a, b)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_what_it_is_alone(fused, activation, gate_last, dtype):
    x, weight = torch.randn(60, 130).to(dtype), torch.randn(2 * 70, 130).to(dtype)
    adapters = [gk.LoRAAdapter(torch.randn(4 + i, 130).to(dtype), torch.randn(70, 4 + i).to(dtype), 0.5,
                               (i % 2 * 70, i % 2 * 70 + 70)) for i in range(4)]  # fmt: skip
    ids = torch.tensor([[0, 1], [2, 3], [-1, -1]], dtype=torch.int32).repeat(20, 1)
    y = fused(x, weight, None, adapters, ids)
    assert torch.equal(y[2::3], fused(x[2::3], weight))
    assert torch.equal(y[::3], fused(x[::3], weight, None, adapters[:2]))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for begin, end in ((0, 1), (7, 9), (10, 43)):
                assert torch.equal(fused(x[begin:end], weight, None, adapters, ids[begin:end]), y[begin:end])
    finally:
        torch.set_num_threads(threads)


def test_gradients_of_adapters_of_both_parts():
    torch.manual_seed(0)
    x, weight = torch.randn(9, 30, dtype=torch.float64), torch.randn(40, 30, dtype=torch.float64)
    matrices = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 30), (20, 3), (5, 30), (20, 5))]
    a, b, c, d = matrices
    adapters = [gk.LoRAAdapter(a, b, 0.5, (0, 20)), gk.LoRAAdapter(c, d, 2.0, (20, 40))]
    full = torch.cat([weight[:20] + 0.5 * b @ a, weight[20:] + 2 * d @ c])
    gate, up = (x @ full.t()).chunk(2, -1)
    expected, ours = torch.nn.functional.silu(gate) * up, gk.linear_swiglu(x, weight, None, adapters)
    torch.testing.assert_close(ours, expected)
    for got, want in zip(*(torch.autograd.grad(y.sum(), matrices) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(got, want)


def test_a_quantized_weight():
    x, weight = torch.randn(9, 70, requires_grad=True), gk.quantize_int4(torch.randn(60, 70), 32)
    dxs = []
    for y in (gk.linear_swiglu(x, weight), gk.linear_swiglu(x, weight.dense())):
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y, gk.linear_swiglu(x, weight))
        dxs.append(dx)
    assert torch.equal(*dxs)


def test_what_goes_into_the_gate_is_kept_for_backward_only():
    """Without a gradient no tensor of 2 n columns is made."""
    x, weight = torch.randn(8, 16), torch.randn(64, 16, requires_grad=True)
    multi = torch.ops.genai_kernels.lora_linear_multi.default
    ids, none = torch.empty(8, 0, dtype=torch.int32), torch.empty(0, 2, dtype=torch.int64)
    args = (x, weight.detach(), [], [], none[:, 0].double(), none, ids, None, None, 0.0, 0, False)
    assert [t.numel() for t in multi(*args, False, None, None, None, 0)] == [8 * 32, 0, 0]
    assert [t.numel() for t in multi(*args, True, None, None, None, 0)] == [8 * 32, 0, 8 * 64]


def test_errors_name_the_op_and_the_argument():
    x = torch.randn(4, 16)
    with pytest.raises(ValueError, match=r"genai_kernels.linear_swiglu: weight: expected \[2 n, in\].*got 33 rows"):
        gk.linear_swiglu(x, torch.randn(33, 16))
    with pytest.raises(ValueError, match=r"genai_kernels.linear_geglu: x: expected a last dimension of 16"):
        gk.linear_geglu(x[:, :15], torch.randn(32, 16))
    adapter = gk.LoRAAdapter(torch.randn(2, 16), torch.randn(16, 2), 1.0, (0, 16))
    with pytest.raises(IndexError, match=r"genai_kernels.linear_geglu_tanh: adapter_ids"):
        gk.linear_geglu_tanh(x, torch.randn(32, 16), None, [adapter], torch.full((4,), 1, dtype=torch.int32))
