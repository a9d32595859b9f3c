"""PEFT's models on these kernels: whatever happens to the adapters, the results are PEFT's, and all is counted."""

import contextlib
import copy
import random

import pytest
import torch
from peft_models import F64, learnt, peft, randomise
from torch import nn

from genai_kernels.integrations import peft as accelerated

# ---- the states of an adapter: whatever is done to both, they agree ----


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 9, bias=False)

    def forward(self, x):
        return self.second(torch.nn.functional.gelu(self.first(x)))


class Twins:
    """Two equal models, one of them accelerated, to which the same things happen."""

    def __init__(self, **options):
        config = peft.LoraConfig(r=3, target_modules=["first", "second"], **options)
        self.theirs = randomise(peft.get_peft_model(Net(), config, "one", autocast_adapter_dtype=False)).double()
        self.ours = copy.deepcopy(self.theirs)
        self.report = accelerated.accelerate(self.ours)

    def do(self, action):
        for model in (self.theirs, self.ours):
            action(model)

    def add(self, name, **options):
        self.do(lambda m: m.add_adapter(name, peft.LoraConfig(**options)))
        self.do(lambda m: randomise(m, seed=len(name)).double())

    def same(self, **kwargs):
        """The same outputs and gradients. Returns PEFT's output."""
        x, results = torch.randn(6, 12, dtype=F64), []
        for model in (self.theirs, self.ours):
            y, parameters = model(x, **kwargs), learnt(model)
            gradients = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True) if y.requires_grad else ()
            results.append((y, {i: g for i, g in enumerate(gradients) if g is not None}))
        torch.testing.assert_close(results[1], results[0])
        return results[0][0]

    def agree(self, served=2, passed_on=0, base_alone=0, **kwargs):
        before = self.report.served.total(), self.report.passed_on.total(), self.report.base_alone.total()
        y = self.same(**kwargs)
        after = self.report.served.total(), self.report.passed_on.total(), self.report.base_alone.total()
        assert tuple(b - a for a, b in zip(before, after, strict=True)) == (served, passed_on, base_alone), self.report
        return y


def test_added_switched_disabled_merged_deleted():
    twins = Twins()
    one = twins.agree()
    twins.add("two", r=5, target_modules=["first", "second"], use_rslora=True)
    twins.agree()
    twins.do(lambda m: m.set_adapter("two"))
    twins.agree()
    twins.do(lambda m: m.base_model.set_adapter(["one", "two"]))
    twins.agree()
    with twins.theirs.disable_adapter(), twins.ours.disable_adapter():
        twins.agree(0, base_alone=2)
    twins.agree()
    twins.do(lambda m: m.merge_adapter())
    twins.agree(0, base_alone=2)
    twins.do(lambda m: m.unmerge_adapter())
    twins.agree()
    twins.do(lambda m: m.merge_adapter())
    with twins.theirs.disable_adapter(), twins.ours.disable_adapter():
        twins.agree(0, base_alone=2)
    twins.agree()
    twins.do(lambda m: m.delete_adapter("one"))
    twins.agree()
    twins.add("last", r=2, target_modules=["first"])
    twins.do(lambda m: m.set_adapter("last"))
    twins.agree(1, base_alone=1)  # the second layer has none of that name
    twins.do(lambda m: m.base_model.model.first.set_scale("last", 2.5))
    assert twins.report.base_alone == {
        "adapters disabled": 4, "adapters merged": 2, "no adapter in this layer is active": 1
    }  # fmt: skip
    assert not torch.allclose(one, twins.agree(1, base_alone=1))
    plain = [m.merge_and_unload() for m in (twins.theirs, twins.ours)]
    assert twins.report.layers == {}
    x = torch.randn(6, 12, dtype=F64)
    torch.testing.assert_close(plain[1](x), plain[0](x))
    assert not any(type(m).__module__.startswith("peft") for m in plain[1].modules())


def test_dora_through_its_states():
    twins = Twins(use_dora=True)
    twins.add("two", r=5, target_modules=["first"])
    twins.agree()
    twins.do(lambda m: m.merge_adapter())
    twins.agree(0, base_alone=2)
    twins.do(lambda m: m.unmerge_adapter())
    twins.agree()
    twins.do(lambda m: m.base_model.set_adapter(["one", "two"]))
    twins.agree(1, passed_on=1)
    twins.do(lambda m: m.set_adapter("two"))
    twins.agree(1, base_alone=1)
    twins.do(lambda m: m.set_adapter("one"))
    x = torch.randn(30, 12, dtype=F64)
    torch.testing.assert_close(train(twins.ours, x), train(twins.theirs, x))
    torch.testing.assert_close(twins.ours.state_dict(), twins.theirs.state_dict())
    twins.do(lambda m: m.eval())
    twins.agree()
    assert set(twins.report.served) == {"float64, DoRA", "float64, one adapter"}
    assert twins.report.passed_on == {"Dora beside other adapters": 1}


def test_mixed_in_one_batch():
    twins = Twins(lora_dropout=0.5)
    twins.add("two", r=7, target_modules=["first"])
    twins.do(lambda m: m.eval())
    twins.agree(adapter_names=["one", "two", "__base__", "one", "__base__", "two"])
    twins.agree(0, base_alone=2, adapter_names=["__base__"] * 6)
    twins.agree()  # no adapter_names are left behind
    assert twins.report.served == {"float64, adapters by row": 2, "float64, one adapter": 2}


@pytest.mark.parametrize("seed", range(4))
def test_a_walk_through_the_states(seed):
    """Thirty changes drawn at random, of which each may follow each: after every one the twins agree."""
    twins, draw, names = Twins(), random.Random(seed), ["one"]
    counts = twins.report
    for step in range(30):
        layer = twins.ours.base_model.model.first
        action = draw.choice(["add", "set", "several", "merge", "disable", "mixed", "delete", "train", "scale"])
        if action in ("add", "delete", "scale", "mixed") and layer.merged:
            action = "merge"
        if action == "add" and len(names) < 5:
            names.append("x" * (step + 2))
            options = {"r": draw.randint(1, 9), "use_rslora": draw.random() < 0.5, "use_dora": draw.random() < 0.3}
            twins.add(names[-1], target_modules=draw.choice([["first"], ["first", "second"]]), **options)
        elif action in ("set", "several"):
            chosen = draw.sample(names, 1 if action == "set" else draw.randint(1, len(names)))
            twins.do(lambda m, chosen=chosen: m.base_model.set_adapter(chosen))
        elif action == "merge":
            twins.do(lambda m, undo=layer.merged: m.unmerge_adapter() if undo else m.merge_adapter())
        elif action == "delete" and len(names) > 1:
            name = names.pop(draw.randrange(len(names)))
            twins.do(lambda m, name=name: m.delete_adapter(name))
            twins.do(lambda m: m.base_model.set_adapter(names[-1]))
        elif action == "train":
            twins.do(lambda m: m.train(not m.training))
        elif action == "scale":
            twins.do(lambda m: m.base_model.model.first.scale_layer(1.25))
        plain = [n for n in names if not layer.use_dora.get(n)]
        mixed = [draw.choice([*plain, "__base__"]) for _ in range(6)] if action == "mixed" else None
        before = counts.served.total() + counts.passed_on.total() + counts.base_alone.total()
        if mixed:
            twins.do(lambda m: m.eval())
        disabled = [m.disable_adapter() for m in (twins.theirs, twins.ours)] if action == "disable" else []
        with contextlib.ExitStack() as stack:
            for each in disabled:
                stack.enter_context(each)
            twins.same(**({"adapter_names": mixed} if mixed else {}))
        assert counts.served.total() + counts.passed_on.total() + counts.base_alone.total() == before + 2
    assert counts.served.total() > 10
    assert set(counts.passed_on) <= {"Dora beside other adapters"}


def test_a_layer_that_a_new_adapter_creates():
    model = randomise(peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["first"]), "one"))
    report = accelerated.accelerate(model)
    model.add_adapter("two", peft.LoraConfig(target_modules=["second"]))
    assert report.layers == {
        "base_model.model.first": "fused",
        "base_model.model.second": "not taken over: call accelerate again",
    }
    with accelerated.accelerate(model) as second:
        assert set(second.layers.values()) == set(report.layers.values()) == {"fused"}
        model.base_model.set_adapter(["one", "two"])
        model(torch.randn(2, 12))
        assert report.served.total() == second.served.total() == 1
    assert list(report.layers.values()) == ["fused", "not taken over: call accelerate again"]


def train(model, x, steps=6, **kwargs):
    optimizer = torch.optim.AdamW(learnt(model), lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x, **kwargs).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_few_steps_of_an_optimiser():
    twins, x = Twins(lora_bias=False), torch.randn(30, 12, dtype=F64)
    theirs, ours = train(twins.theirs, x), train(twins.ours, x)
    assert theirs[-1] < 0.8 * theirs[0]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(twins.ours.state_dict(), twins.theirs.state_dict())
