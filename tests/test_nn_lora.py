"""The modules around lora_linear: what learns, what is shared, and who gets which adapter."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import genai_kernels as gk
from genai_kernels.nn import LoRALinear, MultiLoRALinear


def test_an_adapter_adds_nothing_at_first_and_learns_alone():
    torch.manual_seed(0)
    base = torch.nn.Linear(20, 12)
    layer, x = LoRALinear.from_linear(base, r=4, lora_alpha=8), torch.randn(9, 20)
    assert layer.weight is base.weight
    assert torch.equal(layer(x), gk.linear(x, base.weight, base.bias))
    target, before = torch.randn(9, 12), base.weight.clone()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(base.weight, before)
    assert base.weight.grad is None


def test_scalings():
    assert LoRALinear(4, 4, r=4, lora_alpha=8).scaling == 2
    assert LoRALinear(4, 4, r=4, lora_alpha=8, use_rslora=True).scaling == 4
    with pytest.raises(ValueError, match="r: expected at least 1, got 0"):
        LoRALinear(4, 4, r=0)


def test_dropout_is_of_training_alone():
    layer, x = LoRALinear(64, 16, r=4, lora_dropout=0.5), torch.randn(8, 64)
    torch.nn.init.normal_(layer.lora_B)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 5)])
def test_names_are_ids(shape):
    layer = MultiLoRALinear.from_linear(torch.nn.Linear(20, 12))
    for i, name in enumerate(("a", "b")):
        layer.add_adapter(name, torch.randn(3 + i, 20), torch.randn(12, 3 + i), lora_alpha=6)
    x, names = torch.randn(*shape, 20), ["a", "__base__", "b", "a", "b", "__base__"]
    y = layer(x, names)
    assert torch.equal(layer(x), gk.linear(x, layer.weight, layer.bias))
    for i, name in enumerate(names):
        assert torch.equal(layer(x[i : i + 1], [name]), y[i : i + 1])
    layer.remove_adapter("a")
    assert layer.names == ["b"]
    assert torch.equal(layer(x[2:3], ["b"]), y[2:3])
    with pytest.raises(KeyError):
        layer(x, ["a"] * 6)
    with pytest.raises(ValueError, match="expected 6 names, got 2"):
        layer(x, ["b", "b"])
    with pytest.raises(ValueError, match="name: expected a new one, got 'b'"):
        layer.add_adapter("b", torch.randn(3, 20), torch.randn(12, 3))
    with pytest.raises(ValueError, match=r"c: expected lora_a \[r, 20\] and lora_b \[12, r\], got \[3, 21\]"):
        layer.add_adapter("c", torch.randn(3, 21), torch.randn(12, 3))


def test_both_modules_say_the_same():
    one = LoRALinear(20, 12, r=4)
    torch.nn.init.normal_(one.lora_B)
    many = MultiLoRALinear.from_linear(one)
    many.add_adapter("one", one.lora_A.detach(), one.lora_B.detach(), one.lora_alpha)
    x = torch.randn(5, 20)
    assert torch.equal(many(x, ["one"] * 5), one(x))
    again = MultiLoRALinear(20, 12)
    again.add_adapter("one", torch.zeros(4, 20), torch.zeros(12, 4), one.lora_alpha)
    again.load_state_dict(many.state_dict())
    assert torch.equal(again(x, ["one"] * 5), one(x))


def random_adapter(layer):
    torch.nn.init.normal_(layer.lora_B, std=0.3)
    if layer.use_dora:
        layer.lora_magnitude_vector.data += 0.1 * torch.randn(layer.out_features)
    return layer


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "nf4"])
def test_dora_adds_nothing_at_first_and_learns(quantize):
    torch.manual_seed(0)
    base, x = torch.nn.Linear(64, 12), torch.randn(9, 64)
    layer = LoRALinear.from_linear(base, r=4, use_dora=True, quantize=quantize)
    weight = base.weight if quantize is None else layer.base.dense()
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, base.bias))
    named = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert named == {"lora_A", "lora_B", "lora_magnitude_vector"}
    random_adapter(layer)
    layer(x).square().mean().backward()
    assert all(layer.get_parameter(name).grad.abs().max() > 0 for name in named)


def test_the_norm_follows_what_it_is_of():
    layer, x = random_adapter(LoRALinear(20, 12, r=4, use_dora=True)), torch.randn(9, 20)

    def fresh():
        return gk.dora_linear(x, layer.weight, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, layer.scaling,
                              layer.bias)  # fmt: skip

    layer.eval()
    first = layer(x)
    assert torch.equal(first, fresh())
    assert layer._norm(layer.base, layer.lora_A, layer.lora_B, layer.scaling) is layer._norm._norm

    def flip():
        with torch.no_grad():
            layer.weight.neg_()

    for change in (lambda: layer.lora_A.data.mul_(2), lambda: layer.lora_B.data.add_(1), flip,
                   lambda: setattr(layer, "lora_alpha", 3.0)):  # fmt: skip
        before = layer(x)
        change()
        assert not torch.equal(layer(x), before)
        assert torch.equal(layer(x), fresh())
    with torch.inference_mode():
        assert torch.equal(layer(x), fresh())


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unmerge(use_dora, dtype):
    torch.manual_seed(0)
    base = torch.nn.Linear(40, 30, dtype=dtype)
    layer = random_adapter(LoRALinear.from_linear(base, r=4, lora_alpha=8, use_dora=use_dora)).eval()
    x, original = torch.randn(50, 40).to(dtype), base.weight.clone()
    unmerged = layer(x)
    bound = layer.merge()
    assert layer.merged
    assert not torch.equal(base.weight, original)
    u = 2.0**-24 if dtype == torch.float32 else 2.0**-8
    size = unmerged.abs() + torch.nn.functional.linear(x.abs(), base.weight.abs()) * 8 * 2.0**-24 / u
    allowed = bound * torch.linalg.vector_norm(x.float(), dim=1, keepdim=True) + 2 * u * size
    assert bool(((layer(x).float() - unmerged.float()).abs() <= allowed).all())
    with pytest.raises(RuntimeError, match="expected a layer that is not merged"):
        layer.merge()
    layer.unmerge()
    assert torch.equal(base.weight, original)
    assert torch.equal(layer(x), unmerged)
    with pytest.raises(RuntimeError, match="expected a layer that is merged"):
        layer.unmerge()


@pytest.mark.parametrize("quantize", ["int8", "int4", "nf4"])
def test_a_quantized_layer(quantize):
    torch.manual_seed(0)
    base, x = torch.nn.Linear(100, 30), torch.randn(5, 100)
    layer = random_adapter(LoRALinear.from_linear(base, r=4, quantize=quantize))
    assert layer.weight is None
    assert repr(layer).count(f"quantize={quantize}") == 1
    assert layer.base.nbytes < base.weight.nbytes / (3 if quantize == "int8" else 4)
    y = layer(x)
    assert torch.equal(y, gk.lora_linear(x, layer.base, layer.lora_A, layer.lora_B, layer.scaling, layer.bias))
    again = LoRALinear(100, 30, r=4, quantize=quantize)
    again.load_state_dict(layer.state_dict())
    for other in (again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
    data = [t.clone() for t in layer.base.tensors().values()]
    half = copy.deepcopy(layer).to(torch.bfloat16)  # the adapter and the bias; few bits stay what they are
    assert half.lora_A.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(half.base.tensors().values(), data, strict=True))
    assert half(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(NotImplementedError, match=f"expected a weight of floating point, got {quantize}"):
        layer.merge()
    many = MultiLoRALinear.from_linear(base, quantize=quantize)
    many.add_adapter("one", again.lora_A.detach(), again.lora_B.detach(), again.lora_alpha)
    assert torch.equal(many(x, ["one"] * 5), y)
    with pytest.raises(ValueError, match=r"quantize: expected one of \['int4', 'int8', 'nf4'\], got 'int3'"):
        LoRALinear(8, 8, quantize="int3")
