"""Every op over its own samples: the accuracy rule forward and backward, opcheck, gradcheck, torch.compile.

A new op is tested here by declaring samples in its room; nothing in this file names an op.
"""

import pytest
import torch

import genai_kernels  # noqa: F401  fills OPS
from genai_kernels.accuracy import map_tensors, verify_sample
from genai_kernels.registry import FLOATS, OPS, Make

CASES = [(op, sample) for op in OPS.values() for sample in op.samples if not sample.bench]
IDS = [f"{op.name}-{sample.name}" for op, sample in CASES]
each_case = pytest.mark.parametrize(("op", "sample"), CASES, ids=IDS)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@each_case
def test_accuracy(op, sample, dtype, pytestconfig):
    verdicts = verify_sample(op, sample, dtype, enough=pytestconfig.getoption("--enough"))
    complaints = [f"{v.what}: {v.complaint}" for v in verdicts if not v.ok]
    assert not complaints, "; ".join(complaints)


def smaller(sample):
    """A sample's call in float64 with gradients, or None where it is too large for finite differences."""
    args, kwargs = sample.build(Make(torch.float64))
    total = 0

    def leaf(t):
        nonlocal total
        if not t.is_floating_point():
            return t
        total += t.numel()
        overlaps = any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True))
        return (t.clone(memory_format=torch.contiguous_format) if overlaps else t.detach()).requires_grad_()

    call = map_tensors(leaf, (args, kwargs))
    for name in sample.frozen:
        call[1][name].requires_grad_(False)
    return call if 0 < total <= 1500 else None


@each_case
def test_gradcheck(op, sample):
    call = smaller(sample) if op.differentiable else None
    if call is None:
        return  # the accuracy test covers its gradients
    leaves = []
    map_tensors(lambda t: leaves.append(t) if t.requires_grad else None, call)

    def function(*values):
        values = iter(values)
        args, kwargs = map_tensors(lambda t: next(values) if t.requires_grad else t, call)
        result = op.function(*args, **kwargs)
        results = result if isinstance(result, tuple) else (result,)
        return tuple(r for r in results if r.requires_grad and torch.isfinite(r).all())

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@each_case
def test_inference_mode_gives_the_same_bits(op, sample):
    call = sample.build(Make(torch.float32))
    ours = op.function(*call[0], **call[1])
    with torch.inference_mode():
        again = op.function(*call[0], **call[1])
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (ours, again)), strict=True):
        assert torch.equal(a, b) or torch.equal(torch.isnan(a), torch.isnan(b))
