"""The committed adapters: what they know; served with the base in one batch; and PEFT on the same weights."""

from __future__ import annotations

import json

import pytest
import torch

from genai_kernels.nn import load_adapter
from python_models import llama_files, lora_bench, lora_demo
from python_models.char_lm_train import Recipe, agreement
from python_models.llama_train import CHECKPOINT, bits_per_byte
from python_models.lora_compare import tokenizer
from python_models.lora_data import SOURCES, Register
from python_models.lora_demo import adapter_of
from python_models.lora_peft import WITHOUT_DROPOUT, PeftRun
from python_models.lora_serving import BASE
from python_models.lora_train import new_run, twin

PROMPTS = {"headers": "#ifndef Py_", "manual": "The "}


@pytest.mark.parametrize("name", SOURCES)
def test_knows_its_register_and_not_the_other(name):
    """On the beginning of the text that this Python holds out, whichever Python the adapter was trained on."""
    words = tokenizer()
    scores = {}
    for register in SOURCES:
        part = Register.load(register, words).beginning(2000, words)
        model = llama_files.load(CHECKPOINT, dtype=torch.float32).eval()
        before = bits_per_byte(model, part.held_out, part.characters)
        load_adapter(model, adapter_of(name))
        scores[register] = bits_per_byte(model.eval(), part.held_out, part.characters) / before
    assert scores[name] < 0.9
    assert all(score > scores[name] for register, score in scores.items() if register != name)
    recorded = json.loads((adapter_of(name) / "training.json").read_text())["held_out_bits_per_character"]
    assert recorded["after"] < 0.9 * recorded["before"]
    assert {p.name for p in adapter_of(name).iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "training.json"
    }  # fmt: skip


def test_base_and_both_in_one_batch():
    asked = [(text, name) for text in PROMPTS.values() for name in (BASE, *SOURCES)]
    together, alone, engine = lora_demo.serve(asked, 24)
    assert together == alone
    assert engine.steps <= 25  # one batch indeed
    assert len(set(together)) == len(asked)


def test_the_same_loss_as_peft():
    """Step by step, from the same weights: PEFT on this model in plain PyTorch takes the place of the eager twin."""
    text = Register.load("manual", tokenizer()).train[:3000]
    recipe, short = Recipe(10, batch=2, peak_rate=1e-2, warmup=2), {"length": 32}
    ours = new_run("lora", recipe, text, sizes=WITHOUT_DROPOUT, **short)
    theirs, exact = PeftRun("this model", recipe, text, **short), twin(ours, exact=True)
    assert theirs.parameters == ours.adapted.parameters
    for _ in range(recipe.steps):
        for run in (ours, theirs, exact):
            run.step()
    rule = agreement(ours.losses, theirs.losses, exact.losses)
    assert rule.ok, rule
    assert not agreement([x * (1 + 1e-4) for x in ours.losses], theirs.losses, exact.losses).ok
    hf = PeftRun("transformers", recipe, text, **short)
    assert abs(hf.step() - exact.losses[0]) <= rule.limit[0]  # before the first step, it is the same model
    assert hf.parameters > ours.adapted.parameters


def test_the_ways_to_decode_say_the_same():
    """What is timed against each other; every way raises if its texts are others'."""
    found = lora_bench.decoding([1, 3], requests=6, steps=2)
    assert list(found) == list(lora_bench.WAYS)
    assert all(list(times) == [1, 3] for times in found.values())
    x, weight = torch.randn(9, 12), torch.randn(7, 12)
    adapters = [lora_bench.gk.LoRAAdapter(torch.randn(2, 12), torch.randn(7, 2), 1.5) for _ in range(3)]
    ids = torch.tensor([0, -1, 2, 1, 1, -1, 0, 2, 2], dtype=torch.int32)
    ours = lora_bench.gk.lora_linear_multi(x, weight, adapters, ids)
    for way in lora_bench.WAYS.values():
        torch.testing.assert_close(way(x, weight, adapters, ids), ours)
