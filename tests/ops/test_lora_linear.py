"""What the samples of lora_linear and lora_linear_multi cannot say: whose bits are whose, and what dropout drops."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import genai_kernels as gk
from genai_kernels.ops.lora_linear.reference import dropout_keep

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def layer(dtype, rows=60, inputs=140, outputs=70, ranks=(8, 20, 3)):
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    adapters = [
        gk.LoRAAdapter(torch.randn(r, inputs).to(dtype), torch.randn(outputs, r).to(dtype), 0.5 + r) for r in ranks
    ]
    return x, weight, adapters, torch.randn(outputs).to(dtype)


@DTYPES
def test_a_row_is_what_it_is_alone(dtype):
    x, weight, adapters, bias = layer(dtype)
    ids = torch.randint(-1, 3, (60,), dtype=torch.int32)
    y = gk.lora_linear_multi(x, weight, adapters, ids, bias)
    plain = gk.linear(x, weight, bias)
    for i, adapter in enumerate(adapters):
        one = gk.lora_linear(x, weight, adapter.lora_a, adapter.lora_b, adapter.scaling, bias)
        assert torch.equal(y[ids == i], one[ids == i])
        assert not torch.equal(one, plain)
    assert torch.equal(y[ids < 0], plain[ids < 0])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for begin, end in ((0, 1), (5, 7), (10, 43), (59, 60)):
            part = gk.lora_linear_multi(x[begin:end], weight, adapters, ids[begin:end], bias)
            assert torch.equal(part, y[begin:end])
    order = torch.randperm(60)
    assert torch.equal(gk.lora_linear_multi(x[order], weight, adapters, ids[order], bias), y[order])
    swapped = torch.tensor([2, 0, 1, -1], dtype=torch.int32)[ids.long()]  # the ids of the adapters in another order
    assert torch.equal(gk.lora_linear_multi(x, weight, [adapters[1], adapters[2], adapters[0]], swapped, bias), y)


@DTYPES
def test_an_adapter_that_adds_nothing_changes_no_bit(dtype):
    x, weight, (adapter, *_), bias = layer(dtype)
    plain = gk.linear(x, weight, bias)
    assert torch.equal(gk.lora_linear(x, weight, adapter.lora_a, adapter.lora_b * 0, 2.0, bias), plain)
    assert torch.equal(gk.lora_linear(x, weight, adapter.lora_a, adapter.lora_b, 0.0, bias), plain)


@DTYPES
def test_columns_of_a_fused_projection(dtype):
    """q, k and v as one product with an adapter each are what they are as three."""
    x, weight, _, bias = layer(dtype, outputs=72)
    parts = [(0, 40), (40, 50), (50, 72)]
    adapters = [
        gk.LoRAAdapter(torch.randn(r, 140).to(dtype), torch.randn(e - b, r).to(dtype), 1.0, (b, e))
        for r, (b, e) in zip((8, 4, 30), parts, strict=True)
    ]
    ids = torch.tensor([[0, 1, 2], [0, -1, 2], [-1, -1, -1]], dtype=torch.int32).repeat(20, 1)
    y = gk.lora_linear_multi(x, weight, adapters, ids, bias)
    for i, (begin, end) in enumerate(parts):
        alone = adapters[i]._replace(columns=None)
        part = gk.lora_linear_multi(x, weight[begin:end], [alone], (ids[:, i] >= 0).int() - 1, bias[begin:end])
        assert torch.equal(y[:, begin:end], part)


def test_segments_are_rows():
    x, weight, adapters, bias = layer(torch.float32)
    ids = torch.tensor([2, -1, 0, 1], dtype=torch.int32)
    begins = torch.tensor([0, 7, 7, 30, 60], dtype=torch.int32)
    by_row = ids.repeat_interleave(begins.diff().long())
    y = gk.lora_linear_multi(x, weight, adapters, ids, bias, cu_seqlens=begins)
    assert torch.equal(y, gk.lora_linear_multi(x, weight, adapters, by_row, bias))


@DTYPES
def test_gradients_do_not_depend_on_threads_nor_on_other_adapters(dtype):
    x, weight, adapters, bias = layer(dtype, rows=150)
    ids = torch.randint(-1, 3, (150,), dtype=torch.int32)
    dy = torch.randn(150, 70).to(dtype)
    leaves = [x, weight, bias, *(t for a in adapters for t in a[:2])]
    for t in leaves:
        t.requires_grad_()

    def gradients():
        return torch.autograd.grad(
            gk.lora_linear_multi(x, weight, adapters, ids, bias, dropout_p=0.2, seed=3), leaves, dy
        )

    torch.set_num_threads(1)
    expected = gradients()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, gradients(), expected))
    for i, adapter in enumerate(adapters):  # its rows alone
        rows = ids == i
        y = gk.lora_linear(x[rows], weight, *adapter[:3], bias)
        alone = torch.autograd.grad(y, (x, adapter.lora_a, adapter.lora_b), dy[rows])
        mixed = torch.autograd.grad(
            gk.lora_linear_multi(x, weight, adapters, ids, bias), (x, adapter.lora_a, adapter.lora_b), dy
        )
        assert torch.equal(alone[0][rows], mixed[0][rows])
        assert all(map(torch.equal, alone[1:], mixed[1:]))


def test_only_what_is_wanted_gets_a_gradient():
    x, weight, (adapter, *_), bias = layer(torch.float32)
    frozen = gk.lora_linear(x, weight, adapter.lora_a.requires_grad_(), adapter.lora_b, 1.0, bias)
    frozen.sum().backward()
    assert adapter.lora_a.grad is not None
    assert all(t.grad is None for t in (x, weight, adapter.lora_b, bias))
    with torch.no_grad():
        assert not gk.lora_linear(x, weight, adapter.lora_a, adapter.lora_b).requires_grad


def test_dropout_drops_its_share_and_the_same_in_both_passes():
    x, weight = torch.ones(400, 300, requires_grad=True), torch.zeros(300, 300)
    eye = torch.eye(300)
    y = gk.lora_linear(x, weight, eye, eye, 1.0, dropout_p=0.3, seed=7)  # y is dropout(x)
    kept = y != 0
    assert torch.equal(kept, dropout_keep(400, 300, 0.3, 7))
    assert abs(kept.double().mean().item() - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5
    assert (y[kept] == torch.tensor(1 / 0.7)).all()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx != 0, kept)
    assert torch.equal(gk.lora_linear(x, weight, eye, eye, 1.0, dropout_p=0.3, seed=7), y)
    assert not torch.equal(gk.lora_linear(x, weight, eye, eye, 1.0, dropout_p=0.3, seed=8), y)
    torch.manual_seed(0)
    drawn = gk.lora_linear(x, weight, eye, eye, 1.0, dropout_p=0.3)
    torch.manual_seed(0)
    assert torch.equal(gk.lora_linear(x, weight, eye, eye, 1.0, dropout_p=0.3), drawn)


def test_a_nan_stays_in_the_rows_of_its_adapter():
    x, weight, adapters, bias = layer(torch.float32)
    ids = torch.randint(-1, 3, (60,), dtype=torch.int32)
    expected = gk.lora_linear_multi(x, weight, adapters, ids, bias)
    adapters[1].lora_a[3, 17] = torch.nan
    y = gk.lora_linear_multi(x, weight, adapters, ids, bias)
    assert y[ids == 1].isnan().all()
    assert torch.equal(y[ids != 1], expected[ids != 1])


PEAK = """
import sys, torch, genai_kernels as gk
def high():  # of this program alone: getrusage begins with that of the one that started it
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
torch.set_num_threads(2)
def step(rows, width):
    x = torch.empty(rows, width, dtype=torch.bfloat16).normal_().requires_grad_()
    weight = torch.empty(width, width, dtype=torch.bfloat16).normal_()
    a, b = (torch.empty(shape).normal_().requires_grad_() for shape in ((16, width), (width, 16)))
    y = gk.lora_linear(x, weight, a, b, 2.0, dropout_p=0.1, seed=1)
    y.backward(y.detach())
with gk.use_backend(sys.argv[1]):
    step(16, 64)
    before = high()
    step(16384, 512)
print(high() - before)
"""


def test_memory_of_a_training_step():
    """x, y and dx are 16 MiB each; beside them S and dS, 1 MiB each, the adapter's gradients and scratch."""

    def peak(backend):
        command = [sys.executable, "-c", PEAK, backend]
        root = Path(__file__).resolve().parents[2]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout) / 1024

    ours, eager = peak("auto"), peak("reference")
    assert ours < 60, f"{ours:.0f} MiB"
    assert ours < eager / 2, f"{ours:.0f} MiB of {eager:.0f}"


X, W, A, B = torch.ones(4, 6), torch.ones(5, 6), torch.ones(2, 6), torch.ones(5, 2)


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        ((torch.ones(4, 7), W, A, B), {}, ValueError, r"x: expected a last dimension of 6 as weight has, got .*4, 7"),
        ((X, W, torch.ones(2, 7), B), {}, ValueError, r"lora_a: expected \[rank, 6\], got shape \[2, 7\]"),
        ((X, W, A, torch.ones(5, 3)), {}, ValueError, r"lora_b: expected \[5, 2\], .* got shape \[5, 3\]"),
        ((X, W.half(), A, B), {}, TypeError, r"weight: expected the dtype of x"),
        ((X, W, A.half(), B.half()), {}, TypeError, r"lora_a: expected the dtype of x, float32, or float32, got"),
        ((X.half(), W.half(), A.half(), B), {}, TypeError, r"lora_b: expected the dtype of lora_a"),
        ((X, W, A, B), {"dropout_p": 1.0}, ValueError, r"dropout_p: expected 0 <= p < 1, got 1"),
        ((X, W, A, B), {"scaling": torch.inf}, ValueError, r"scaling: expected a finite number"),
        ((X, W, A, B), {"bias": torch.ones(4)}, ValueError, r"bias: expected \[5\], got shape \[4\]"),
    ],
)
def test_errors(args, options, error, text):
    with pytest.raises(error, match=r"genai_kernels\.lora_linear: " + text):
        gk.lora_linear(*args, **options)


IDS = torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("ids", "options", "error", "text"),
    [
        (IDS + 1, {}, IndexError, r"adapter_ids\[0, 0\]: expected -1 <= id < 1, got 1"),
        (IDS - 2, {}, IndexError, r"adapter_ids\[0, 0\]: expected -1 <= id < 1, got -2"),
        (IDS.long(), {}, TypeError, r"adapter_ids: expected int32, got torch\.int64"),
        (IDS[:3], {}, ValueError, r"adapter_ids: expected \[4\], .* got shape \[3\]"),
        (IDS.view(4, 1).expand(4, 2), {}, ValueError, r"adapter_ids\[0, 1\]: expected an adapter once .* got 0 again"),
        (IDS[:1], {"cu_seqlens": IDS[:1]}, ValueError, r"cu_seqlens: expected \[n \+ 1\]"),
        (IDS[:1], {"cu_seqlens": torch.tensor([0, 3]).int()}, ValueError, r"cu_seqlens: expected to rise from 0 to 4"),
    ],
)
def test_errors_of_many(ids, options, error, text):
    with pytest.raises(error, match=r"genai_kernels\.lora_linear_multi: " + text):
        gk.lora_linear_multi(X, W, [gk.LoRAAdapter(A, B)], ids, **options)


def test_columns_beyond_the_layer():
    with pytest.raises(ValueError, match=r"adapters\[0\]\.columns: expected 0 <= begin <= end <= 5, got 1 and 6"):
        gk.lora_linear_multi(X, W, [gk.LoRAAdapter(A, B, 1.0, (1, 6))], IDS)
