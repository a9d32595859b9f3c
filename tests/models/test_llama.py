"""The Llama beside transformers' models with the same random weights, its eager twin, and itself without a cache."""

import copy
import dataclasses

import pytest
import torch
import transformers

import genai_kernels as gk
from genai_kernels.accuracy import compare
from python_models import llama_files
from python_models.llama import Llama
from python_models.llama_cache import ContiguousCache, generate
from python_models.llama_configs import KNOWN, Config, RopeScaling, from_hf, to_hf
from python_models.llama_rope import RotaryTables, frequencies

TINY = Config(vocabulary=300, layers=3, width=64, heads=4, kv_heads=2, hidden=96, context=128, rope_theta=500.0)
LLAMA3 = RopeScaling("llama3", factor=8.0, low=1.0, high=4.0, original_context=32)
VARIANTS = {
    "llama": TINY,
    "llama_one_kv_head": dataclasses.replace(TINY, kv_heads=1, tied=True),
    "llama_linear": dataclasses.replace(TINY, rope=RopeScaling("linear", factor=4.0)),
    "llama3_biases": dataclasses.replace(TINY, rope=LLAMA3, qkv_bias=True, out_bias=True, mlp_bias=True, eps=1e-5),
    "mistral": dataclasses.replace(TINY, family="mistral", window=9),
    "mistral_head_dim": dataclasses.replace(TINY, family="mistral", head_dim=32),
    "qwen2": dataclasses.replace(TINY, family="qwen2", qkv_bias=True, tied=True),
    "qwen2_window": dataclasses.replace(TINY, family="qwen2", qkv_bias=True, window=7, window_from=1),
    "qwen3": dataclasses.replace(TINY, family="qwen3", qk_norm=True, head_dim=32),
}
# How far two eager computations of the same logits are apart, transformers' and our twin's, in nine variants x 8 groups
# of eight draws: the mean of the largest errors by up to 1.207, the RMS error by up to 1.023. So the factors are:
CHAIN = {"k": 1.21, "k_rms": 1.03}
each_variant = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # a second one only waits in models as small as these; tests/conftest.py resets it


def tiny(config=TINY, seed=0, **options):
    """A model whose every weight matters: norms and biases differ from layer to layer, no product is 0."""
    torch.manual_seed(seed)
    model = Llama(config, **options)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def tokens_of(shape, seed=7, vocabulary=300):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def in_transformers(model, dtype=None):
    """transformers' own model with these weights. Its RoPE frequencies stay float32, as where it loads files."""
    config = transformers.AutoConfig.for_model(**to_hf(model.config), attn_implementation="eager")
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    found = dict(llama_files.tensors_of(model))
    if model.config.tied:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    theirs.load_state_dict(found)
    for weight in theirs.parameters():
        weight.data = weight.data.to(dtype or model.embedding.weight.dtype)
    return theirs


# ---- beside transformers ----


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_are_as_exact_as_those_of_transformers(name, dtype):
    draws, ways = 8, ([], [], [])
    for seed in range(draws):
        model = tiny(VARIANTS[name], seed).to(dtype)
        eager, exact, text = in_transformers(model), in_transformers(model, torch.float64), tokens_of((2, 50), seed)
        for way, logits in zip(ways, (model(text), eager(text).logits, exact(text).logits), strict=True):
            way.append(logits.flatten())
    verdict = compare("logits", *(torch.cat(way) for way in ways), **CHAIN, draws=draws)
    assert verdict.ok, verdict.complaint


@torch.no_grad()
def test_another_model_does_not_pass_for_the_same():
    """What the comparison above is worth: a window, an epsilon, a frequency a little off is seen."""
    model, text = tiny(VARIANTS["mistral"]), tokens_of((2, 50))
    eager, ref = in_transformers(model)(text).logits, in_transformers(model, torch.float64)(text).logits
    assert compare("itself", model(text), eager, ref, **CHAIN).ok
    for change in ({"window": 8}, {"eps": 2e-6}, {"rope_theta": 501.0}):
        other = Llama(dataclasses.replace(model.config, **change))
        other.load_state_dict(model.state_dict())
        assert not compare(str(change), other(text), eager, ref, **CHAIN).ok, change


@pytest.mark.parametrize("name", KNOWN)
def test_parameter_counts(name):
    published = {
        "llama-2-7b": 6738415616, "llama-2-13b": 13015864320, "llama-2-70b": 68976648192, "llama-3-8b": 8030261248,
        "llama-3-70b": 70553706496, "llama-3.1-8b": 8030261248, "llama-3.2-1b": 1235814400,
        "llama-3.2-3b": 3212749824, "tinyllama-1.1b": 1100048384, "mistral-7b": 7241732096,
        "qwen2.5-0.5b": 494032768, "qwen2.5-7b": 7615616512,
    }  # fmt: skip
    config = KNOWN[name]
    with torch.device("meta"):
        model = Llama(config)
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**to_hf(config)))
    assert sum(w.numel() for w in model.parameters()) == published[name]
    assert theirs.num_parameters() == published[name]
    shapes = {part: shape for parts in llama_files.layout(config).values() for part, shape in parts}
    assert shapes == {n: tuple(w.shape) for n, w in theirs.named_parameters()}
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize("name", ["llama", "llama_linear", "llama3_biases", "llama-3.1-8b", "llama-3.2-1b"])
def test_rotary_tables(name):
    """The frequencies are transformers' to the bit; a table's entry is the angle's cosine, rounded once."""
    config = dataclasses.replace(VARIANTS.get(name) or KNOWN[name], layers=1, vocabulary=8, hidden=8)
    with torch.device("meta"):
        form = transformers.AutoConfig.for_model(**to_hf(config))
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(form)
    assert torch.equal(frequencies(config), theirs.inv_freq)
    cos, sin = RotaryTables(config).on(torch.device("cpu"))
    assert cos.shape == sin.shape == (config.context, config.head_dim // 2)
    assert cos.dtype == torch.float32
    positions = torch.arange(config.context)
    expected = [t[0, :, : config.head_dim // 2] for t in theirs(cos, positions[None])]
    angle = (positions[:, None].float() * frequencies(config)).double()
    for ours, eager, exact in ((cos, expected[0], angle.cos()), (sin, expected[1], angle.sin())):
        assert (ours.double() - exact).abs().max() <= (eager.double() - exact).abs().max()
    short, _ = RotaryTables(dataclasses.replace(config, context=33)).on(torch.device("cpu"))
    assert torch.equal(short, cos[:33])


def test_tables_stay_float32():
    model = tiny().to(torch.bfloat16)
    model(tokens_of((1, 4)))
    assert model.tables.on(torch.device("cpu"))[0].dtype == torch.float32


# ---- beside its eager twin ----


def logits_and_gradients(model, backend):
    model = copy.deepcopy(model)
    text = tokens_of((2, 41))
    with gk.use_backend(backend):
        logits = model(text[:, :-1])
        model.loss(text[:, :-1], text[:, 1:]).backward()
    assert all(w.grad is not None for w in model.parameters())
    return {"logits": logits.detach()} | {n: w.grad for n, w in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama_one_kv_head", "llama3_biases", "qwen2_window", "qwen3"])
def test_logits_and_gradients_are_as_exact_as_eagers(name):
    model = tiny(VARIANTS[name])
    ours, eager = logits_and_gradients(model, "auto"), logits_and_gradients(model, "reference")
    exact = logits_and_gradients(model.double(), "reference")
    for name, ref in exact.items():
        error, eager_error = (float((t[name].double() - ref).square().mean().sqrt()) for t in (ours, eager))
        # TRUTH's kR of the backward of each op on the way; 0.3 u rms(ref) for rounding the result
        assert error <= 1.5 * eager_error + 0.3 * 2**-24 * float(ref.square().mean().sqrt()), name


def test_learns_a_pattern():
    torch.manual_seed(0)
    model = Llama(dataclasses.replace(TINY, vocabulary=7, layers=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = (torch.arange(33) % 7)[None]
    losses = []
    for _ in range(60):
        loss = model.loss(text[:, :-1], text[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


# ---- with a cache ----


@each_variant
def test_generation_with_a_cache_is_generation_without(name):
    model, prompt = tiny(VARIANTS[name]), tokens_of((2, 9))
    written = generate(model, prompt, 20)
    assert written.shape == (2, 20)
    assert torch.equal(generate(model, prompt, 20, cached=False), written)
    theirs = in_transformers(model).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(theirs[:, 9:], written)


def in_pieces(model, text, pieces):
    """Logits of `[batch, T]` with a cache, so many tokens at a time."""
    batch, cache = len(text), ContiguousCache(model, *text.shape)
    found = []
    for piece in text.split(pieces, dim=1):
        tokens = piece.shape[1]
        logits = model(piece.flatten(), cache.positions(tokens), cache)
        found.append(logits.unflatten(0, (batch, tokens)))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", ["llama3_biases", "mistral", "qwen2_window", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_bits_do_not_depend_on_batch_pieces_cache_or_threads(name, dtype):
    model = tiny(VARIANTS[name]).to(dtype)
    text = tokens_of((5, 24))
    expected = model(text)
    assert torch.equal(model(text[3:4])[0], expected[3])
    assert torch.equal(model(text[1:3, :9]), expected[1:3, :9])
    for pieces in ([24], [1] * 24, [9, 1, 1, 13]):
        assert torch.equal(in_pieces(model, text, pieces), expected), pieces
        assert torch.equal(in_pieces(model, text[2:3], pieces)[0], expected[2]), pieces
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(model(text), expected)
        assert torch.equal(in_pieces(model, text[2:3], [9, 1, 14])[0], expected[2])


@torch.inference_mode()
def test_logits_of_some_rows():
    model, text = tiny(), tokens_of((2, 8))
    rows = torch.tensor([15, 0, 7])
    assert torch.equal(model(text, logits_of=rows), model(text).flatten(0, 1)[rows])
    cache, again = ContiguousCache(model, 2, 8), ContiguousCache(model, 2, 8)
    some = model(text.flatten(), cache.positions(8), cache, logits_of=rows)
    assert torch.equal(some, model(text.flatten(), again.positions(8), again)[rows])


@torch.inference_mode()
def test_positions_move_a_text():
    """RoPE sees distances only; where the context ends, an error says so."""
    model, text = tiny().double(), tokens_of((1, 8))
    moved = model(text, torch.arange(40, 48, dtype=torch.int32))
    assert compare("moved", moved.float(), model(text).float(), model(text), 1.0, 1.0).error < 1e-4
    with pytest.raises(IndexError, match="positions"):
        model(text, torch.arange(121, 129))
    with pytest.raises(IndexError, match=r"expected at most 128 positions"):
        model(tokens_of((1, 129)))


def test_generation_ends():
    model, prompt = tiny(), tokens_of((3, 5))
    free = generate(model, prompt, 12)
    end = int(free[1, 3])
    model.config = dataclasses.replace(model.config, eos=end)
    stopped = generate(model, prompt, 12)
    for a, b in zip(free, stopped, strict=True):
        until = (a == end).nonzero().flatten().tolist()
        kept = until[0] + 1 if until else len(b)
        assert torch.equal(a[:kept][: len(b)], b[:kept])
        assert (b[kept:] == end).all()


def test_refuses_what_it_cannot_do():
    model = tiny()
    cache = ContiguousCache(model, 2, 6)
    for tokens, positions, use, message in (
        (tokens_of((8,)), None, None, r"expected \[batch, T\] without a cache, got shape \[8\]"),
        (tokens_of((2, 3)), torch.arange(3), cache, r"expected \[total_tokens\] with a cache, got shape \[2, 3\]"),
        (tokens_of((6,)), None, cache, r"positions: expected shape \[6\], one for each token, got None"),
        (tokens_of((6,)), torch.arange(3), cache, r"positions: expected shape \[6\], one for each token, got \[3\]"),
        (tokens_of((5,)), torch.arange(5), cache, r"expected a multiple of 2 tokens, got 5"),
        (tokens_of((14,)), torch.arange(14), cache, r"expected at most 6 tokens a sequence, got 7"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens, positions, use)
        assert cache.length == 0
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, torch.empty(1, 0, dtype=torch.int64), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5, "head_dim": 0}, "width: expected a multiple of heads = 5, got 64"),
        ({"kv_heads": 3}, "heads: expected a multiple of kv_heads = 3, got 4"),
        ({"head_dim": 15}, "head_dim: expected an even number"),
        ({"layers": 0}, "layers: expected more than 0, got 0"),
        ({"window": 0}, "window: expected more than 0 or None, got 0"),
        ({"family": "gpt2"}, "family: expected one of llama, mistral, qwen2, qwen3, got 'gpt2'"),
        ({"dtype": "int8"}, "dtype: expected one of float32"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
