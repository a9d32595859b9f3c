"""PEFT's LoRA layers on these kernels: PEFT's results and gradients by the rule, and its dropout by the odds."""

import contextlib
import copy
import math
from unittest import mock

import pytest
import torch
from peft_models import BF16, F16, F32, F64, layer_of, learnt, one_layer, peft
from torch import nn

import genai_kernels as gk
from genai_kernels.accuracy import compare
from genai_kernels.integrations import peft as accelerated
from genai_kernels.registry import OPS


def run(model, x, cotangent, **kwargs):
    """The layer's output, and the gradients of x and of what learns."""
    inputs = [x.detach().clone().requires_grad_(), *learnt(model)]
    y = layer_of(model)(inputs[0], **kwargs)
    gradients = torch.autograd.grad(y, inputs, cotangent.to(y.dtype), allow_unused=True)
    return [y.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(inputs, gradients, strict=True))]


def check(model, *shape, dtype=F32, around=contextlib.nullcontext, served=1, draws=None, seeds=False, **kwargs):
    """Ours, PEFT and PEFT in float64, by the rule; the factors are those of the op. Returns the report."""
    draws = draws or max(8, 128 // max(1, math.prod(shape)))  # few tokens have few errors, and decide by luck
    ours, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    report = accelerated.accelerate(ours)
    runs = []
    for _ in range(draws):
        x, cotangent = torch.randn(*shape, 40).to(dtype), torch.randn(*shape, 24).to(BF16)
        ways = []
        for m in (ours, model, exact):
            if seeds:
                torch.manual_seed(len(runs))
            with around() if m is not exact else contextlib.nullcontext():
                ways.append(run(m, x.double() if m is exact else x, cotangent, **kwargs))
        runs.append(ways)
    accuracy = OPS["lora_linear"].accuracy
    for i in range(len(runs[0][0])):
        assert len({tuple(way[i].shape) for way in runs[0]}) == 1
        ways = [torch.cat([r[way][i].flatten() for r in runs]) for way in range(3)]
        if dtype == F64:  # what would be exact?
            torch.testing.assert_close(ways[0], ways[1])
            continue
        verdict = compare(f"result {i}", *ways, *(accuracy.backward if i else accuracy.forward), draws=draws)
        assert verdict.ok, verdict
    assert (report.served.total(), report.passed_on.total()) == (served * draws, 0), report
    return report


# ---- results and gradients, by the rule ----

DTYPES = [(F32, F32), (F64, F64), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)]


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("names", [["one"], ["one", "two", "three"]], ids=len)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_adapters_of_every_dtype(dtype, adapter_dtype, names, lora_bias):
    model = one_layer(*names, dtype=dtype, adapter_dtype=adapter_dtype, lora_bias=lora_bias)
    report = check(model, 3, 7, dtype=dtype)
    what = "one adapter" if len(names) == 1 else "3 adapters on every row"
    assert list(report.served) == [f"{str(dtype).removeprefix('torch.')}, {what}"]


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_adapters_by_row(dtype, adapter_dtype, lora_bias):
    model = one_layer("one", "two", "three", dtype=dtype, adapter_dtype=adapter_dtype, lora_bias=lora_bias).eval()
    names = ["two", "__base__", "one", "two", "absent", "three"]
    report = check(model, 6, 5, dtype=dtype, adapter_names=names)
    assert list(report.served) == [f"{str(dtype).removeprefix('torch.')}, adapters by row"]
    check(model, 6, dtype=dtype, adapter_names=names)
    check(model, 6, 2, 3, dtype=dtype, adapter_names=names)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"bias": False},
        {"conv1d": True},
        {"conv1d": True, "dtype": BF16},
        {"init_lora_weights": "pissa"},
        {"r": 40},
        {"r": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(9,), (), (2, 3, 4)], ids=str)
def test_options_and_shapes(options, shape):
    draws = 8 if shape else 64  # of one row there are few numbers
    check(one_layer(**options), *shape, dtype=options.get("dtype", F32), draws=draws)


def test_a_base_that_learns_too():
    model = one_layer(dtype=BF16)
    layer_of(model).base_layer.requires_grad_(True)
    check(model, 30, dtype=BF16)


def test_a_scaling_that_is_a_tensor():
    model = one_layer()
    layer_of(model).scaling["default"] = torch.tensor(0.37)
    check(model, 30)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(F32, F32), (BF16, F32)], ids=str)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_autocast(dtype, adapter_dtype, lora_bias):
    model = one_layer("one", "two", dtype=dtype, adapter_dtype=adapter_dtype, lora_bias=lora_bias)
    for names in ("one", ["one", "two"]):
        model.base_model.set_adapter(names)
        report = check(model, 50, dtype=F32, around=lambda: torch.autocast("cpu", BF16))
        assert all(what.startswith("bfloat16") for what in report.served)


def test_the_base_gets_no_gradient_and_stays():
    model = one_layer()
    before = copy.deepcopy(model.state_dict())
    accelerated.accelerate(model)
    layer_of(model)(torch.randn(5, 40)).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"base_model.model.layer.lora_{k}.default.weight" for k in "AB"
    }
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_rows_of_the_base_have_the_bits_of_linear():
    model, x = one_layer("one", "two").eval(), torch.randn(3, 5, 40)
    accelerated.accelerate(model)
    y = layer_of(model)(x, adapter_names=["one", "__base__", "two"])
    base = layer_of(model).base_layer
    assert torch.equal(y[1], gk.linear(x[1], base.weight, base.bias))
    model.base_model.set_adapter("two")
    assert torch.equal(y[2], layer_of(model)(x[2]))


# ---- DoRA ----


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"conv1d": True}, {"bias": False, "use_rslora": True}], ids=str)
def test_dora(dtype, adapter_dtype, options):
    model = one_layer(dtype=dtype, adapter_dtype=adapter_dtype, use_dora=True, **options)
    with torch.no_grad():
        layer_of(model).lora_magnitude_vector["default"].weight.mul_(torch.rand(24).to(dtype) + 0.5)
    report = check(model, 3, 7, dtype=dtype)
    assert list(report.served) == [f"{str(dtype).removeprefix('torch.')}, DoRA"]


def test_dora_with_dropout_in_eval_mode():
    check(one_layer(use_dora=True, lora_dropout=0.5).eval(), 30)
    model = one_layer(use_dora=True, lora_dropout=0.5).eval()
    layer_of(model).lora_dropout.train()  # PEFT asks the layer
    check(model, 30)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dora_with_dropout_drops_what_peft_drops(dtype, adapter_dtype, p):
    """It is torch's dropout, so that the same seed gives the same mask, in every dtype."""
    model = one_layer(dtype=dtype, adapter_dtype=adapter_dtype, use_dora=True, lora_dropout=p)
    with torch.no_grad():
        layer_of(model).lora_magnitude_vector["default"].weight.mul_(torch.rand(24).to(dtype) + 0.5)
    report = check(model, 3, 7, dtype=dtype, seeds=True)
    assert list(report.served) == [f"{str(dtype).removeprefix('torch.')}, dropout {p:g}, DoRA"]


def test_the_norm_is_computed_anew_or_kept_where_peft_keeps_its_own():
    from peft.helpers import DoraCaching

    model, x = one_layer(use_dora=True).eval(), torch.randn(5, 40)
    layer = layer_of(model)
    accelerated.accelerate(model)

    def calls(function=lambda: layer(x)):
        with mock.patch("genai_kernels.integrations.peft.forward.dora_norm", wraps=gk.dora_norm) as norm:
            function()
        return norm.call_count

    with torch.no_grad():
        before = layer(x)
        layer.lora_B["default"].weight.data.mul_(2)  # which nothing but the values shows
        changed = layer(x)
        assert not torch.equal(changed, before)
        with DoraCaching(), torch.inference_mode():
            assert (calls(), calls()) == (1, 0)
            assert torch.equal(layer(x), changed)
            layer.lora_B["default"].weight.mul_(0.5)
            assert (calls(), calls()) == (1, 0)
            assert torch.equal(layer(x), before)
            layer.scaling["default"] *= 2
            assert calls() == 1
            layer.scaling["default"] /= 2
    with DoraCaching():
        with torch.inference_mode():
            assert calls() == 1
        assert calls(lambda: layer(x).sum().backward()) == 0  # through the norm kept in inference mode
        cache = layer.lora_magnitude_vector["default"]._dora_cache
        assert list(cache) == ["genai_kernels-norm-default"]
        accelerated.restore(model)
        assert not cache
        accelerated.accelerate(model.train())
        assert calls() == 0
        assert torch.equal(layer(x), before)


# ---- dropout: other bits, the same odds ----


def seeing_the_mask(p=0.25):
    """A model whose output is x W' + dropout(x)."""
    model = peft.get_peft_model(
        nn.ModuleDict({"layer": nn.Linear(64, 64)}),
        peft.LoraConfig(r=64, lora_alpha=64, target_modules=["layer"], lora_dropout=p),
    )
    layer = layer_of(model)
    for part in (layer.lora_A, layer.lora_B):
        nn.init.eye_(part["default"].weight)
    return model.double()


def test_dropout_drops_and_scales_what_goes_to_the_adapter():
    model, x = seeing_the_mask(), torch.randn(200, 64, dtype=F64, requires_grad=True)
    report = accelerated.accelerate(model)
    layer = layer_of(model)

    def dropped():
        y = layer(x)
        return y, y - layer.base_layer(x)

    torch.manual_seed(5)
    y, first = dropped()
    torch.manual_seed(5)
    again, other = dropped()[1], dropped()[1]
    assert torch.equal(first, again)
    kept = first.abs() > 1e-9
    assert not torch.equal(kept, other.abs() > 1e-9)
    torch.testing.assert_close(first, kept * x / 0.75)
    # 12800 draws at 0.75: four standard deviations are 0.0153; each column's 200, each row's 64
    assert abs(kept.double().mean() - 0.75) < 0.0153
    assert (kept.double().mean(0) - 0.75).abs().max() < 5 * (0.1875 / 200) ** 0.5
    assert (kept.double().mean(1) - 0.75).abs().max() < 5 * (0.1875 / 64) ** 0.5
    cotangent = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight], cotangent)
    through = kept / 0.75 * x.detach()
    expected = (cotangent @ layer.base_layer.weight + cotangent * kept / 0.75, cotangent.t() @ through)
    torch.testing.assert_close(found, (*expected, expected[1]))
    assert report.served == {"float64, dropout 0.25, one adapter": 3}
    model.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x)


def test_dropout_of_the_rows_that_have_an_adapter():
    model, x = seeing_the_mask(), torch.randn(200, 3, 64, dtype=F64)
    accelerated.accelerate(model)
    added = layer_of(model)(x, adapter_names=["default", "__base__"] * 100) - layer_of(model).base_layer(x)
    torch.testing.assert_close(added[1::2], torch.zeros_like(x[1::2]))
    kept = added[::2].abs() > 1e-9
    torch.testing.assert_close(added[::2], kept * x[::2] / 0.75)
    assert abs(kept.double().mean() - 0.75) < 4 * (0.1875 / kept.numel()) ** 0.5


def test_the_mean_and_the_variance_over_dropout_are_pefts():
    model, x = one_layer(dtype=F64, adapter_dtype=F64, lora_dropout=0.5), torch.randn(1, 40, dtype=F64)
    many = x.expand(40_000, 40)
    with torch.no_grad():
        theirs = layer_of(model)(many)
        with accelerated.accelerate(model):
            ours = layer_of(model)(many)
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() / spread).max() < 5 * (2 / 40_000) ** 0.5
    assert (ours.std(0) / spread - 1).abs().max() < 5 * (1 / 40_000) ** 0.5
