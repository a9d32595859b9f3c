"""Direct calls go past the dispatcher only where it would add nothing, and leave nothing behind."""

import gc

import pytest
import torch
from calls import same_bits
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import genai_kernels as gk
from genai_kernels import _C


def r(*shape):
    return torch.randn(shape)


X, W = r(3, 8), r(8)
direct = _C.rms_norm


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_the_same_bits_as_through_the_dispatcher():
    through = torch.ops.genai_kernels.rms_norm.default(X, W, 1e-6)
    assert same_bits([direct(X, W, 1e-6), gk.rms_norm(X, W)], [through, through])


class Subclass(torch.Tensor):
    pass


NOT_FOR_IT = {
    "subclass": lambda: X.as_subclass(Subclass),
    "meta": lambda: X.to("meta"),
    "sparse": lambda: X.to_sparse(),
    "lazy negation": lambda: torch.randn(3, 8, dtype=torch.complex64).conj().imag,
    "lazy conjugation": lambda: torch.randn(3, 8, dtype=torch.complex64).conj(),
    "lazy zeros": lambda: torch._efficientzerotensor((3, 8)),
    "int16": lambda: torch.ones(3, 8, dtype=torch.int16),
    "an array": lambda: X.numpy(),
    "a list": lambda: [1.0],
    "None": lambda: None,
}


@pytest.mark.parametrize("make", NOT_FOR_IT.values(), ids=NOT_FOR_IT)
def test_tensors_that_only_the_dispatcher_knows(make):
    assert direct(make(), None, 1e-6) is NotImplemented


def test_a_lazy_negation_is_negated():
    z = torch.randn(3, 8, dtype=torch.complex64)
    assert z.conj().imag.is_neg()
    assert same_bits([gk.rms_norm(z.conj().imag)], [gk.rms_norm(-z.imag)])


def test_other_arguments_that_are_not_plain():
    assert direct(X, W) is NotImplemented
    assert direct(X, W, torch.tensor(1e-6)) is NotImplemented
    assert direct(X, W, "1e-6") is NotImplemented
    assert _C.rotary_embedding(r(2, 1, 4), r(2, 2), r(2, 2), None, 1, False) is NotImplemented


def test_gradients():
    x = X.clone().requires_grad_()
    assert direct(x, W, 1e-6) is not NotImplemented
    with torch.enable_grad():
        assert direct(x, W, 1e-6) is NotImplemented
        assert direct(X, W.clone().requires_grad_(), 1e-6) is NotImplemented
        assert direct(X, W, 1e-6) is not NotImplemented
        y = gk.rms_norm(x, W)
    assert y.requires_grad


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
def test_a_dispatch_mode_sees_the_op(grad):
    with torch.set_grad_enabled(grad), Recorder() as mode:
        gk.rms_norm(X.clone().requires_grad_(), W)
    assert "genai_kernels.rms_norm.default" in mode.seen


class Functions(torch.overrides.TorchFunctionMode):
    def __init__(self):
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_function_mode_sees_the_op():
    with Functions() as mode:
        gk.rms_norm(X, W)
    assert any("rms_norm" in name for name in mode.seen)


@pytest.mark.parametrize("grad", [False, True])
def test_the_profiler_sees_the_op(grad):
    with torch.set_grad_enabled(grad), torch.profiler.profile() as profile:
        gk.rms_norm(X.clone().requires_grad_(), W)
    assert "genai_kernels::rms_norm" in {event.key for event in profile.key_averages()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracing_records_the_op():
    traced = torch.jit.trace(lambda x: gk.rms_norm(x, W), X, check_trace=False)
    other = r(3, 8)
    assert same_bits([traced(other)], [gk.rms_norm(other, W)])


def test_forward_mode_loses_no_tangent():
    with forward_ad.dual_level():
        assert direct(X, W, 1e-6) is NotImplemented
        with pytest.raises(NotImplementedError, match="forward-mode"):
            gk.rms_norm(forward_ad.make_dual(X, X), W)


def test_transforms():
    with torch.enable_grad():
        found = torch.func.grad(lambda x: gk.rms_norm(x, W).sum())(X)
        x = X.clone().requires_grad_()
        (expected,) = torch.autograd.grad(gk.rms_norm(x, W).sum(), x)
    assert same_bits([found], [expected])
    seen = []
    torch.func.vmap(lambda row: (seen.append(direct(row, W, 1e-6)), row)[1])(X)
    assert seen == [NotImplemented]


def test_saved_tensor_hooks_see_what_is_saved():
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t

    x = X.clone().requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gk.rms_norm(x, W)
    assert X.shape in packed


def test_results_are_ordinary_tensors():
    y = direct(X, W, 1e-6)
    assert type(y) is torch.Tensor
    assert not y.is_inference()
    y.resize_(100, 100)
    with torch.inference_mode():
        assert direct(X, W, 1e-6).is_inference()
    o, lse = _C.merge_attention_states(r(1, 2, 3, 4), r(1, 3, 2), r(1, 2, 3, 4), r(1, 3, 2))
    assert (o.shape, lse.shape) == ((1, 2, 3, 4), (1, 3, 2))


def test_nothing_is_kept():
    x = X.clone().requires_grad_()

    def call():
        direct(X, W, 1e-6)
        direct(None, W, 1e-6)
        _C.merge_attention_states(r(1, 2, 3, 4), r(1, 3, 2), r(1, 2, 3, 4), r(1, 3, 2))
        with pytest.raises(ValueError, match="eps"):
            direct(X, W, -1.0)
        with torch.enable_grad():
            gk.rms_norm(x, W).sum().backward()

    call()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        call()
    gc.collect()
    assert len(gc.get_objects()) - before < 20


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: direct(X, r(7), 1e-6), ValueError),
        (lambda: _C.rotary_embedding(r(2, 1, 4), r(9, 2), r(9, 2), torch.tensor([0, 9]), True, False), IndexError),
        (lambda: gk.rms_norm(X, W.to(torch.int32)), TypeError),
    ],
)
def test_errors_are_those_of_the_op(call, kind):
    with pytest.raises(kind, match=r"genai_kernels\.\w+: [\w\[\]]+: expected"):
        call()
