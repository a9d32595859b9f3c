"""Where PEFT's own forward serves an accelerated model: its bits and its errors, and the report says why."""

import contextlib
import copy
from unittest import mock

import pytest
import torch
from peft_models import BF16, F16, F32, F64, layer_of, learnt, one_layer, peft
from torch import nn
from torch.nn.utils import parametrize

from genai_kernels.integrations import peft as accelerated


def passes_on(model, why, x=None, around=contextlib.nullcontext, **kwargs):
    """A call of PEFT's, and the same of an accelerated copy: bits, gradients, counts. Returns what the layer is."""
    ours = copy.deepcopy(model)
    report = accelerated.accelerate(ours)
    x = (torch.randn(6, 40) if x is None else x).requires_grad_()
    results = []
    for m in (model, ours):
        torch.manual_seed(3)
        with around():
            y = layer_of(m)(x, **kwargs)
        results.append((y, *torch.autograd.grad(y.sum(), [x, *learnt(m)], allow_unused=True)))
    for theirs, found in zip(*results, strict=True):
        assert (theirs is None) == (found is None)
        assert theirs is None or torch.equal(theirs, found)
    assert (report.served.total(), report.passed_on) == (0, {why: 1}), report
    assert report.where == {why: {"base_model.model.layer": 1}}
    return report.layers["base_model.model.layer"]


def doubled(module, args, output):
    return 2 * output


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_a_hook_on_a_part(part, register):
    model, called = one_layer(), []
    module = getattr(layer_of(model), part)["default"]
    getattr(module, register)(lambda *args: called.append(args))
    assert passes_on(model, f"a hook on {part}") == f"a hook on {part}"
    assert len(called) == 2


def test_a_hook_on_the_base_layer_and_its_end():
    model = one_layer()
    handle = layer_of(model).base_layer.register_forward_hook(doubled)
    passes_on(model, "a hook on the base layer")
    report = accelerated.accelerate(model)
    x = torch.randn(6, 40)
    with_hook = layer_of(model)(x)
    handle.remove()
    layer_of(model)(x)
    assert (report.served.total(), report.passed_on.total()) == (1, 1)
    assert list(report.layers.values()) == ["fused"]
    layer_of(model).register_forward_hook(doubled)  # on the layer itself: it is called all the same
    y = layer_of(model)(x)
    assert report.served.total() == 2
    assert not torch.equal(y, with_hook)
    accelerated.restore(model)
    torch.testing.assert_close(layer_of(model)(x), y)


def test_a_hook_on_every_module():
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        passes_on(one_layer(), "a hook on all modules")
    finally:
        handle.remove()


def test_a_forward_of_its_own():
    model = one_layer()
    base = layer_of(model).base_layer
    base.forward = lambda x: nn.Linear.forward(base, x) + 1
    passes_on(model, "the base layer has a forward of its own")
    model = one_layer()
    layer = layer_of(model)
    before = type(layer).forward
    layer.forward = lambda x: before(layer, x) + 1
    report = accelerated.accelerate(model)
    assert list(report.layers.values()) == ["it has a forward of its own"]
    assert type(layer) is peft.tuners.lora.Linear
    del layer.forward
    with accelerated.accelerate(model) as report:
        ours = layer.forward
        layer.forward = lambda x: ours(x) + 1
        x = torch.randn(6, 40)
        y = layer(x)
        assert list(report.layers.values()) == ["it has a forward of its own, which may call this one"]
        assert report.served.total() == 1
    torch.testing.assert_close(layer(x), y)  # what was kept of it serves as PEFT's
    assert report.served.total() == 1


def test_another_variant():
    assert passes_on(one_layer(init_lora_weights="mica"), "MiCA") == "MiCA"


def test_dora_that_cannot_go():
    passes_on(one_layer("one", "two", use_dora=True), "Dora beside other adapters")
    model = one_layer(use_dora=True)
    layer_of(model).lora_B["default"].bias = nn.Parameter(torch.randn(24))
    passes_on(model, "Dora with a bias of lora_B")
    model = one_layer(use_dora=True)
    layer_of(model).lora_magnitude_vector["default"].register_forward_hook(doubled)
    assert passes_on(model, "a hook on the magnitudes") == "a hook on the magnitudes"


def test_activated_lora():
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["layer"], alora_invocation_tokens=[1])
    model = peft.inject_adapter_in_model(config, nn.ModuleDict({"layer": nn.Linear(40, 24)}))
    nn.init.normal_(model["layer"].lora_B["default"].weight)
    x, offsets = torch.randn(2, 5, 40), {"alora_offsets": [2, 4]}
    expected = model["layer"](x, **offsets)
    with accelerated.accelerate(model) as report:
        assert torch.equal(model["layer"](x, **offsets), expected)
    assert report.passed_on == {"ALora": 1}


def test_a_variant_that_is_not_used_is_no_reason():
    model = one_layer("one")
    model.add_adapter("two", peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights="mica"))
    report = accelerated.accelerate(model)
    layer_of(model)(torch.randn(2, 40))
    assert report.served.total() == 1
    model.base_model.set_adapter(["one", "two"])
    assert list(report.layers.values()) == ["MiCA"]


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "why"),
    [
        (F32, BF16, "an adapter of torch.bfloat16 for torch.float32"),
        (BF16, F16, "an adapter of torch.float16 for torch.bfloat16"),
        (F64, F32, "an adapter of torch.float32 for torch.float64"),
    ],
    ids=str,
)
def test_dtypes_of_adapters(dtype, adapter_dtype, why):
    passes_on(one_layer(dtype=dtype, adapter_dtype=adapter_dtype), why, torch.randn(6, 40, dtype=dtype))


def test_adapters_of_two_dtypes():
    model = one_layer("one", "two", dtype=BF16)
    layer_of(model).lora_A["two"].to(BF16)
    layer_of(model).lora_B["two"].to(BF16)
    passes_on(model, "adapters of different dtypes in one call", torch.randn(6, 40).to(BF16))


def test_dropout_of_several_adapters():
    model = one_layer("one", "two", lora_dropout=0.5)
    passes_on(model, "dropout for several adapters on a row")
    layer_of(model).lora_dropout["two"].p = 0.25
    passes_on(model, "adapters with different dropout in one call")
    passes_on(model, "adapters with different dropout in one call", adapter_names=["one", "two"] * 3)
    layer_of(model).lora_dropout["one"] = nn.Dropout1d(0.5)
    passes_on(model, "lora_dropout is Dropout1d")


def test_dropout_of_everything():
    model = one_layer(lora_dropout=0.5)
    layer_of(model).lora_dropout["default"].p = 1.0
    passes_on(model, "dropout of everything")


def test_an_adapter_twice():
    model = one_layer("one", "two")
    layer_of(model)._active_adapter = ["one", "two", "one"]
    passes_on(model, "an adapter that is active twice")


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parts_of_other_kinds():
    model = one_layer()
    parametrize.register_parametrization(layer_of(model).base_layer, "weight", Doubled())
    report = accelerated.accelerate(model)
    x = torch.randn(6, 40)
    y = layer_of(model)(x)
    assert report.served.total() == 1  # what it gives is a plain tensor
    accelerated.restore(model)
    torch.testing.assert_close(layer_of(model)(x), y)

    class Other(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = one_layer()
    layer_of(model).base_layer.__class__ = Other
    passes_on(model, "the base layer is Other")
    model = one_layer()
    layer_of(model).lora_A["default"].__class__ = Other
    passes_on(model, "lora_A is Other")


def test_a_scaling_that_learns():
    model = one_layer()
    layer_of(model).scaling["default"] = torch.nn.Parameter(torch.tensor(0.5))
    passes_on(model, "a scaling that learns, or that is not one number")


def test_autocast_of_float64():
    model = one_layer(dtype=F64, adapter_dtype=F64)
    passes_on(model, "autocast of float64", torch.randn(6, 40, dtype=F64), lambda: torch.autocast("cpu", BF16))


def test_transforms_and_forward_mode():
    model, x = one_layer(), torch.randn(6, 40)
    layer = layer_of(model)
    expected = torch.func.jvp(layer, (x,), (x,)), torch.func.vmap(layer)(x), torch.func.jacrev(layer)(x)
    report = accelerated.accelerate(model)
    found = torch.func.jvp(layer, (x,), (x,)), torch.func.vmap(layer)(x), torch.func.jacrev(layer)(x)
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, x))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, expected[0][1])
    assert report.passed_on == {"a transform of torch.func, or forward-mode derivatives": 4}
    assert report.served.total() == 0


def test_other_devices():
    model = one_layer().to("meta")
    report = accelerated.accelerate(model)
    assert layer_of(model)(torch.randn(6, 40, device="meta")).shape == (6, 24)
    assert report.passed_on == {"no kernel for tensors on meta": 1}


# ---- errors are PEFT's ----


@pytest.mark.parametrize(
    ("change", "x", "args", "kwargs"),
    [
        (None, torch.randn(6, 40), (), {"adapter_names": ["one"] * 5}),
        (lambda layer: layer.merge(), torch.randn(6, 40), (), {"adapter_names": ["one"] * 6}),
        ({"use_dora": True}, torch.randn(6, 40), (), {"adapter_names": ["one"] * 6}),
        (None, torch.randn(6, 39), (), {}),
        (None, torch.tensor(1.0), (), {}),
        (None, torch.randn(6, 40, dtype=F64), (), {}),
        (None, torch.randn(6, 40), (1,), {}),
        (None, torch.randn(6, 40), (), {"scale": 2}),
        (lambda layer: setattr(layer, "cast_input_dtype_enabled", False), torch.randn(6, 40).to(BF16), (), {}),
        (lambda layer: layer.lora_B["one"].to(F64), torch.randn(6, 40), (), {}),
    ],
    ids=["names", "merged", "dora", "shape", "scalar", "dtype", "argument", "keyword", "no cast", "dtypes of A and B"],
)
def test_the_same_error(change, x, args, kwargs):
    options = change if isinstance(change, dict) else {}
    model = one_layer("one", dtype=BF16 if x.dtype == BF16 else F32, **options)
    if callable(change):
        change(layer_of(model))
    errors = []
    for act in (lambda model: None, accelerated.accelerate):
        act(model)
        with pytest.raises((ValueError, RuntimeError, TypeError), match=r".") as caught:
            layer_of(model)(x, *args, **kwargs)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


def test_nothing_of_peft_or_pytorch_is_replaced():
    from peft.tuners.lora import layer as source

    before = dict(vars(source.Linear)), dict(vars(source.LoraLayer)), dict(vars(nn.Linear)), nn.functional.linear
    with accelerated.accelerate(one_layer()):
        after = dict(vars(source.Linear)), dict(vars(source.LoraLayer)), dict(vars(nn.Linear)), nn.functional.linear
    assert before == after


def test_without_peft():
    absent = dict.fromkeys(("peft", "peft.tuners", "peft.tuners.tuners_utils"))
    with mock.patch.dict("sys.modules", absent), pytest.raises(ImportError, match="peft"):
        accelerated.accelerate(nn.Linear(2, 2))
