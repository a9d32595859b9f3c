"""Adapters in the engine: base and adapters in one batch, and the tokens of each as if it were served alone."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from genai_kernels.nn import LoRALinear, add_lora, load_adapter, save_adapter
from python_models.llama import Llama
from python_models.llama_cache import generate
from python_models.llama_configs import Config
from python_models.lora_serving import BASE, Adapters
from python_models.serving import Engine, Sampling
from python_models.serving_draft import NgramDrafter
from python_models.serving_http import named

CONFIG = Config(vocabulary=97, layers=2, width=48, heads=4, kv_heads=2, hidden=64, context=256, eps=1e-5, tied=True,
                bos=0, eos=0, dtype="float32")  # fmt: skip
# another rank each; the last is of one product alone, as many adapters are
ADAPTERS = {"a": (["qkv", "out", "gate_up", "down"], 4), "b": (["qkv", "out", "gate_up", "down"], 9), "c": (["qkv"], 3)}


def make_model():
    torch.manual_seed(0)
    model = Llama(CONFIG)
    with torch.no_grad():  # every layer begins as identity; these have something to say
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters in PEFT's files, and each in a model of its own."""
    found = {}
    for name, (targets, r) in ADAPTERS.items():
        model, folder = make_model(), tmp_path_factory.mktemp(name)
        add_lora(model, targets, r=r, lora_alpha=2 * r)
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                torch.nn.init.normal_(layer.lora_B, std=0.2)
        save_adapter(model, folder)
        found[name] = folder
    return found


def make_engine(folders, names=("a", "b", "c"), **options):
    model = make_model()
    adapters = Adapters(model)
    for name in names:
        adapters.add(name, folders[name])
    return Engine(model, adapters=adapters, **{"num_blocks": 500, "block_size": 8, **options})


def requests(count=16):
    """Each text is asked of base and adapters in turn, so that prefixes are alike where adapters are not."""
    rnd = random.Random(1)
    common = [rnd.randrange(1, 97) for _ in range(40)]
    ways = [
        Sampling(max_tokens=18, ignore_end=True),
        Sampling(max_tokens=15, temperature=0.9, top_p=0.9, seed=3),
        Sampling(max_tokens=10, beams=3),
    ]
    for i in range(count):
        own = [rnd.randrange(1, 97) for _ in range(rnd.randrange(1, 30))]
        yield common[: (40, 17)[i // 8 % 2]] + own * (i % 3 > 0), ways[i % 3], (BASE, "a", "b", "c")[i % 4]


def answers(engine, given):
    running = [engine.add(prompt, sampling, adapter=adapter) for prompt, sampling, adapter in given]
    engine.run()
    assert engine.blocks.stats()["used"] == 0
    return [r.output for r in running], running


@pytest.fixture(scope="module")
def alone(folders):
    """Each with an engine of its own that knows no adapter but the request's."""
    return [answers(make_engine(folders, {one[2]} - {BASE}), [one])[0][0] for one in requests()]


WAYS = {
    "together": {},
    "small batches": {"max_batch_tokens": 11},
    "recomputed": {"num_blocks": 60},
    "swapped": {"num_blocks": 60, "preemption": "swap", "num_swap_blocks": 60},
    "no prefix cache": {"prefix_cache": False},
    "drafts": {"drafter": NgramDrafter()},
}


@pytest.mark.parametrize("way", WAYS)
def test_one_batch_is_each_alone(folders, alone, way):
    engine = make_engine(folders, **WAYS[way])
    found, running = answers(engine, requests())
    assert found == alone
    if "num_blocks" in WAYS[way]:
        assert sum(r.preemptions for r in running) > 0
    for threads in (1, 2):  # again, with what the first round has left in the prefix cache
        torch.set_num_threads(threads)
        again, running = answers(engine, requests())
        assert again == alone
        if way == "together":
            assert all(r.cached_tokens >= 8 for r in running if len(r.prompt) > 8)


def test_the_adapters_matter_and_are_the_layers_own(folders):
    """Against a model with a LoRALinear in each place, without a cache; and the base against the untouched model."""
    prompt = [5, 17, 40, 3, 9, 22, 8, 61, 2]
    engine = make_engine(folders)
    given = [(prompt, Sampling(max_tokens=12, ignore_end=True), name) for name in (BASE, "a", "b", "c")]
    found, _ = answers(engine, given)
    for answer, (_, _, name) in zip(found, given, strict=True):
        model = make_model()
        if name != BASE:
            load_adapter(model, folders[name])
        expected = generate(model, torch.tensor([prompt]), 12, cached=False)[0].tolist()
        assert answer[: len(expected)] == expected[: len(answer)]
    assert len({tuple(a) for a in found}) == 4


def test_no_prefix_is_shared_between_adapters(folders):
    prompt = list(range(1, 41))
    engine = make_engine(folders)
    for name, cached in ((BASE, 0), ("a", 0), ("b", 0), ("a", 32), (BASE, 32), ("b", 32)):
        request = engine.add(prompt, Sampling(max_tokens=2), adapter=name)
        engine.run()
        assert request.cached_tokens == cached, name


def test_added_while_others_run(folders, alone):
    """A new adapter changes nothing for those that are on their way."""
    engine = make_engine(folders, ["a"])
    given = [one for one in requests() if one[2] in (BASE, "a")]
    running = [engine.add(p, s, adapter=name) for p, s, name in given]
    for _ in range(5):
        engine.step()
    engine.adapters.add("b", folders["b"])
    late = [one for one in requests() if one[2] == "b"]
    running += [engine.add(p, s, adapter=name) for p, s, name in late]
    engine.run()
    expected = dict(zip(((tuple(p), s, n) for p, s, n in requests()), alone, strict=True))
    assert [r.output for r in running] == [expected[tuple(p), s, n] for p, s, n in given + late]


def test_what_cannot_be_is_refused(folders, tmp_path):
    engine = make_engine(folders, ["a"])
    with pytest.raises(ValueError, match=r"Engine\.add: adapter: expected one of __base__, a, got 'poems'"):
        engine.add([1, 2], adapter="poems")
    with pytest.raises(ValueError, match=r"Engine\.add: adapter: expected __base__, the only one here, got 'a'"):
        Engine(make_model()).add([1, 2], adapter="a")
    assert engine.idle
    for taken in ("a", BASE):
        with pytest.raises(ValueError, match=f"Adapters.add: name: expected a new one, got '{taken}'"):
            engine.adapters.add(taken, folders["b"])
    with pytest.raises(FileNotFoundError):
        engine.adapters.add("none", tmp_path)
    model = copy.deepcopy(make_model())
    add_lora(model, ["head"], r=2)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="head: expected adapters of the model's layers, got one of head"):
        engine.adapters.add("head", tmp_path)
    assert engine.adapters.names == ["a"]
    assert named("x=some/folder")[0] == "x"
    with pytest.raises(Exception, match="expected name=folder, got 'x'"):
        named("x")


def test_bfloat16_base_and_adapters_of_two_dtypes(folders, tmp_path):
    """Files of bfloat16 and of float32 meet in one batch."""
    model = make_model()
    load_adapter(model, folders["a"])
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.bfloat16(), layer.lora_B.data.bfloat16()
    save_adapter(model, tmp_path)
    paths = {"a": tmp_path, "b": folders["b"]}

    def engine():
        model = make_model().to(torch.bfloat16)
        adapters = Adapters(model)
        for name, folder in paths.items():
            adapters.add(name, folder)
        return Engine(model, adapters=adapters, num_blocks=200, block_size=8)

    given = [one for one in requests() if one[2] != "c"]
    assert answers(engine(), given)[0] == [answers(engine(), [one])[0][0] for one in given]
