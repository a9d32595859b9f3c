"""The character LM beside its eager twin, its data and its baseline, in seconds."""

import copy
import dataclasses
import itertools
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

import genai_kernels as gk
from python_models import char_data
from python_models.char_lm import CharLM, Config, RingCache
from python_models.char_lm_train import (
    Recipe,
    Run,
    agreement,
    bits,
    eager_twin,
    exact_twin,
    new_run,
    scored_pieces,
)
from python_models.kneser_ney import KneserNey
from python_models.position_embeddings import POSITIONS, bias_from_distances, t5_buckets

TINY = Config(vocabulary=40, layers=2, width=32, heads=4, kv_heads=2, hidden=48, window=8, context=48)
TEXT = torch.randint(40, (4000,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # a second one only waits in models as small as these; tests/conftest.py resets it


@pytest.fixture(scope="module")
def files():
    return list(itertools.islice(char_data.stdlib_files(Path(sysconfig.get_path("stdlib"))), 45))


@pytest.fixture(scope="module")
def corpus(files):
    return char_data.build(files)


def tiny(kind="rope", **changes):
    """A model whose every weight matters: biases that start at zero are moved too."""
    torch.manual_seed(1)
    model = CharLM(dataclasses.replace(TINY, positions=kind, **changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


# ---- the model and its twin ----


def logits_and_gradients(model, backend):
    model = copy.deepcopy(model)
    passage = torch.randint(40, (2, 41), generator=torch.Generator().manual_seed(2))
    with gk.use_backend(backend):
        logits = model(passage[:, :-1])
        model.loss(passage[:, :-1], passage[:, 1:]).backward()
    assert all(w.grad is not None for w in model.parameters())
    return {"logits": logits.detach()} | {n: w.grad for n, w in model.named_parameters()}


@pytest.mark.parametrize("kind", POSITIONS)
def test_logits_and_gradients_are_as_exact_as_eagers(kind):
    model = tiny(kind)
    ours, eager = logits_and_gradients(model, "auto"), logits_and_gradients(model, "reference")
    exact = logits_and_gradients(model.double(), "reference")
    for name, ref in exact.items():
        error, eager_error = (float((t[name].double() - ref).square().mean().sqrt()) for t in (ours, eager))
        # TRUTH's kR of the backward of each op on the way; 0.3 u rms(ref) for rounding the result
        assert error <= 1.5 * eager_error + 0.3 * 2**-24 * float(ref.square().mean().sqrt()), name


def test_the_positions_are_different_models():
    passage = torch.arange(20)[None]
    logits = [tiny(kind)(passage) for kind in POSITIONS]
    for a, b in itertools.combinations(logits, 2):
        assert not torch.allclose(a, b)


def three_curves(steps=30, ours=None):
    first = new_run(TINY, Recipe(steps, batch=2, warmup=5), TEXT)
    runs = (Run(ours(first.model), first.recipe, TEXT) if ours else first, eager_twin(first), exact_twin(first))
    for _ in range(steps):
        for run in runs:
            run.step()
    return [run.losses for run in runs]


def test_loss_curve_agrees_with_eager_step_by_step():
    found = agreement(*three_curves())
    assert found.ok, (found.first_excess, found.error, found.eager_error)


def window_off_by_one(model):
    model.config = dataclasses.replace(model.config, window=model.config.window - 1)
    for layer in model.layers:
        layer.attention.config = model.config
    return model


def eps_wrong(model):
    model.norm.eps = 1e-4
    return model


@pytest.mark.parametrize("fault", [window_off_by_one, eps_wrong])
def test_loss_curve_of_another_model_does_not_agree(fault):
    copied = lambda model: fault(copy.deepcopy(model))  # noqa: E731
    assert not agreement(*three_curves(10, ours=copied)).ok


def test_a_curve_that_is_not_finite_never_agrees():
    curve = [3.0, 2.0, 1.0]
    assert agreement(curve, curve, curve).ok
    assert not agreement([3.0, float("nan"), 1.0], curve, curve).ok
    assert agreement([3.0, float("nan"), 1.0], curve, curve).first_excess == 1


def test_training_is_reproducible():
    assert three_curves(5)[0] == three_curves(5)[0]


def test_learns_a_pattern():
    text = torch.arange(4000) % 7
    run = new_run(TINY, Recipe(150, batch=2, warmup=5), text)
    for _ in range(150):
        run.step()
    assert run.losses[-1] < 0.1 < run.losses[0]


# ---- generation ----


@pytest.mark.parametrize(("prompt", "temperature"), [(1, 1.0), (8, 0.0), (21, 1.0)])
@pytest.mark.parametrize("kind", POSITIONS)
def test_rolling_cache_writes_what_recomputing_writes(kind, prompt, temperature):
    model = tiny(kind)
    prompt = torch.randint(40, (2, prompt), generator=torch.Generator().manual_seed(3))
    written = [
        torch.stack(list(model.generate(prompt, 25, temperature=temperature, seed=4, cached=cached)))
        for cached in (True, False)
    ]
    assert torch.equal(*written)
    with gk.use_backend("reference"):
        assert torch.equal(torch.stack(list(model.generate(prompt, 25, temperature=temperature, seed=4))), written[0])


def test_cache_does_not_grow():
    cache = RingCache(TINY, 1, torch.empty(0))
    memory = cache.k.numel()
    for i in range(30):
        k = torch.full((1, 1, 2, 8), float(i))
        assert cache.keys(1) == min(i + 1, 8)
        keys, values = cache.append(k, -k)
        assert keys[0, :, 0, 0].tolist() == list(range(max(0, i - 7), i + 1))
        assert torch.equal(values, -keys)
    assert cache.k.numel() == memory


def test_cache_refuses_what_it_cannot_do():
    cache = RingCache(TINY, 1, torch.empty(0))
    cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8))
    with pytest.raises(ValueError, match="expected one character after the prompt, got 2"):
        cache.append(torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 8))
    assert cache.length == 3
    with pytest.raises(ValueError, match="window=None"):
        tiny(window=None).new_caches(1)


def test_learned_positions_end():
    with pytest.raises(ValueError, match="expected a position below 48, got 48"):
        tiny("learned")(torch.zeros(1, 49, dtype=torch.long))
    assert tiny("sinusoidal")(torch.zeros(1, 90, dtype=torch.long)).shape == (1, 90, 40)
    assert tiny("rope")(torch.zeros(1, 90, dtype=torch.long)).shape == (1, 90, 40)


def test_only_the_window_is_seen():
    model = tiny(layers=1)
    passage = torch.randint(40, (1, 20), generator=torch.Generator().manual_seed(6))
    changed = passage.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 40
    same = (model(passage) == model(changed)).all(-1)[0]
    assert same.tolist() == [not 4 <= i < 4 + TINY.window for i in range(20)]


# ---- position embeddings ----


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (1, 6), (4, 1)])
def test_bias_from_distances(queries, keys):
    table = torch.randn(2, 4, requires_grad=True)
    expected = torch.zeros(1, 2, queries, keys)
    for i, j in itertools.product(range(queries), range(keys)):
        distance = i + keys - queries - j
        if 0 <= distance < 4:
            expected[0, :, i, j] = table[:, distance].detach()
    bias = bias_from_distances(table, queries, keys)
    assert torch.equal(bias, expected)
    upstream = torch.randn_like(bias)
    bias.backward(upstream)
    for d in range(4):
        places = [(i, i + keys - queries - d) for i in range(queries) if 0 <= i + keys - queries - d < keys]
        total = sum((upstream[0, :, i, j] for i, j in places), torch.zeros(2))
        torch.testing.assert_close(table.grad[:, d], total)


def test_t5_buckets():
    found = t5_buckets(128, 32)
    assert found[:16].tolist() == list(range(16))
    assert found.diff().min() >= 0
    assert found.max() == 31
    assert t5_buckets(8, 32).tolist() == list(range(8))


# ---- data and baseline ----


def test_no_validation_text_is_in_training(corpus):
    train, validation = corpus.decode(corpus.train), corpus.decode(corpus.validation)
    texts = [t for t in validation.split(char_data.SEPARATOR) if t]
    assert len(texts) == len(corpus.validation_files) > 0
    assert all(text not in train for text in texts)
    passages = {train[i : i + 64] for i in range(len(train) - 63)}
    for text in texts:
        shared = [text[i : i + 64] in passages for i in range(len(text) - 63)]
        assert sum(shared) <= 0.1 * len(shared)
    assert set(corpus.train_files).isdisjoint(corpus.validation_files)


def test_split_is_by_name_and_order_is_fixed(files, corpus):
    assert [name for name, _ in files] == sorted(name for name, _ in files)
    assert not any(char_data.is_validation(name) for name in corpus.train_files)
    assert all(char_data.is_validation(name) for name in corpus.validation_files)
    assert char_data.build(files).fingerprint == corpus.fingerprint
    skipped = {"test", "tests", "site-packages"}
    assert not any(skipped & set(Path(name).parts) for name, _ in files)


def test_copies_are_left_out():
    kept = next(n for n in map("v{}.py".format, itertools.count()) if char_data.is_validation(n))
    copied = next(n for n in map("c{}.py".format, itertools.count()) if char_data.is_validation(n))
    generator = np.random.default_rng(0)
    text = {name: "".join(map(chr, generator.integers(97, 123, 3000))) for name in ("t1.py", "t4.py", kept)}
    assert not char_data.is_validation("t1.py")
    assert not char_data.is_validation("t4.py")
    text[copied] = text[kept][:1000] + text["t1.py"][:1000]
    found = char_data.build([*text.items(), ("t3.py", text["t1.py"])], min_count=1)
    assert found.dropped_files == [copied]
    assert found.validation_files == [kept]
    assert len(found.train) == sum(len(text[n]) + 1 for n in found.train_files)


def test_unknown_characters(corpus):
    assert corpus.decode(corpus.encode("a\u1234b")) == f"a{char_data.UNKNOWN}b"
    assert len(corpus.vocabulary) < 130
    assert corpus.train.max() < len(corpus.vocabulary)


def test_kneser_ney_sums_to_one(corpus):
    model = KneserNey(corpus.train.numpy(), len(corpus.vocabulary))
    generator = np.random.default_rng(0)
    contexts = [generator.integers(len(corpus.vocabulary), size=n) for n in (0, 1, 3, 4, 9)]  # seen by nobody
    contexts += [corpus.validation.numpy()[i : i + 7] for i in generator.integers(len(corpus.validation) - 7, size=30)]
    for context in contexts:
        p = model.distribution(context)
        assert p.min() > 0
        assert abs(p.sum() - 1) < 1e-12
    # the same numbers, looked up one by one
    piece = corpus.validation.numpy()[:50]
    one_by_one = [model.distribution(piece[:i])[piece[i]] for i in range(1, 50)]
    np.testing.assert_allclose(model.probabilities(piece)[1:], one_by_one, rtol=1e-12)


def test_kneser_ney_by_hand():
    """Bigrams of 0 1 0 1 2 with a 0 in front: each formula of the paper, written out."""
    model = KneserNey(np.array([0, 1, 0, 1, 2]), 3, order=2)
    # counts: 00 1, 01 2, 10 1, 12 1 -> n1 = 3, n2 = 1: Y = 3/5, D1 = 1 - 2 Y n2/n1 = 0.6, D2 = 2 - 3 Y n3/n2 = 2
    # contexts of each character: 0 after 0 and 1, 1 after 0, 2 after 1 -> n1 = 2, n2 = 1: Y = 1/2, D1 = 0.5, D2 = 2
    unigram = [(2 - 2) / 4 + 3 / 4 / 3, (1 - 0.5) / 4 + 3 / 4 / 3, (1 - 0.5) / 4 + 3 / 4 / 3]
    after_0 = [(1 - 0.6) / 3 + 2.6 / 3 * unigram[0], (2 - 2) / 3 + 2.6 / 3 * unigram[1], 2.6 / 3 * unigram[2]]
    np.testing.assert_allclose(model.distribution(np.array([0])), after_0)
    np.testing.assert_allclose(model.distribution(np.array([2])), unigram)  # a context that was never seen


def test_five_grams_beat_fewer(corpus):
    text, size = corpus.train.numpy(), len(corpus.vocabulary)
    scores = [KneserNey(text, size, order).bits_per_character(corpus.validation.numpy()) for order in (1, 2, 3, 5)]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] < 3


def test_scored_pieces_are_scored_once():
    starts, places = scored_pieces(TEXT, 48)
    assert places.flatten().unique().numel() == places.numel()
    assert (places - starts[:, None]).min() == 13
    scores = bits(tiny(), TEXT, 48, most=5)
    assert scores.shape == scored_pieces(TEXT, 48, 5)[1].shape
    assert scores.shape[0] == 5
