"""sample: the token of a sorted reference for any row, the right frequencies, and no influence of neighbours."""

import math
from fractions import Fraction

import pytest
import torch
from calls import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

import genai_kernels as gk
from genai_kernels.accuracy import compare
from genai_kernels.ops.sample.reference import BITS, philox, random_bits, weights_of
from genai_kernels.registry import OPS

REFERENCE = OPS["sample"].reference
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INF = float("inf")
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


# ---- the same bits as the sorted reference ----

ROWS = {
    "normal": lambda n, g: torch.randn(n, generator=g) * 4,
    "flat": lambda n, g: torch.randn(n, generator=g) * 1e-3,
    "constant": lambda n, g: torch.full((n,), -3.25),
    "steps": lambda n, g: torch.randint(-3, 3, (n,), generator=g).float(),
    "two values": lambda n, g: torch.randint(0, 2, (n,), generator=g).float() * 20,
    "one hot": lambda n, g: torch.zeros(n).index_fill(0, torch.randint(n, (1,), generator=g), 60.0),
    "one finite": lambda n, g: torch.full((n,), -INF).index_fill(0, torch.randint(n, (1,), generator=g), -5.0),
    "masked": lambda n, g: torch.where(torch.rand(n, generator=g) < 0.9, -INF, 0.0).index_fill(0, torch.tensor([0]), 0),
    "huge": lambda n, g: (torch.randn(n, generator=g) * 3e4).clamp(-65504, 65504),
    "denormal": lambda n, g: torch.randn(n, generator=g) * 1e-40,
    "signed zeros": lambda n, g: torch.zeros(n) * torch.randn(n, generator=g).sign(),
    "long tail": lambda n, g: torch.cat([torch.zeros(1), -27.5 - torch.rand(n - 1, generator=g)]),
    "rising": lambda n, g: torch.linspace(-30, 0, n),
    "falling": lambda n, g: torch.linspace(0, -30, n),
    "neighbours": lambda n, g: (
        (torch.randint(0, 5, (n,), generator=g) + 0x3F800000).to(torch.int32).view(torch.float32)
    ),
}


@settings(max_examples=400, deadline=None)
@given(
    row=st.sampled_from(list(ROWS)),
    vocab=st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 257, 1023, 1024, 1025, 2047, 4099])),
    dtype=st.sampled_from(FLOATS),
    temperature=st.sampled_from([0.0, 1e-320, 1e-30, 0.1, 0.7, 1.0, 1.3, 40.0, 1e10, 1e308]),
    top_k=st.one_of(st.integers(-1, 12), st.integers(0, 5000)),
    top_p=st.one_of(st.sampled_from([0.0, 1.0, 0.5, 0.9, 5e-324, 1 - 2**-53]), st.floats(0, 1)),
    min_p=st.sampled_from([0.0, 1e-300, 2.0**-41, 0.01, 0.5, 1.0]),
    penalty=st.sampled_from([1.0, 1.2, 0.5, 3.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.integers(-(2**63), 2**63 - 1),
)
def test_the_bits_of_the_sorted_reference(row, vocab, dtype, temperature, top_k, top_p, min_p, penalty, seed, offset):
    generator = torch.Generator().manual_seed(seed % 1000)
    logits = ROWS[row](vocab, generator)[None].to(dtype)
    options = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": penalty,
        "previous_tokens": torch.randint(vocab, (1, 9), generator=generator), "seed": seed, "offset": offset,
        "return_logprobs": True,
    }  # fmt: skip
    ours, expected = gk.sample(logits, **options), REFERENCE(logits, **options)
    assert same_bits(list(ours), list(expected))
    assert logits[0, ours[0]] > -INF


@pytest.mark.parametrize("vocab", [1, 2, 3, 5])
def test_every_filter_of_a_small_row_exactly(vocab):
    """Against rational numbers: which tokens each top_k, top_p and min_p keeps."""
    logits = torch.tensor([[0.5, 0.0, 0.5, -1.0, 0.25]])[:, :vocab]
    weights = weights_of(logits, logits.amax(), torch.tensor(1 / math.log(2), dtype=torch.float64))[0].tolist()
    ranking = sorted(range(vocab), key=lambda i: (-logits[0, i].item(), i))
    for top_k in range(vocab + 2):
        for p in (0.0, 0.2, 0.29, 0.5, 0.7, 0.93, 1.0):
            for min_p in (0.0, 0.3, 0.7, 1.0):
                first = ranking[: top_k or vocab]
                total, before, kept = sum(weights[i] for i in first), 0, []
                for i in first:
                    if (not kept or before < Fraction(p) * total) and weights[i] >= Fraction(min_p) * 2**BITS:
                        kept.append(i)
                    before += weights[i]
                drawn = gk.sample(
                    logits.expand(300, -1), top_k=top_k, top_p=p, min_p=min_p, seed=5, offset=torch.arange(300)
                )
                assert sorted(set(drawn.tolist())) == sorted(kept), (top_k, p, min_p)


def test_the_weights_are_powers_of_two_rounded():
    t = torch.cat([-torch.rand(3000, dtype=torch.float64) * 42, torch.arange(0, -45, -0.5, dtype=torch.float64)])
    y = t.float().double()
    found = weights_of(y.float(), torch.tensor(0.0), torch.tensor(1.0, dtype=torch.float64))
    for exponent, weight in zip(y.tolist(), found.tolist(), strict=True):
        assert abs(weight - 2.0 ** (exponent + BITS)) <= 0.5 + 2.0 ** (exponent + BITS - 48)
    assert found[3000] == 2**BITS


def test_philox_gives_the_published_numbers():
    """The known answers of Random123."""
    assert philox((0, 0, 0, 0), 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 2**32 - 1
    assert philox((ones,) * 4, 2**64 - 1) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert random_bits(-1, -1) == random_bits(2**64 - 1, 2**64 - 1)


@each_dtype
def test_greedy_is_the_first_of_the_largest(dtype):
    x = torch.randint(-20, 20, (200, 3001)).to(dtype)
    expected = [row.index(max(row)) for row in x.tolist()]
    for options in ({}, {"top_k": 3, "top_p": 0.0, "min_p": 1.0, "seed": 4}):
        assert gk.sample(x, temperature=0, **options).tolist() == expected
    assert gk.sample(torch.tensor([[-1.0, -0.0, 0.0]]), temperature=0).tolist() == [1]


def test_equal_logits_are_kept_from_the_lowest_index():
    x = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]).repeat(500)[None].expand(400, -1)
    seeds = torch.arange(400)
    first = [i for i in range(2500) if i % 5 in (1, 3)]
    assert set(gk.sample(x, top_k=7, seed=seeds).tolist()) == set(first[:7])
    assert set(gk.sample(x, top_k=1002, top_p=1e-2, seed=seeds).tolist()) <= set(first[:11])


def test_a_share_that_is_reached_exactly():
    """1000 logits of weight 2^40, 2000 of 2^39: the first are half of the mass to the last bit, and no more is kept."""
    x = torch.tensor([[0.0, -1.0, -1.0]]).repeat(1, 1000)
    options = {"temperature": 1 / math.log(2), "seed": 6, "return_logprobs": True}
    for p, total in ((0.5, 1000), (0.5 + 2**-12, 1000.5), (1 - 2**-12, 2000), (1 - 2**-11, 1999.5)):
        _, _, logprob = gk.sample(x, top_p=p, **options)
        assert logprob.item() in (pytest.approx(math.log(w / total), abs=1e-6) for w in (1, 0.5)), p


# ---- frequencies ----


def probabilities(x, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """As in Hugging Face's generate, float64."""
    x = x.double() / temperature
    order = x.argsort(descending=True)
    p = x[order].softmax(0)
    p[top_k or len(p) :] = 0
    p /= p.sum()
    p[p.cumsum(0) - p >= top_p] = 0
    p[p < min_p * p[0]] = 0
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 9},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.4, "top_k": 25, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("varied", ["seed", "offset"])
def test_frequencies(options, varied):
    """Chi-square against the exact probabilities: 4 standard deviations."""
    draws, x = 40000, torch.randn(60, generator=torch.Generator().manual_seed(3)) * 2
    numbers = {"seed": 11, "offset": 12, varied: torch.arange(draws)}
    tokens = gk.sample(x.expand(draws, -1), **options, **numbers)
    expected = draws * probabilities(x, **options)
    found = torch.bincount(tokens, minlength=60).double()
    assert not found[expected == 0].any()
    common = expected >= 5
    pairs = [(found[common], expected[common])]
    rare = expected[~common].sum()
    if rare >= 5:
        pairs.append((found[~common].sum()[None], rare[None]))
    chi = sum(((f - e) ** 2 / e).sum().item() for f, e in pairs)
    degrees = sum(len(e) for _, e in pairs) - 1
    assert chi < degrees + 4 * math.sqrt(2 * degrees), (chi, degrees)


def test_seeds_and_offsets_draw_independently():
    """Consecutive seeds, and consecutive offsets, give all pairs of tokens equally often."""
    x, n = torch.zeros(40000, 8), torch.arange(40000)
    for a, b in (({"seed": n}, {"seed": n + 1}), ({"seed": 1, "offset": n}, {"seed": 1, "offset": n + 1})):
        pairs = torch.bincount(gk.sample(x, **a) * 8 + gk.sample(x, **b), minlength=64).double()
        chi = ((pairs - 625) ** 2 / 625).sum().item()
        assert chi < 63 + 4 * math.sqrt(126)


def test_the_processors_of_transformers_give_the_same_distribution():
    logits_process = pytest.importorskip(
        "transformers.generation.logits_process", reason="transformers is not installed"
    )
    x, previous = torch.randn(300, 500) * 3, torch.randint(500, (300, 40))
    p = logits_process
    processors = [
        p.RepetitionPenaltyLogitsProcessor(1.3),
        p.TemperatureLogitsWarper(0.8),
        p.TopKLogitsWarper(60),
        p.TopPLogitsWarper(0.9),
        p.MinPLogitsWarper(0.02),
    ]

    def log_probabilities(scores):
        """Of the tokens as given, and as the processors leave them."""
        given = scores
        for processor in processors:
            scores = processor(previous, scores)
        return [t.log_softmax(1).gather(1, tokens[:, None])[:, 0] for t in (given, scores)]

    tokens, given_logprob, final = gk.sample(
        x, temperature=0.8, top_k=60, top_p=0.9, min_p=0.02, repetition_penalty=1.3, previous_tokens=previous,
        seed=torch.arange(300), return_logprobs=True,
    )  # fmt: skip
    for ours, eager, exact in zip(
        (given_logprob, final), log_probabilities(x), log_probabilities(x.double()), strict=True
    ):
        verdict = compare("log probability", ours, eager, exact, 1.0, 1.0)
        assert verdict.ok, verdict.complaint


# ---- neighbours ----


def requests(n, vocab, dtype=torch.float32):
    """n requests, no two alike."""
    g = torch.Generator().manual_seed(8)
    return (torch.randn(n, vocab, generator=g) * 3).to(dtype), {
        "temperature": torch.rand(n, generator=g) * (torch.arange(n) % 7 > 0),
        "top_k": torch.randint(0, 90, (n,), generator=g) * (torch.arange(n) % 2),
        "top_p": torch.rand(n, generator=g),
        "min_p": torch.rand(n, generator=g) * 0.1,
        "repetition_penalty": 1 + torch.rand(n, generator=g),
        "previous_tokens": torch.randint(vocab, (n, 20), generator=g),
        "previous_lens": torch.randint(0, 21, (n,), generator=g),
        "seed": torch.randint(2**62, (n,), generator=g),
        "offset": torch.randint(2**40, (n,), generator=g),
    }


@each_dtype
def test_a_request_alone_and_among_others_in_any_order(dtype):
    x, options = requests(64, 3000, dtype)
    torch.set_num_threads(2)
    together = gk.sample(x, **options, return_logprobs=True)
    for picked in ([0], [63], [7], [5, 1], torch.randperm(64).tolist(), list(range(13, 50))):
        own = {name: t[picked] for name, t in options.items()}
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            part = gk.sample(x[picked], **own, return_logprobs=True)
            assert same_bits(list(part), [t[picked] for t in together])


def test_one_number_for_all_is_a_tensor_of_it():
    x, _ = requests(5, 400)
    numbers = {"temperature": 0.75, "top_k": 30, "top_p": 0.5, "min_p": 0.125, "offset": 9}
    tensors = {name: torch.full((5,), value) for name, value in numbers.items()}
    tensors["top_k"] = tensors["top_k"].int()
    seed = torch.arange(5)
    assert same_bits(gk.sample(x, seed=seed, **numbers), gk.sample(x, seed=seed.int(), **tensors))


def test_padding_and_memory_between_elements_are_not_looked_at():
    x, options = requests(9, 1000)
    expected = gk.sample(x, **options)
    previous, lens = options["previous_tokens"], options["previous_lens"]
    options["previous_tokens"] = previous.masked_fill(torch.arange(20) >= lens[:, None], -(2**40))
    assert same_bits(gk.sample(x, **options), expected)
    holey = torch.full((9, 1000, 3), torch.nan)[..., 1].copy_(x)
    assert same_bits(gk.sample(holey, **options), expected)
    strided = {name: torch.stack([t, t + 1], -1)[..., 0] for name, t in options.items()}
    assert same_bits(gk.sample(x, **strided), expected)


def test_more_logits_at_the_end_that_are_minus_infinity_change_nothing():
    x, options = requests(20, 1000)
    padded = torch.cat([x, torch.full((20, 777), -INF)], 1)
    everything = [list(gk.sample(t, **options, return_logprobs=True)) for t in (x, padded)]
    assert same_bits(*everything)


def test_without_a_seed_pytorch_generator_decides():
    x = torch.zeros(50, 1000)
    torch.manual_seed(5)
    first, second = gk.sample(x), gk.sample(x)
    torch.manual_seed(5)
    assert torch.equal(gk.sample(x), first)
    assert not torch.equal(first, second)
    assert len(set(first.tolist())) > 30
    state = torch.get_rng_state()
    gk.sample(x, temperature=0)
    gk.sample(x, seed=torch.arange(50))
    assert torch.equal(torch.get_rng_state(), state)
