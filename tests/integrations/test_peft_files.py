"""Adapters in PEFT's files: what PEFT writes is read, and what is written PEFT reads, with the same outputs."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from genai_kernels.accuracy import compare
from genai_kernels.nn import LoRALinear, MultiLoRALinear, add_lora, load_adapter, save_adapter


@pytest.fixture(scope="module")
def peft():
    import peft  # seconds

    return peft


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(20, 30)
        self.rest = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(30, 12, bias=False))

    def forward(self, x):
        return self.rest(self.first(x))


def random_adapters(model):
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, mean=1.0 if "magnitude" in name else 0.0, std=0.3)


def agree(ours, theirs, model, x):
    """By the rule: PEFT is the eager twin, PEFT in float64 what is right."""
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(x.double())
        assert compare("output", ours(x), theirs(x), exact, 1.0, 1.0).ok
        assert not torch.equal(ours(x), model(x))


CONFIGS = [
    {"r": 4, "lora_alpha": 8},
    {"r": 8, "lora_alpha": 3, "use_rslora": True},
    {"r": 6, "lora_alpha": 9, "use_dora": True},
    {"r": 4, "lora_alpha": 8, "rank_pattern": {"first": 6}, "alpha_pattern": {"rest.1": 5}},
]


@pytest.mark.parametrize("options", CONFIGS)
def test_what_peft_writes_is_read(peft, tmp_path, options):
    model, x = Net(), torch.randn(40, 20)
    config = peft.LoraConfig(target_modules=["first", "rest.1"], **options)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    random_adapters(theirs)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(model)
    assert sorted(load_adapter(ours, tmp_path)) == ["first", "rest.1"]
    agree(ours, theirs, model, x)
    many = copy.deepcopy(model)
    many.first = MultiLoRALinear.from_linear(model.first)
    if options.get("use_dora"):
        with pytest.raises(NotImplementedError, match="use_dora: expected False for first"):
            load_adapter(many, tmp_path, "one")
        return
    load_adapter(many, tmp_path, "one")
    assert torch.equal(many.first(x, ["one"] * 40), ours.first(x))


@pytest.mark.parametrize("options", CONFIGS[:3])
def test_what_is_written_peft_reads(peft, tmp_path, options):
    model, x = Net(), torch.randn(40, 20)
    ours = copy.deepcopy(model)
    assert add_lora(ours, ["first", "1"], **options) == ["first", "rest.1"]
    random_adapters(ours)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    agree(ours, theirs, model, x)


def test_there_and_back(tmp_path):
    model = Net()
    ours = copy.deepcopy(model)
    add_lora(ours, ["first"], r=3, lora_alpha=7, lora_dropout=0.25)
    add_lora_to_rest = LoRALinear.from_linear(ours.rest[1], r=5, lora_alpha=2, lora_dropout=0.25)
    ours.rest[1] = add_lora_to_rest
    random_adapters(ours)
    save_adapter(ours, tmp_path)
    again = copy.deepcopy(model)
    load_adapter(again, tmp_path)
    x = torch.randn(6, 20)
    assert torch.equal(again.eval()(x), ours.eval()(x))
    for layer, like in ((again.first, ours.first), (again.rest[1], ours.rest[1])):
        assert (layer.r, layer.scaling, layer.lora_dropout) == (like.r, like.scaling, like.lora_dropout)


def test_what_cannot_be_read_is_refused(tmp_path):
    ours = Net()
    with pytest.raises(ValueError, match="expected a LoRALinear in it, got none"):
        save_adapter(ours, tmp_path)
    with pytest.raises(ValueError, match="expected the name of a linear layer, got 'second'"):
        add_lora(ours, ["second"])
    add_lora(ours, ["first"], r=3)
    save_adapter(ours, tmp_path)
    config_file, weights_file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, weights = json.loads(config_file.read_text()), load_file(weights_file)
    for key, value in (("bias", "all"), ("lora_bias", True), ("modules_to_save", ["head"])):
        config_file.write_text(json.dumps({**config, key: value}))
        with pytest.raises(NotImplementedError, match=f"load_adapter: {key}: expected"):
            load_adapter(Net(), tmp_path)
    config_file.write_text(json.dumps(config))
    a, b = (f"base_model.model.first.lora_{k}.weight" for k in "AB")
    for wrong, text in (
        ({a: weights[a]}, "expected lora_A and lora_B, got lora_A"),
        (
            {a: weights[a], b: weights[b][:5].clone()},
            r"of shapes \[\[3, 20\], \[30, 3\]\], r of any size, got \[\[3, 20\], \[5, 3\]\]",
        ),
        ({a.replace("first", "second"): weights[a]}, "second: expected a linear layer of the model, got NoneType"),
        ({"weight": weights[a]}, "expected names of lora_A and lora_B, got weight"),
    ):
        save_file(wrong, weights_file)
        model = Net()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=text):
            load_adapter(model, tmp_path)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
