"""What holds for every op that works row by row: same bits wherever a row stands, mixed dtypes, autocast, compile."""

import pytest
import torch
from norms_common import CALLS, FLOATS, NORMS

import genai_kernels as gk
from genai_kernels.accuracy import compare

each_call = pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
each_norm = pytest.mark.parametrize("call", NORMS, ids=lambda f: f.__name__)


def gradients(call, x, w, b):
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    outputs = call(*leaves)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    found = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    return [o.detach() for o in outputs], [g for g in found if g is not None]


def inputs(rows, n, dtype):
    return torch.randn(rows, n).to(dtype), torch.randn(n).to(dtype), torch.randn(n).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@each_call
def test_a_row_has_the_same_bits_in_any_batch(call, dtype):
    x, w, b = inputs(37, 202, dtype)
    whole = call(x, w, b)
    for rows in (slice(0, 1), slice(5, 6), slice(30, 37)):
        for all_rows, some in zip(whole, call(x[rows], w, b), strict=True):
            assert torch.equal(all_rows[rows], some)


@pytest.mark.parametrize("dtype", FLOATS)
@each_call
def test_same_bits_for_every_thread_count(call, dtype):
    x, w, b = inputs(301, 514, dtype)
    expected = None
    for threads in (1, 2, 3, 7, 16):
        torch.set_num_threads(threads)
        outputs, grads = gradients(call, x, w, b)
        expected = expected or (outputs, grads)
        for ours, first in zip((*outputs, *grads), (*expected[0], *expected[1]), strict=True):
            assert torch.equal(ours, first)


@each_call
def test_layout_does_not_change_bits(call):
    x, w, b = inputs(9, 66, torch.float32)
    holey = torch.full((9, 2, 66, 3), torch.nan)[:, 0, :, 1]
    holey.copy_(x)
    for a, c in zip(gradients(call, x, w, b)[0], gradients(call, holey, w, b)[0], strict=True):
        assert torch.equal(a, c)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 130, 515, 2049, 4099])
@each_norm
def test_every_tail(call, n):
    ours, eager, exact = [], [], []
    for _ in range(8):  # judged together, as genai_kernels.accuracy says
        x, w, b = inputs(5, n, torch.float32)
        ours.append(call(x, w, b)[0].flatten())
        with gk.use_backend("reference"):
            eager.append(call(x, w, b)[0].flatten())
            exact.append(call(x.double(), w.double(), b.double())[0].flatten())
    verdict = compare("y", torch.cat(ours), torch.cat(eager), torch.cat(exact), 1.0, 1.0, draws=8)
    assert verdict.ok, verdict.complaint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_norm
def test_float32_parameters(call, dtype):
    x, w, b = torch.randn(6, 96).to(dtype), torch.randn(96), torch.randn(96)
    outputs, grads = gradients(call, x, w, b)
    assert all(o.dtype == dtype for o in outputs)
    assert [g.dtype for g in grads] == [dtype, *[torch.float32] * (len(grads) - 1)]


@each_call
def test_autocast_leaves_dtypes_alone(call):
    x, w, b = torch.randn(6, 96).bfloat16(), torch.randn(96), torch.randn(96)
    expected = call(x, w, b)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, plain in zip(call(x, w, b), expected, strict=True):
            assert ours.dtype == torch.bfloat16
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("n", [24, 300])
@each_norm
def test_huge_rows_are_finite(call, n):
    x, w, b = inputs(4, n, torch.float32)
    outputs, grads = gradients(call, x * 1e30, w, b)
    assert all(torch.isfinite(t).all() for t in (*outputs, *grads))
    assert 0.3 < outputs[0].std() < 3


@pytest.mark.parametrize("n", [24, 300])
def test_tiny_rows_without_eps(n):
    x = torch.randn(4, n)
    for norm in (gk.rms_norm, gk.layer_norm):
        assert torch.equal(norm(x * 2.0**-100, eps=0.0), norm(x, eps=0.0))  # a power of two is exact


@each_call
def test_no_input_changes(call):
    tensors = inputs(6, 64, torch.float32)
    before = [t.clone() for t in tensors]
    versions = [t._version for t in tensors]
    gradients(call, *tensors)
    assert all(torch.equal(t, c) for t, c in zip(tensors, before, strict=True))
    assert versions == [t._version for t in tensors]


@each_call
def test_compile_fullgraph(call):
    x, w, b = inputs(6, 64, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(gradients(compiled, x, w, b), gradients(call, x, w, b), strict=True):
        for a, c in zip(ours, plain, strict=True):
            assert torch.equal(a, c)


@pytest.mark.parametrize("call", CALLS[:-1], ids=lambda f: f.__name__)
def test_double_backward_is_refused(call):
    x, w, b = (t.requires_grad_() for t in inputs(3, 8, torch.float32))
    (dx,) = torch.autograd.grad(call(x, w, b)[0].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        dx.sum().backward()


def test_rotary_double_backward_works():
    x = torch.randn(3, 1, 8, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda t: gk.rotary_embedding(t, angle.cos(), angle.sin()) ** 2, x)
