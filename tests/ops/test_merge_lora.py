"""merge_lora_ and unmerge_lora_: the original bits, and a bound that holds."""

from __future__ import annotations

import pytest
import torch

import genai_kernels as gk
from tests.calls import same_bits

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def pair(dtype, out=70, inputs=200, rank=9, adapter=None):
    torch.manual_seed(1)
    adapter = adapter or dtype
    return torch.randn(out, inputs).to(dtype), torch.randn(rank, inputs).to(adapter), torch.randn(out, rank).to(adapter)


@DTYPES
@pytest.mark.parametrize("scaling", [0.0, 1e-6, 0.3, -2.0, 3e4])
def test_unmerge_restores_every_bit(dtype, scaling):
    weight, a, b = pair(dtype)
    weight[0, :4] = torch.tensor([0.0, -0.0, 1e-30, -6e-8])
    weight[1], weight[2, 0] = -(b[1:2].double() @ a.double() * scaling).to(dtype), float("inf")
    original = weight.clone()
    merge = gk.merge_lora_(weight, a, b, scaling)
    assert scaling == 0 or not same_bits(weight, original)
    gk.unmerge_lora_(weight, a, b, scaling, merge)
    assert same_bits(weight, original)


def test_several_adapters_come_off_in_reverse():
    weight, a, b = pair(torch.bfloat16, adapter=torch.float32)
    original, merges = weight.clone(), []
    for i in range(3):
        merges.append(gk.merge_lora_(weight, a + i, b - i, 0.5))
    for i in reversed(range(3)):
        gk.unmerge_lora_(weight, a + i, b - i, 0.5, merges[i])
    assert same_bits(weight, original)


@DTYPES
def test_the_result_is_rounded_once_and_within_its_bound(dtype):
    weight, a, b = pair(dtype)
    exact = weight.double() + 0.7 * b.double() @ a.double()
    merge = gk.merge_lora_(weight, a, b, 0.7)
    missed = torch.linalg.vector_norm(weight.double() - exact, dim=1)
    assert bool((missed <= merge.error_bound).all())
    assert float((missed / merge.error_bound).max()) > 0.02 if dtype != torch.float64 else True  # not an empty promise
    x = torch.randn(20, 200, dtype=torch.float64)
    difference = (x @ weight.double().t() - x @ exact.t()).abs()
    assert bool((difference <= merge.error_bound.double() * torch.linalg.vector_norm(x, dim=1, keepdim=True)).all())


def test_what_is_kept_is_a_byte_an_element():
    weight, a, b = pair(torch.float32, 300, 500)
    merge = gk.merge_lora_(weight, a * 0.05, b * 0.05, 1.0)
    assert merge.correction.nbytes == weight.numel()
    assert merge.elsewhere.nbytes + merge.originals.nbytes < weight.nbytes / 8


def test_rows_of_a_larger_matrix_and_any_threads():
    weight, a, b = pair(torch.float32)
    threads, merged = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            whole = torch.zeros(70, 260)
            whole[:, 7:207] = weight
            gk.merge_lora_(whole[:, 7:207], a, b, 0.5)
            assert not whole[:, [*range(7), *range(207, 260)]].any()
            merged.append(whole[:, 7:207].clone())
    finally:
        torch.set_num_threads(threads)
    gk.merge_lora_(weight, a, b, 0.5)
    assert same_bits(merged, [weight, weight])


def test_errors_change_nothing():
    weight, a, b = pair(torch.float32)
    original = weight.clone()
    with pytest.raises(ValueError, match=r"genai_kernels.merge_lora_: lora_b: expected \[70, 9\]"):
        gk.merge_lora_(weight, a, b[:69])
    with pytest.raises(TypeError, match=r"genai_kernels.merge_lora_: lora_a: expected float64"):
        gk.merge_lora_(weight, a.double(), b.double())
    with pytest.raises(ValueError, match=r"genai_kernels.merge_lora_: weight: expected a call under torch.no_grad"):
        gk.merge_lora_(weight.requires_grad_(), a, b)
    weight = weight.detach()
    other = gk.merge_lora_(weight.clone()[:60], a, b[:60])
    with pytest.raises(ValueError, match=r"genai_kernels.unmerge_lora_: merge: expected that of a weight \[70, 200\]"):
        gk.unmerge_lora_(weight, a, b, 1.0, other)
    assert same_bits(weight, original)


def test_autograd_sees_that_the_weight_changed():
    weight, a, b = pair(torch.float32)
    x = torch.randn(3, 200, requires_grad=True)
    y = gk.linear(x, weight)
    gk.merge_lora_(weight, a, b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
