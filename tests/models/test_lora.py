"""Adapting the small Llama: what each method adds, what learns, the eager twins, and runs that are interrupted."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from tokenizers import Tokenizer

from genai_kernels.nn import load_adapter, save_adapter
from python_models import llama_files, lora, lora_compare, lora_data, lora_memory, lora_report
from python_models.char_lm_train import Recipe, agreement
from python_models.llama_train import CHECKPOINT
from python_models.lora_data import Register
from python_models.lora_methods import METHODS, Sizes, adapt
from python_models.lora_train import Passages, held_out_bits, new_run, twin

WIDTH, KV, HIDDEN, LAYERS = 192, 128, 512, 4
PRODUCTS = [(WIDTH, WIDTH + KV), (WIDTH, WIDTH), (WIDTH, 2 * HIDDEN), (HIDDEN, WIDTH)]  # in, out of each in a layer
LEARNS = {
    "lora": LAYERS * sum(8 * (i + o) for i, o in PRODUCTS),
    "dora": LAYERS * sum(8 * (i + o) + o for i, o in PRODUCTS),
    "qlora": LAYERS * sum(8 * (i + o) for i, o in PRODUCTS),
    "bottleneck": LAYERS * 2 * (2 * WIDTH * 24 + 24 + WIDTH),
    "bitfit": LAYERS * sum(o for _, o in PRODUCTS),
    "prompt": 16 * WIDTH,
    "full": 2048 * WIDTH + WIDTH + LAYERS * (2 * WIDTH + sum(i * o for i, o in PRODUCTS)),
}
SHORT = {"length": 32}


@pytest.fixture(scope="module")
def text():
    words = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    return torch.tensor(words.encode("#ifndef Py_CODE_H\n#define Py_CODE_H\nextern int f(void);\n" * 40).ids)


def make_run(method, text, steps=8, **options):
    rate = {"prompt": 0.1, "full": 1e-3}.get(method, 1e-2)
    return new_run(method, Recipe(steps, batch=2, peak_rate=rate, warmup=2, seed=3), text, **SHORT, **options)


def model():
    return llama_files.load(CHECKPOINT, dtype=torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_adds_what_it_says_and_only_that_learns(method, text):
    base, tokens = model(), text[None, :40]
    before = {name: p.clone() for name, p in base.named_parameters()}
    adapted = adapt(model(), method)
    assert adapted.parameters == LEARNS[method]
    adapted.model.eval()
    same = torch.equal(adapted(tokens), base(tokens))
    assert same == (method not in ("prompt", "qlora"))  # every other begins as the model that it adapts
    run = make_run(method, text)
    run.step()
    for p in run.adapted.model.parameters():
        assert p.grad is None
    run.adapted.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    learns = set(run.named)
    assert {name for name, p in run.adapted.model.named_parameters() if p.grad is not None} == learns
    kept = {name.replace("embedding.words", "embedding"): p for name, p in run.adapted.model.named_parameters()}
    for name, p in before.items():
        moved = name in learns and method != "bitfit"
        found = kept.get(name, kept.get(name.replace(".weight", ".0.weight")))  # behind a bottleneck
        if found is None:
            assert method == "qlora"  # in four bits now
            continue
        assert torch.equal(found, p) != moved, name


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_and_is_that_of_the_eager_twin(method, text):
    run = make_run(method, text, 12)
    eager, exact = twin(run), twin(run, exact=True)
    for one in (run, eager, exact):
        one.train()
    assert run.losses[-1] < run.losses[0] - (0.05 if method == "prompt" else 0.5)
    rule = agreement(run.losses, eager.losses, exact.losses)
    assert rule.ok, rule
    wrong = [x * (1 + 1e-4) for x in run.losses]
    assert not agreement(wrong, eager.losses, exact.losses).ok


@pytest.mark.parametrize("method", METHODS)
def test_resumed_is_uninterrupted(method, text, tmp_path):
    whole = make_run(method, text)
    whole.train()
    first = make_run(method, text)
    for at in (0, 3, 5):  # interrupted before the first step too
        while len(first.losses) < at:
            first.step()
        first.save(tmp_path / "run")
        torch.rand(7)  # somebody else's use of torch's generator
        first = make_run(method, text)
        first.resume(tmp_path / "run")
    first.train()
    assert first.losses == whole.losses
    assert list(first.named) == list(whole.named)
    for name, p in whole.named.items():
        assert torch.equal(first.named[name], p), name
        for key, value in whole.optimizer.state[p].items():
            assert torch.equal(first.optimizer.state[first.named[name]][key], value), key
    assert torch.equal(first.random, whole.random)
    assert not list(tmp_path.glob("*.part"))


def test_what_does_not_resume(text, tmp_path):
    run = make_run("lora", text)
    run.step()
    run.save(tmp_path / "run")
    others = {
        "method": make_run("bitfit", text), "recipe": make_run("lora", text, 9), "tokens": make_run("lora", text[:90]),
        "sizes": make_run("lora", text, sizes=Sizes(rank=4)),
    }  # fmt: skip
    for key, other in others.items():
        before = {name: p.clone() for name, p in other.named.items()}
        with pytest.raises(ValueError, match=f"Run.resume: {key}: expected"):
            other.resume(tmp_path / "run")
        assert other.losses == []
        assert all(torch.equal(p, before[name]) for name, p in other.named.items())
    with pytest.raises(FileNotFoundError):
        run.resume(tmp_path / "none")


def test_the_seed_decides(text):
    one, other = make_run("lora", text), make_run("lora", text)
    other.recipe = Recipe(8, batch=2, peak_rate=1e-2, warmup=2, seed=4)
    again = new_run("lora", other.recipe, text, **SHORT)
    for run in (one, other, again):
        run.step()
    assert one.losses == other.losses != again.losses  # what a run draws, it draws when it is made


def test_there_and_back_in_files(text, tmp_path):
    run = make_run("lora", text)
    run.train()
    save_adapter(run.adapted.model, tmp_path)
    again = model()
    assert len(load_adapter(again, tmp_path)) == 4 * LAYERS
    assert torch.equal(again.eval()(text[None, :50]), run.adapted.model.eval()(text[None, :50]))


def test_virtual_tokens_stand_before_the_text(text):
    adapted = adapt(model(), "prompt", Sizes(virtual_tokens=5))
    assert adapted.config.context == 512 - 5
    tokens = text[None, :20]
    assert adapted(tokens).shape == (1, 20, 2048)
    drawn = torch.tensor([11, 12, 13, 14, 15])
    with torch.no_grad():  # as if they were words
        adapted.model.embedding.prompt.copy_(adapted.model.embedding.weight[drawn])
    as_words = model()(torch.cat([drawn, text[:20]])[None])[:, 5:]
    assert torch.equal(adapted(tokens), as_words)
    loss = torch.nn.functional.cross_entropy(as_words[0, :-1], text[1:20])
    assert adapted.loss(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(loss.item(), rel=1e-6)


# ---- the text ----


@pytest.mark.parametrize("name", lora_data.SOURCES)
def test_the_registers_of_this_machine(name):
    words = lora_compare.tokenizer()
    register, again = Register.load(name, words), Register.load(name, words)
    assert torch.equal(register.train, again.train)
    assert register.about == again.about
    files = [text for _, text in lora_data.SOURCES[name][0]()]
    held_out = words.decode(register.held_out.tolist(), skip_special_tokens=False).split("<|endoftext|>")[1:-1]
    train = words.decode(register.train.tolist(), skip_special_tokens=False)
    assert len(held_out) >= 4
    assert sum(map(len, held_out)) + len(held_out) == register.characters
    assert register.beginning(10**9, words).characters == register.characters
    few = register.beginning(3, words)
    assert words.decode(few.held_out.tolist()) == held_out[0][: few.characters]
    for text in held_out:
        assert text in files
        assert text not in train
    assert len(register.train) > 50_000


def test_the_split_and_its_refusals(tmp_path, monkeypatch):
    files = [(f"{i}.h", f"int f{i}(void);\n" * 9) for i in range(60)]
    words = lora_compare.tokenizer()
    register = Register.of("x", [*files, ("copy.h", files[0][1])], words, 20)
    assert len(words.decode(register.train.tolist()).split("int f0(void)")) <= 10  # a duplicate counts once
    for name, text in files:
        (tmp_path / name).write_text(text)
    assert sorted(lora_data.header_files(tmp_path)) == sorted(files)
    with pytest.raises(FileNotFoundError, match=r"expected C headers below .*none: install Python's development files"):
        lora_data.header_files(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match="expected the manual that help"):
        lora_data.manual_topics()
    with pytest.raises(ValueError, match="register: expected one of headers, manual, got 'poems'"):
        Register.load("poems", words)
    with pytest.raises(ValueError, match="Passages: text: expected more than 32 tokens, got 5"):
        Passages(torch.zeros(5), 1, 32, 0)
    with pytest.raises(ValueError, match="adapt: method: expected one of lora"):
        adapt(model(), "magic")


# ---- what is reported ----


def test_the_comparison_and_its_report(text, tmp_path, monkeypatch, capsys):
    """On little text: every figure is there, and the command says it."""
    monkeypatch.setattr(Register, "load", lambda name, words: Register(name, text, text[:40], 100, f"{name}: little"))
    monkeypatch.setattr(lora_memory, "peak", lambda method, how: 10**6 * len(method))
    methods = ["lora", "full"]
    out = tmp_path / "found.json"
    options = ["--steps", "2", "--seeds", "2", "--twin-steps", "3", "--output", str(out), "--methods", *methods]
    assert lora.main(options) == 0
    said = capsys.readouterr().out
    assert "90,112" in said
    assert "agree, by the rule" in said
    assert {p.name for p in tmp_path.iterdir()} == {"found.json", "found_memory.png", "found_loss_headers.png",
                                                    "found_loss_manual.png"}  # fmt: skip
    found = lora_compare.compare(methods, ["headers"], steps=2, seeds=2, twin_steps=3, held_out=30)
    assert found["methods"]["lora"]["agrees"]
    assert len(set(found["methods"]["lora"]["bits"]["headers"])) == 2
    found["methods"]["full"]["agrees"], found["methods"]["full"]["seconds"] = False, None
    assert lora_report.method_table(found)[1][-1][3] == "disagrees"


def test_train_is_resumed_by_its_command(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Register, "load", lambda name, words: Register(name, text.repeat(3), text[:40], 100, "little"))
    command = ["train", "headers", "--steps", "4", "--every", "2"]
    assert lora.main([*command, "--out", str(tmp_path / "whole")]) == 0
    checkpoint = ["--checkpoint", str(tmp_path / "run")]
    monkeypatch.setattr(lora, "save_adapter", lambda *args: 1 / 0)  # the machine goes down
    with pytest.raises(ZeroDivisionError):
        lora.main([*command, *checkpoint, "--out", str(tmp_path / "again")])
    monkeypatch.setattr(lora, "save_adapter", save_adapter)
    assert lora.main([*command, *checkpoint, "--out", str(tmp_path / "again")]) == 0
    assert "taken up at step 4" in capsys.readouterr().out
    name = "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert lora.main([*command, "--method", "bitfit", "--out", str(tmp_path)]) == 2


def test_memory_of_a_training_step():
    """The model has 8 MB, its gradients and moments 24 more; what 32 tokens need is little."""
    found = {method: lora_memory.peak(method, "auto", batch=1, length=32, threads=1) for method in ("lora", "full")}
    assert found["lora"] < 20e6
    assert found["lora"] < 0.5 * found["full"]
    # and 512 tokens, of which plain PyTorch keeps what its backward reads, the logits twice
    ours, eager = (lora_memory.peak("lora", how) for how in ("auto", "reference"))
    assert ours < 60e6
    assert ours < 0.5 * eager


def test_copies_are_separate(text):
    """A twin shares no weight with its run."""
    run = make_run("lora", text)
    other = copy.deepcopy(run.adapted)
    run.step()
    pairs = zip(run.named.values(), other.trainable().values(), strict=True)
    assert not any(torch.equal(p, q) for p, q in pairs if p.dim() == 2 and len(p) > 8)  # lora_B; ours has moved


def test_held_out_bits_have_no_dropout(text):
    run = make_run("lora", text, sizes=Sizes(dropout=0.5))
    run.train()
    register = Register("x", text, text[:200], 300, "")
    assert held_out_bits(run.adapted, register) == held_out_bits(run.adapted, register)
    assert run.adapted.model.training
