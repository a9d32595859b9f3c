"""The engine: a request's tokens are the same whatever it shares a batch, a pool and a cache with."""

import itertools
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genai_kernels.kv_cache import BlockError
from python_models.llama import Llama
from python_models.llama_cache import generate
from python_models.llama_configs import Config
from python_models.serving import Engine, Request, Sampling
from python_models.serving_draft import ModelDrafter, NgramDrafter

CONFIG = Config(vocabulary=97, layers=2, width=48, heads=4, kv_heads=2, hidden=64, context=256, eps=1e-5, tied=True,
                bos=0, eos=0, dtype="float32")  # fmt: skip


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    config = CONFIG.__class__(**{**CONFIG.__dict__, **changes})
    model = Llama(config)
    with torch.no_grad():  # every layer begins as identity; these have something to say
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return make_model()


def requests(count=12, seed=0):
    """Prompts of all lengths, some alike at the beginning, some repetitive, with every way to choose."""
    rnd = random.Random(seed)
    common = [rnd.randrange(1, 97) for _ in range(40)]
    ways = [
        Sampling(max_tokens=20, ignore_end=True),
        Sampling(max_tokens=17, temperature=0.8, seed=3),
        Sampling(max_tokens=25, temperature=1.2, top_k=9, top_p=0.9, seed=5, ignore_end=True),
        Sampling(max_tokens=12, beams=3),
        Sampling(max_tokens=20, temperature=1.0, min_p=0.05, repetition_penalty=1.3, seed=2**62),
    ]
    for i in range(count):
        own = [rnd.randrange(1, 97) for _ in range(rnd.randrange(1, 60))]
        text = common[: rnd.choice([0, 17, 40])] + (own[:5] * 8 if i % 4 == 1 else own)
        yield text, ways[i % len(ways)]


def answers(model, given, stagger=0, **options):
    """What an engine answers, all requests at once or one more each `stagger` steps; and the engine, empty again."""
    engine = Engine(model, **{"num_blocks": 400, "block_size": 8, **options})
    running = []
    for prompt, sampling in given:
        running.append(engine.add(prompt, sampling))
        for _ in range(stagger):
            engine.step()
    engine.run()
    stats = engine.blocks.stats()
    assert stats["used"] == stats["sequences"] == stats["swapped"] == 0
    assert all(r.state == "done" for r in running)
    return [(r.output, r.reason) for r in running], running, engine


@pytest.fixture(scope="module")
def alone(model):
    return [answers(model, [one])[0][0] for one in requests()]


WAYS = {
    "together": {},
    "one after the other": {"stagger": 1},
    "small batches": {"max_batch_tokens": 11},
    "few at once": {"max_running": 3},
    "recomputed": {"num_blocks": 45},
    "swapped": {"num_blocks": 45, "preemption": "swap", "num_swap_blocks": 60},
    "swap pool full": {"num_blocks": 45, "preemption": "swap", "num_swap_blocks": 3},
    "blocks of one token": {"block_size": 1, "num_blocks": 3000},
    "one block for all": {"block_size": 256, "num_blocks": 40},
    "no prefix cache": {"prefix_cache": False},
    "n-gram drafts": {"drafter": NgramDrafter()},
    "drafts, recomputed": {"drafter": NgramDrafter(), "num_blocks": 48, "max_batch_tokens": 29},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_request_answers_the_same(model, alone, way):
    found, running, engine = answers(model, requests(), **WAYS[way])
    assert found == alone
    if WAYS[way].get("num_blocks", 400) < 50 and "block_size" not in WAYS[way]:
        assert sum(r.preemptions for r in running) > 0
    if way == "together":
        assert engine.blocks.stats()["prefix_queries"] > 0


@pytest.mark.parametrize("seed", [0, 1])
def test_a_draft_model_changes_nothing(model, alone, seed):
    """The model itself, whose guesses are nearly all right, and another one."""
    found, _, _ = answers(model, requests(), drafter=ModelDrafter(make_model(seed)))
    assert found == alone
    greedy = [(prompt, Sampling(max_tokens=20, ignore_end=True)) for prompt, _ in requests()]
    steps = [answers(model, greedy, drafter=d)[2].steps for d in (None, ModelDrafter(make_model(seed)))]
    assert steps[1] < 0.5 * steps[0] if seed == 0 else steps[1] <= steps[0]


def test_among_64_others_and_any_thread_count(model, alone):
    others = [(p, s) for p, s in requests(64, seed=9) if s.beams == 1]
    mine = list(requests())
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = answers(model, [*others, *mine], num_blocks=2000)[0]
        assert found[len(others) :] == alone


def test_the_prefix_cache_is_used(model, alone):
    engine = Engine(model, num_blocks=400, block_size=8)
    first = engine.add(*next(requests()))
    engine.run()
    prompt, sampling = next(requests())
    second = engine.add(prompt, sampling)
    engine.run()
    assert second.cached_tokens == (len(prompt) - 1) // 8 * 8
    assert first.output == second.output == alone[0][0]
    other = engine.add(prompt, sampling, salt=b"another tenant")
    engine.run()
    assert (other.cached_tokens, other.output) == (0, alone[0][0])


def test_greedy_is_what_generate_says(model):
    for prompt, _ in itertools.islice(requests(), 4):
        expected = generate(model, torch.tensor([prompt]), 20)[0].tolist()
        found = answers(model, [(prompt, Sampling(max_tokens=20))])[0][0][0]
        assert found == expected[: len(found)]


def test_windows_and_int8(model):
    """A model with a window gives blocks back as it goes; int8 is the same whatever the batch."""
    short = make_model(window=24)
    given = [(p, s) for p, s in requests() if s.beams == 1]
    one_by_one = [answers(short, [one])[0][0] for one in given]
    assert answers(short, given, num_blocks=90)[0] == one_by_one
    engine = Engine(short, num_blocks=60, block_size=8, max_batch_tokens=32)
    request, most = engine.add([5] * 120, Sampling(max_tokens=60, ignore_end=True)), 0
    while not engine.idle:
        engine.step()
        if len(request.output) > 1:
            most = max(most, engine.blocks.stats()["used"])
    assert most <= 24 // 8 + 2
    small = [answers(model, [one], int8=True)[0][0] for one in given[:4]]
    assert answers(model, given, int8=True)[0][:4] == small


def test_beam_search_finds_the_best_texts(model):
    """Against an exhaustive search of the same width, without a cache."""
    prompt, beams, length = [3, 14, 15], 3, 4
    texts = [(0.0, prompt)]
    with torch.inference_mode():
        for _ in range(length):
            grown = []
            for score, text in texts:
                logs = model(torch.tensor([text]))[0, -1].double().log_softmax(-1)
                grown += [(score + float(logs[t]), [*text, t]) for t in range(1, 97)]  # 0 ends a text
            texts = sorted(grown, key=lambda x: -x[0])[:beams]
    engine = Engine(model)
    request = engine.add(prompt, Sampling(max_tokens=length, beams=beams))
    engine.run()
    found = [b.tokens for b in request.branches if b not in request.finished]
    assert found == [text for _, text in texts][: len(found)]
    assert found


def test_cancellation_gives_everything_back(model, alone):
    given = list(requests())
    for at in range(0, 30, 3):
        engine = Engine(model, num_blocks=60, block_size=8, preemption="swap", num_swap_blocks=20)
        running = [engine.add(*one) for one in given]
        for _ in range(at):
            engine.step()
        for request in running[::2]:
            engine.cancel(request)
            engine.cancel(request)  # twice is once
        engine.run()
        stats = engine.blocks.stats()
        assert stats["used"] == stats["sequences"] == stats["swapped"] == 0
        assert [(r.output, r.reason) for r in running[1::2]] == alone[1::2]
        done = [r for r in running[::2] if r.state == "cancelled"]
        assert all(r.output == answer[: len(r.output)] for r, (answer, _) in zip(running, alone, strict=True)
                   if r in done and r.sampling.beams == 1)  # fmt: skip


def test_tokens_are_streamed_in_order(model, alone):
    heard: dict[Request, list[int]] = {}
    engine = Engine(model, num_blocks=60, block_size=8, drafter=NgramDrafter())
    running = [engine.add(*one, on_token=lambda r, t: heard.setdefault(r, []).append(t)) for one in requests()]
    engine.run()
    assert [heard[r] for r in running] == [answer for answer, _ in alone]

    def stop(request, token):
        if len(request.output) == 3:
            engine.cancel(request)

    early = engine.add([1, 2, 3], Sampling(max_tokens=20, ignore_end=True), on_token=stop)
    engine.run()
    assert (early.state, len(early.output), engine.blocks.stats()["used"]) == ("cancelled", 3, 0)


@pytest.mark.parametrize(
    ("prompt", "sampling", "text"),
    [
        ([], {}, "at least one token"),
        ([97], {}, "tokens from 0 to 96"),
        ([-1], {}, "tokens from 0 to 96"),
        ([1] * 200, {"max_tokens": 57}, "at most 256 tokens"),
        ([1] * 100, {"max_tokens": 100}, "fits 20 blocks"),
        ([1] * 20, {"max_tokens": 40, "beams": 3}, "fits 20 blocks"),
    ],
)
def test_what_could_never_run_is_refused(model, prompt, sampling, text):
    engine = Engine(model, num_blocks=20, block_size=8)
    with pytest.raises(ValueError, match=text):
        engine.add(prompt, Sampling(**sampling))
    assert engine.idle


def test_options_are_checked(model):
    with pytest.raises(ValueError, match="preemption"):
        Engine(model, preemption="give up")
    for bad in ({"max_tokens": 0}, {"beams": 0}, {"beams": 2, "temperature": 1.0}):
        with pytest.raises(ValueError, match="Sampling"):
            Sampling(**bad)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_order_of_events(model, data):
    """Arrivals, steps and cancellations in any order, in a pool of any size: no block is lost, no error is left."""
    block_size = data.draw(st.sampled_from([1, 3, 8]))
    engine = Engine(
        model,
        num_blocks=data.draw(st.integers(400 // block_size, 600 // block_size)),
        block_size=block_size,
        max_batch_tokens=data.draw(st.integers(5, 64)),
        max_running=data.draw(st.integers(1, 8)),
        preemption=data.draw(st.sampled_from(["recompute", "swap"])),
        num_swap_blocks=data.draw(st.integers(0, 60)),
        drafter=NgramDrafter() if data.draw(st.booleans()) else None,
        prefix_cache=data.draw(st.booleans()),
    )
    pool, running = list(requests(10, seed=4)), []
    for event in data.draw(st.lists(st.sampled_from(["add", "step", "step", "cancel"]), max_size=40)):
        if event == "add" and len(running) < len(pool):
            running.append(engine.add(*pool[len(running)]))
        elif event == "step":
            engine.step()
        elif event == "cancel" and running:
            engine.cancel(running[data.draw(st.integers(0, len(running) - 1))])
    engine.run()
    assert engine.blocks.stats()["used"] == 0
    engine.blocks._check_invariants()
    with pytest.raises(BlockError):
        engine.blocks.free(10**6)
