"""sample: refusals, the torch ops behind it, every instruction set."""

import hashlib
import re

import pytest
import torch
from calls import bits
from test_errors import FORM
from test_isa import SUPPORTED, python

import genai_kernels as gk

X = torch.randn(4, 50)
SEEDS = torch.arange(4)
NAN, INF = float("nan"), float("inf")


def tensor(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def row_with(value, at=(2, 17)):
    x = X.clone()
    x[at] = value
    return x


def previous(**changed):
    return {"repetition_penalty": 1.2, "previous_tokens": torch.zeros(4, 3, dtype=torch.int32), **changed}


V, T, I = ValueError, TypeError, IndexError
REFUSED = {
    "logits of one dimension": ({"logits": X[0]}, V, "logits: expected [batch, vocabulary]"),
    "no vocabulary": ({"logits": X[:, :0]}, V, "logits: expected [batch, vocabulary] with 1 to 4194304 tokens"),
    "logits of integers": ({"logits": X.int()}, T, "logits: expected float32"),
    "logits of float64": ({"logits": X.double()}, T, "logits: expected float32, bfloat16 or float16, got float64"),
    "nan": ({"logits": row_with(NAN)}, V, "logits[2, 17]: expected a finite number or -inf, got nan"),
    "nan, greedy": ({"logits": row_with(NAN), "temperature": 0}, V, "logits[2, 17]: expected a finite number"),
    "inf": ({"logits": row_with(INF, (3, 49))}, V, "logits[3, 49]: expected a finite number or -inf, got inf"),
    "inf in bfloat16": ({"logits": row_with(INF).bfloat16()}, V, "logits[2, 17]: expected a finite number or -inf"),
    "nothing but -inf": ({"logits": row_with(-INF, 1)}, V, "logits[1]: expected a finite logit, got none but -inf"),
    "inf by the penalty": (
        {"logits": row_with(3e38, (0, 0)), **previous(repetition_penalty=0.1)},
        V,
        "logits[0, 0]: expected a finite number or -inf, got 3e+38, which is inf after the repetition penalty",
    ),
    "temperature below 0": ({"temperature": -1}, V, "temperature: expected a finite number >= 0"),
    "temperature nan": ({"temperature": tensor(1, 1, NAN, 1)}, V, "temperature[2]: expected a finite number >= 0"),
    "temperature inf": ({"temperature": INF}, V, "temperature: expected a finite number >= 0"),
    "temperatures of others": ({"temperature": tensor(1, 1)}, V, "temperature: expected a number or a tensor [4]"),
    "temperatures of bfloat16": ({"temperature": tensor(1, 1, 1, 1).bfloat16()}, T, "temperature: expected a number,"),
    "temperature of a text": (
        {"temperature": "hot"},
        T,
        "temperature: expected a number or a tensor [batch], got 'hot'",
    ),
    "top_k below -1": (
        {"top_k": tensor(1, 2, 3, -2, dtype=torch.int32)},
        V,
        "top_k[3]: expected at least 1, or 0 or -1",
    ),
    "top_k of floats": ({"top_k": tensor(1, 1, 1, 1)}, T, "top_k: expected a number, int32 or int64, got float32"),
    "top_k of a half": ({"top_k": 1.5}, T, "top_k: expected an int64 or a tensor [batch], got 1.5"),
    "top_p above 1": ({"top_p": 1.01}, V, "top_p: expected 0 <= p <= 1, got 1.01"),
    "top_p nan": ({"top_p": NAN}, V, "top_p: expected 0 <= p <= 1, got nan"),
    "min_p below 0": ({"min_p": tensor(0, -0.5, 0, 0)}, V, "min_p[1]: expected 0 <= p <= 1, got -0.5"),
    "penalty of 0": (previous(repetition_penalty=0), V, "repetition_penalty: expected a finite number > 0"),
    "penalty of nothing": ({"repetition_penalty": 1.5}, V, "repetition_penalty: expected 1 without previous_tokens"),
    "previous past the end": (
        previous(previous_tokens=torch.full((4, 3), 50)),
        I,
        "previous_tokens[0, 0]: expected 0 <= token < 50, got 50",
    ),
    "previous of -1": (
        {"previous_tokens": torch.tensor([[1], [2], [-1], [3]])},
        I,
        "previous_tokens[2, 0]: expected 0 <= token < 50, got -1",
    ),
    "previous of floats": (previous(previous_tokens=torch.zeros(4, 3)), T, "previous_tokens: expected int32 or int64"),
    "previous of others": (
        previous(previous_tokens=torch.zeros(3, 3, dtype=torch.int64)),
        V,
        "previous_tokens: expected [4, tokens]",
    ),
    "lens without tokens": ({"previous_lens": SEEDS}, V, "previous_lens: expected previous_tokens beside it, got None"),
    "lens past the end": (previous(previous_lens=SEEDS + 1), V, "previous_lens[3]: expected 0 to 3, the columns of"),
    "lens below 0": (previous(previous_lens=SEEDS - 1), V, "previous_lens[0]: expected 0 to 3"),
    "seeds of others": ({"seed": SEEDS[:3]}, V, "seed: expected a number or a tensor [4]"),
    "a seed of 2^63": ({"seed": 2**63}, T, "seed: expected an int64 or a tensor [batch], got 9223372036854775808"),
    "one seed for all": ({"seed": 3, "offset": 5}, V, "seed: expected a tensor [4], or offset to be one"),
}


@pytest.mark.parametrize(("given", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refused_and_nothing_changed(given, error, text):
    given = {"logits": X, "seed": SEEDS, **given}
    logits = given.pop("logits")
    tensors = [logits, *(t for t in given.values() if isinstance(t, torch.Tensor))]
    before = [bits(t).clone() for t in tensors]
    generator = torch.get_rng_state()
    with pytest.raises(error, match=re.escape(text)) as raised:
        gk.sample(logits, **given)
    assert FORM.fullmatch(str(raised.value)), str(raised.value)
    assert str(raised.value).startswith("genai_kernels.sample: ")
    assert all(torch.equal(bits(t), b) for t, b in zip(tensors, before, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


def test_the_first_bad_row_is_named_whatever_the_threads():
    x = torch.randn(64, 300)
    x[40, 7], x[11, 299], x[62] = NAN, INF, -INF
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        with pytest.raises(ValueError, match=re.escape("logits[11, 299]")):
            gk.sample(x, seed=torch.arange(64))


def test_a_mix_of_devices_is_refused():
    with pytest.raises(ValueError, match="seed: expected device cpu"):
        gk.sample(X, seed=SEEDS.to("meta"))


def test_meta_tensors_touch_no_data():
    tokens, logprobs, final = gk.sample(X.to("meta"), seed=SEEDS.to("meta"), return_logprobs=True)
    assert [(t.device.type, t.dtype, t.shape) for t in (tokens, logprobs, final)] == [
        ("meta", torch.int64, (4,)),
        ("meta", torch.float32, (4,)),
        ("meta", torch.float32, (4,)),
    ]


@pytest.mark.parametrize("name", ["sample", "sample_logprobs"])
def test_opcheck(name):
    one = (None, 1.0, None, 5, None, 0.9, None, 0.01)
    seen = (torch.zeros(4, 3, dtype=torch.int32), torch.tensor([0, 1, 2, 3]))
    calls = [
        (X, None, None, *one, None, 1.0, SEEDS, 0, None, 3),
        (X, *seen, *one, X[:, 0].abs() + 0.5, 0.0, SEEDS, 0, None, 0),
    ]
    for args in calls:
        torch.library.opcheck(getattr(torch.ops.genai_kernels, name).default, args)


TOKENS = """
import hashlib, torch, genai_kernels as gk
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for vocab in (1, 7, 300, 1500, 9000):
        g = torch.Generator().manual_seed(vocab)
        x = (torch.randn(40, vocab, generator=g) * 5).to(dtype)
        for options in ({}, {"top_k": 30}, {"top_p": 0.9}, {"top_k": 700, "top_p": 0.7, "temperature": 1.9},
                        {"min_p": 0.03, "temperature": 0.3}):
            for t in gk.sample(x, seed=torch.arange(40), offset=vocab, return_logprobs=True, **options):
                digest.update(t.numpy().tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_draws_the_same_tokens():
    found = {isa: python("-c", TOKENS, isa=isa) for isa in SUPPORTED}
    assert {isa: r.stderr for isa, r in found.items() if r.returncode} == {}
    assert len({r.stdout for r in found.values()}) == 1
    assert len(next(iter(found.values())).stdout.strip()) == 2 * hashlib.sha256().digest_size
