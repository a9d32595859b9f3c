"""The modules around lora_linear: what learns, what is shared, and who gets which adapter."""

from __future__ import annotations

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
