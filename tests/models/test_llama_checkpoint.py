"""The committed checkpoint: what it weighs, what it knows, and that the field's tools open it too."""

import ast
import json
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from python_models import char_data, llama_files
from python_models.kneser_ney import KneserNey
from python_models.llama import Llama
from python_models.llama_cache import generate
from python_models.llama_data import END, encode, train_tokenizer
from python_models.llama_train import CHECKPOINT, SMALL, Recipe, bits_per_byte, train, write_checkpoint

PROMPTS = [
    "import os\nimport sys\n\n\ndef main():\n",
    "class Error(Exception):\n",
    "    def __init__(self, name, value=None):\n",
    "def read(self, size=-1):\n",
    "try:\n    import threading\nexcept",
    "__all__ = [",
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return llama_files.load(CHECKPOINT)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def written_after(model, tokenizer, prompt, count=96):
    numbers = torch.tensor([[tokenizer.token_to_id(END), *tokenizer.encode(prompt).ids]])
    return tokenizer.decode(generate(model, numbers, count)[0].tolist())


def test_small_and_without_pickle(model):
    names = {p.name for p in CHECKPOINT.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "training.json",
    }  # fmt: skip
    assert sum(p.stat().st_size for p in CHECKPOINT.iterdir()) < 4.5e6
    assert model.config == SMALL
    assert {w.dtype for w in model.parameters()} == {torch.bfloat16}


def test_tokenizer_gives_every_text_back(tokenizer):
    for text in ("", "def f(x):\n\treturn x  # \u00e9\u4e2d\U0001f600\n", "\0\x7f\r\n", Path(__file__).read_text()):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == SMALL.vocabulary
    assert tokenizer.token_to_id(END) == SMALL.bos == SMALL.eos
    ids = encode(tokenizer, ["a", "b"])
    assert [int(i) for i in ids[[0, 2, 4]]] == [SMALL.bos] * 3


def parses(written):
    """True if the written lines, or their first three or more, are Python: statements, at any indentation."""
    lines = written.split("\n")[:-1]  # the last one is cut off anywhere
    for count in range(len(lines), 2, -1):
        for frame in ("{}", "if 1:\n{}", "if 1:\n if 2:\n{}"):
            try:
                tree = ast.parse(frame.format("\n".join(lines[:count])))
            except SyntaxError:
                continue
            return bool(tree.body)  # comments alone are nothing
    return False


def test_writes_python(model, tokenizer):
    """Greedily, after the rest of the prompt's line."""
    ends = [prompt.endswith("\n") for prompt in PROMPTS]

    def lines_of(model):
        texts = [written_after(model, tokenizer, prompt) for prompt in PROMPTS]
        return [t if end else t.partition("\n")[2] for t, end in zip(texts, ends, strict=True)]

    written = lines_of(model)
    assert sum(map(parses, written)) >= 4, written
    torch.manual_seed(0)
    untrained = Llama(SMALL)
    with torch.no_grad():
        for weight in untrained.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    assert sum(map(parses, lines_of(untrained))) == 0


def test_knows_held_out_text_better_than_its_baseline(tokenizer):
    """Modules of this Python that the split holds out, against 5-grams of bytes counted in part of the others."""
    files = list(char_data.stdlib_files(Path(sysconfig.get_path("stdlib"))))
    held_out = [text for name, text in files if char_data.is_validation(name) and 2000 < len(text) < 20000][:4]
    others = [text for name, text in files if not char_data.is_validation(name)][::4]
    size = sum(len(t.encode()) + 1 for t in held_out)
    model = llama_files.load(CHECKPOINT)
    found = bits_per_byte(model, encode(tokenizer, held_out), size)
    to_bytes = lambda texts: torch.tensor(list("\0".join(texts).encode())).numpy()  # noqa: E731
    baseline = KneserNey(to_bytes(others), 256).bits_per_character(to_bytes(held_out))
    assert 0.5 < found < baseline
    recorded = json.loads((CHECKPOINT / "training.json").read_text())["held_out_bits_per_byte"]
    assert recorded["bfloat16, as saved"] < min(score for name, score in recorded.items() if "gram" in name)


def test_opens_in_transformers(model, tokenizer):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype="auto")
    words = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    assert theirs.dtype == torch.bfloat16
    assert words.encode(PROMPTS[0]) == tokenizer.encode(PROMPTS[0]).ids
    assert words.eos_token == END
    text = torch.tensor([words.encode(PROMPTS[0] + PROMPTS[2])])
    with torch.no_grad():
        ours, eager = model(text).float(), theirs(text).logits.float()
        ref = llama_files.load(CHECKPOINT, dtype=torch.float64)(text)
    assert (ours - ref).square().mean() <= (eager - ref).square().mean()


def test_bits_per_byte_scores_each_token_once():
    """By a model to which all tokens are alike: 11 bits for each but the first, however the pieces fall."""

    class Uniform(torch.nn.Module):
        config = SMALL

        def forward(self, tokens):
            return torch.zeros(*tokens.shape, SMALL.vocabulary)

    for length in (2, 300, 513, 514, 769, 1500):
        text = torch.randint(SMALL.vocabulary, (length,))
        assert bits_per_byte(Uniform(), text, length - 1) == pytest.approx(11.0)


def test_training_writes_a_checkpoint(tmp_path):
    texts = ["def f(x):\n    return x + 1\n" * 60]
    tokenizer = train_tokenizer(texts, 300)
    config = SMALL.__class__(300, 2, 32, 4, 2, 48, context=16, tied=True, bos=0, eos=0)
    text = encode(tokenizer, texts * 4)
    model, losses = train(config, Recipe(30, batch=2, peak_rate=5e-3, warmup=3), text)
    again, same = train(config, Recipe(30, batch=2, peak_rate=5e-3, warmup=3), text)
    assert losses == same
    assert losses[-1] < 0.6 * losses[0]
    write_checkpoint(tmp_path, model.to(torch.bfloat16), tokenizer, {"seed": 0})
    assert torch.equal(llama_files.load(tmp_path).embedding.weight, again.to(torch.bfloat16).embedding.weight)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).vocab_size == tokenizer.get_vocab_size()
