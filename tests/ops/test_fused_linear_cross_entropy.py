"""What the samples of fused_linear_cross_entropy cannot say: whose bits depend on what, memory, backward's two ways."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import bits, same_bits

import genai_kernels as gk
from genai_kernels.nn import FusedLinearCrossEntropy

ROOT = Path(__file__).resolve().parents[2]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
OPTIONS = {"label_smoothing": 0.1, "softcap": 8.0, "z_loss": 1e-3}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def call(rows=300, width=70, vocabulary=130, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((rows, width), (vocabulary, width), (vocabulary,))
    )
    target = torch.randint(vocabulary, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < 0.2] = -100
    return x, weight, target, bias


def step(x, weight, target, bias, dloss=None, **options):
    """Loss, dx, dW, db."""
    loss = gk.fused_linear_cross_entropy(x, weight, target, bias, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight, bias), dloss)]


@DTYPES
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_same_bits_for_any_number_of_threads(dtype, reduction):
    x, weight, target, bias = call(dtype=dtype)
    dloss = torch.randn(300).to(torch.float64 if dtype == torch.float64 else torch.float32)
    options = {"reduction": reduction, "dloss": dloss if reduction == "none" else None, **OPTIONS}
    torch.set_num_threads(1)
    expected = step(x, weight, target, bias, **options)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert same_bits(step(x, weight, target, bias, **options), expected)


@DTYPES
def test_a_row_does_not_know_of_the_others(dtype):
    """Its loss with "none", and its gradient with "none" and with "sum", alone, among others, and in another place."""
    x, weight, target, bias = call(dtype=dtype)
    dloss = torch.linspace(-1, 2, 300, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    loss, dx, *_ = step(x, weight, target, bias, dloss, reduction="none", **OPTIONS)
    _, dx_sum, *_ = step(x, weight, target, bias, reduction="sum", **OPTIONS)
    for picked in ([0], [7, 8], range(31, 161), torch.randperm(300)):
        part = x[list(picked)].detach().requires_grad_(), weight, target[list(picked)], bias
        found = step(*part, dloss[list(picked)], reduction="none", **OPTIONS)
        assert same_bits(found[:2], [loss[list(picked)], dx[list(picked)]])
        assert same_bits(step(*part, reduction="sum", **OPTIONS)[1], dx_sum[list(picked)])


@DTYPES
def test_ignored_rows_change_no_bit(dtype):
    x, weight, target, bias = call(dtype=dtype)
    kept = target != -100
    expected = step(x[kept].detach().requires_grad_(), weight, target[kept], bias, **OPTIONS)
    x.data[~kept] = torch.nan
    loss, dx, *others = step(x, weight, target, bias, **OPTIONS)
    assert same_bits([loss, dx[kept], *others], expected)
    assert not dx[~kept].any()


def test_nan_stays_in_its_row():
    x, weight, target, bias = call()
    expected = step(x, weight, target.abs() % 130, bias, torch.ones(300), reduction="none")
    x.data[5, 3] = torch.nan
    loss, dx, *_ = step(x, weight, target.abs() % 130, bias, torch.ones(300), reduction="none")
    assert loss[5].isnan()
    assert dx[5].isnan().all()
    loss[5], dx[5] = expected[0][5], expected[1][5]
    assert same_bits([loss, dx], expected[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_second_backward_computes_the_gradients_again(dtype, reduction):
    """The first one scales what forward left where it lies; nobody else may see that."""
    x, weight, target, bias = call(dtype=dtype)
    loss = gk.fused_linear_cross_entropy(x, weight, target, bias, reduction=reduction, **OPTIONS)
    first = torch.autograd.grad(loss, (x, weight), torch.tensor(0.5), retain_graph=True)
    before = [g.clone() for g in first]
    db = torch.autograd.grad(loss, bias, torch.tensor(0.5), retain_graph=True)  # that one was still there
    again = torch.autograd.grad(loss, (x, weight, bias), torch.tensor(0.5))
    assert same_bits(list(first), before)
    assert same_bits([*first, *db], list(again))


def test_every_subset_of_gradients():
    x, weight, target, bias = call()
    expected = step(x, weight, target, bias)[1:]
    for which in range(1, 8):
        tensors = [t.detach().requires_grad_(bool(which >> i & 1)) for i, t in enumerate((x, weight, bias))]
        gk.fused_linear_cross_entropy(tensors[0], tensors[1], target, tensors[2]).backward()
        for i, (t, e) in enumerate(zip(tensors, expected, strict=True)):
            assert same_bits(t.grad, e) if which >> i & 1 else t.grad is None


def test_small_gradients_of_float16_do_not_vanish():
    """A loss that is scaled, as float16 needs it: the mean over many rows must not be rounded before it is."""
    x, weight, target, bias = call(rows=1000, dtype=torch.float16)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    found = step(x, weight, target, bias, torch.tensor(1024.0))[1:]
    expected = step(exact[0], exact[1], target, exact[2], torch.tensor(1024.0, dtype=torch.float64))[1:]
    for ours, ref in zip(found, expected, strict=True):
        normal = ref.abs() > 2**-14
        assert ((ours.double() - ref).abs() <= 2**-10 * ref.abs())[normal].float().mean() > 0.99


def test_the_losses_of_a_few_rows_by_hand():
    x, weight = torch.zeros(3, 4), torch.randn(8, 4)
    target = torch.tensor([1, -100, 7], dtype=torch.int32)
    loss, z = gk.fused_linear_cross_entropy(x, weight, target, z_loss=0.5, reduction="none", return_z_loss=True)
    of_uniform = torch.log(torch.tensor(8.0))
    torch.testing.assert_close(z, torch.stack([of_uniform**2 / 2, torch.zeros(()), of_uniform**2 / 2]))
    torch.testing.assert_close(loss - z, torch.stack([of_uniform, torch.zeros(()), of_uniform]))
    assert not z.requires_grad


def test_module():
    layer = FusedLinearCrossEntropy(6, 11, bias=True, reduction="sum", label_smoothing=0.1)
    x, target = torch.randn(2, 5, 6), torch.randint(11, (2, 5))
    expected = gk.fused_linear_cross_entropy(x, layer.weight, target, layer.bias, reduction="sum", label_smoothing=0.1)
    assert same_bits(layer(x, target), expected)
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert "reduction=sum" in repr(layer)


# ---- what it is registered as ----


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    x, weight, target, bias = (
        t.detach().requires_grad_(requires_grad and t.is_floating_point()) for t in call(9, 8, 11)
    )
    ops, numbers = torch.ops.genai_kernels, (-100, 0.1, 5.0, 1e-3)
    wanted = [requires_grad] * 3
    forward = (x, weight, target, bias, *numbers, 2, *wanted)
    torch.library.opcheck(ops.fused_linear_cross_entropy.default, forward)
    torch.library.opcheck(
        ops.fused_linear_cross_entropy_bwd.default,
        (torch.randn(9), x, weight, target, bias, *numbers, True, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction):
    x, weight, target, bias = call(20, 16, 30)

    def total(x, weight, bias):
        return gk.fused_linear_cross_entropy(x, weight, target, bias, reduction=reduction).sum() * 3

    expected = torch.autograd.grad(total(x, weight, bias), (x, weight, bias))
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        found = torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_torch_func_and_double_backward():
    x, weight, target, _ = call(20, 16, 30)
    (expected,) = torch.autograd.grad(gk.fused_linear_cross_entropy(x, weight, target), x)
    found = torch.func.grad(lambda x: gk.fused_linear_cross_entropy(x, weight.detach(), target))(x.detach())
    torch.testing.assert_close(found, expected)
    loss = gk.fused_linear_cross_entropy(x, weight, target)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(dx, expected)
    with pytest.raises(NotImplementedError, match="fused_linear_cross_entropy: double backward is not implemented"):
        dx.sum().backward()


# ---- memory ----

PEAK = """
import sys, torch, genai_kernels as gk
def high():  # of this program alone: getrusage begins with that of the one that started it
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
torch.set_num_threads(2)
rows, width, vocabulary, dtype, twin = *map(int, sys.argv[1:4]), getattr(torch, sys.argv[4]), sys.argv[5] == "eager"
def step(rows, vocabulary):
    x, weight = (torch.empty(n, width).normal_().to(dtype).requires_grad_() for n in (rows, vocabulary))
    target = torch.randint(vocabulary, (rows,))
    loss = gk.fused_linear_cross_entropy(x, weight, target)
    (loss / 3).backward()
with gk.use_backend("reference" if twin else "auto"):
    step(16, 64)
    before = high()
    step(rows, vocabulary)
print(high() - before)
"""


def peak(*arguments):
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout) / 1024


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_a_fifth_of_eagers(dtype):
    """4096 rows of 16384 logits: 256 MiB of them in float32, of which eager holds several at once."""
    ours, eager = (peak(4096, 64, 16384, dtype, which) for which in ("ours", "eager"))
    # x, weight, their gradients and the sums these are rounded from: 14 MiB at most; 32 MiB of logits; scratch
    assert ours < 56, f"{ours:.0f} MiB"
    assert ours < eager / 5, f"{ours:.0f} MiB of {eager:.0f}"


# ---- errors ----

X, W, T = torch.ones(3, 4), torch.ones(7, 4), torch.tensor([0, 6, 2])


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        ((X, torch.ones(7), T), {}, ValueError, r"weight: expected \[vocabulary, in\], got shape \[7\]"),
        ((X, torch.ones(7, 5), T), {}, ValueError, r"x: expected a last dimension of 5 as weight has, .* \[3, 4\]"),
        ((X, W.half(), T), {}, TypeError, r"weight: expected the dtype of x, float32, got float16"),
        ((X.int(), W, T), {}, TypeError, r"x: expected float32, .* got int32"),
        ((X, W, T[:2]), {}, ValueError, r"target: expected the shape of x .* \[3\], got \[2\]"),
        ((torch.tensor(1.0), W, T), {}, ValueError, r"target: expected the shape of x .* got \[3\]"),
        ((X, W, T.float()), {}, TypeError, r"target: expected int32 or int64, got float32"),
        ((X, W, T, torch.ones(6)), {}, ValueError, r"bias: expected \[7\], got shape \[6\]"),
        ((X, W, T, torch.ones(7).half()), {}, TypeError, r"bias: expected the dtype of x"),
        ((X, W, T + 1), {}, IndexError, r"target: row 1: expected 0 <= class < 7 or ignore_index -100, got 7"),
        ((X, W, T - 1), {}, IndexError, r"target: row 0: expected .* got -1"),
        ((X, W, T - 100), {"ignore_index": -98}, IndexError, r"target: row 0: expected .* -98, got -100"),
        ((X, W, T), {"reduction": "avg"}, ValueError, r"reduction: expected \"mean\", \"sum\" or \"none\", got 'avg'"),
        ((X, W, T), {"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected 0 <= .* <= 1, got 1.5"),
        ((X, W, T), {"softcap": -1.0}, ValueError, r"softcap: expected a finite number >= 0 .* got -1"),
        ((X, W, T), {"z_loss": float("nan")}, ValueError, r"z_loss: expected a finite number >= 0 .* got nan"),
    ],
)
def test_errors(args, options, error, text):
    with pytest.raises(error, match=r"genai_kernels\.fused_linear_cross_entropy: " + text):
        gk.fused_linear_cross_entropy(*args, **options)
    assert torch.equal(bits(X), bits(torch.ones(3, 4)))
