"""What shape a Llama has: `Config`, the field's `config.json` in both its forms, and the shapes of known models.

One class serves four families of the Hugging Face layout, which differ in little:

| model_type | beside RMSNorm, RoPE, GQA and SwiGLU |
|---|---|
| llama | `attention_bias` on all four projections, `mlp_bias` |
| mistral | a sliding window in every layer |
| qwen2 | biases of q, k and v; a window from layer `max_window_layers` on, if `use_sliding_window` |
| qwen3 | RMSNorm of each head's queries and keys; otherwise as qwen2, `attention_bias` as in llama |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SCALINGS = ("default", "linear", "llama3")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are stretched for texts longer than those of the pre-training.

    `linear`: all by `factor` (Chen et al., "Extending context window of large language models via positional
    interpolation", 2023). `llama3`: those whose wave is longer than `original_context / low` by `factor`, those whose
    wave is shorter than `original_context / high` not at all, with a blend between (Llama 3.1).
    """

    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class Config:
    """The sizes of a model. The names are this repository's; `from_hf` and `to_hf` translate.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    vocabulary: int
    layers: int
    width: int
    heads: int
    kv_heads: int  # each serves heads / kv_heads query heads
    hidden: int  # of the gated MLP
    head_dim: int = 0  # 0: width / heads
    context: int = 2048  # positions that there are, and so rows of RoPE's tables
    rope_theta: float = 10000.0
    rope: RopeScaling = RopeScaling()
    eps: float = 1e-6
    tied: bool = False  # the head is the embedding
    window: int | None = None  # a token sees itself and the window - 1 before it; None: all of them
    window_from: int = 0  # the first layer with the window
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's last projection
    mlp_bias: bool = False
    qk_norm: bool = False
    family: str = "llama"
    bos: int | None = None
    eos: int | tuple[int, ...] | None = None
    dtype: str = "float32"  # of the weights in the files

    def __post_init__(self) -> None:
        if not self.head_dim:
            _require(self.width % self.heads == 0, f"width: expected a multiple of heads = {self.heads}", self.width)
            object.__setattr__(self, "head_dim", self.width // self.heads)
        for name in ("vocabulary", "layers", "width", "heads", "kv_heads", "hidden", "head_dim", "context"):
            _require(getattr(self, name) > 0, f"{name}: expected more than 0", getattr(self, name))
        _require(
            self.heads % self.kv_heads == 0, f"heads: expected a multiple of kv_heads = {self.kv_heads}", self.heads
        )
        _require(self.head_dim % 2 == 0, "head_dim: expected an even number, for RoPE's pairs", self.head_dim)
        _require(self.window is None or self.window > 0, "window: expected more than 0 or None", self.window)
        _require(self.rope.kind in SCALINGS, f"rope.kind: expected one of {', '.join(SCALINGS)}", self.rope.kind)
        _require(self.family in FAMILIES, f"family: expected one of {', '.join(FAMILIES)}", self.family)
        _require(self.dtype in DTYPES, f"dtype: expected one of {', '.join(DTYPES)}", self.dtype)

    def window_size(self, layer: int) -> tuple[int, int]:
        """`window_size` of flash_attention in a layer: inclusive, -1 for no limit."""
        if self.window is None or layer < self.window_from:
            return -1, 0
        return self.window - 1, 0

    @property
    def ends(self) -> frozenset[int]:
        """The tokens after which a text is over."""
        return frozenset(() if self.eos is None else (self.eos,) if isinstance(self.eos, int) else self.eos)


def _require(fits: bool, expected: str, got: object) -> None:
    if not fits:
        raise ValueError(f"llama.Config: {expected}, got {got!r}")


# ---- config.json ----


def from_hf(found: Mapping[str, Any]) -> Config:
    """A `config.json` of the Hugging Face layout: the form of transformers 5 (`rope_parameters`, `dtype`) or the older
    one (`rope_theta`, `rope_scaling`, `torch_dtype`).

    Raises:
        ValueError: another architecture, a scaling or an activation that is not here, a missing size; says which are.
    """
    family = found.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"config.json: model_type: expected one of {', '.join(FAMILIES)}, got {family!r}; "
            "another architecture needs its own model beside python_models/llama.py"
        )
    sizes = {
        ours: _size(found, theirs)
        for ours, theirs in (
            ("vocabulary", "vocab_size"), ("layers", "num_hidden_layers"), ("width", "hidden_size"),
            ("heads", "num_attention_heads"), ("hidden", "intermediate_size"),
        )
    }  # fmt: skip
    activation = found.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"config.json: hidden_act: expected 'silu', got {activation!r}: this MLP is silu(gate) * up")
    theta, scaling = _rope(found)
    window, window_from = _window(found, family, sizes["layers"])
    biased = bool(found.get("attention_bias", False))
    eos = found.get("eos_token_id")
    dtype = str(found.get("dtype") or found.get("torch_dtype") or "float32").removeprefix("torch.")
    return Config(
        **sizes,
        kv_heads=found.get("num_key_value_heads") or sizes["heads"],
        head_dim=found.get("head_dim") or (128 if family == "qwen3" else 0),
        context=found.get("max_position_embeddings", 2048),
        rope_theta=theta,
        rope=scaling,
        eps=found.get("rms_norm_eps", 1e-6),
        tied=bool(found.get("tie_word_embeddings", False)),
        window=window,
        window_from=window_from,
        qkv_bias=family == "qwen2" or (biased and family != "mistral"),
        out_bias=biased and family in ("llama", "qwen3"),
        mlp_bias=bool(found.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        family=family,
        bos=found.get("bos_token_id"),
        eos=tuple(eos) if isinstance(eos, list) else eos,
        dtype=dtype,
    )


def _size(found: Mapping[str, Any], name: str) -> int:
    value = found.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"config.json: {name}: expected a whole number above 0, got {value!r}")
    return value


def _rope(found: Mapping[str, Any]) -> tuple[float, RopeScaling]:
    given = {**(found.get("rope_scaling") or {}), **(found.get("rope_parameters") or {})}
    theta = given.get("rope_theta", found.get("rope_theta", 10000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in SCALINGS:
        raise ValueError(
            f"config.json: rope_type: expected one of {', '.join(SCALINGS)}, got {kind!r}; "
            "python_models/llama_rope.py is where another scaling belongs"
        )
    if given.get("partial_rotary_factor", found.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json: partial_rotary_factor: expected 1, all of a head is rotated here")
    wanted: dict[str, str] = {
        "default": {},
        "linear": {"factor": "factor"},
        "llama3": {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor"},
    }[kind]
    missing = [theirs for theirs in wanted.values() if theirs not in given]
    if missing:
        raise ValueError(f"config.json: rope_type {kind!r}: expected {', '.join(missing)} beside it, got {given}")
    sizes: dict[str, Any] = {ours: float(given[theirs]) for ours, theirs in wanted.items()}
    scaling = RopeScaling(kind, **sizes)
    if kind == "llama3":
        before = given.get("original_max_position_embeddings") or found.get("max_position_embeddings", 2048)
        scaling = dataclasses.replace(scaling, original_context=int(before))
    return float(theta), scaling


def _window(found: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, int]:
    window = found.get("sliding_window", 4096 if family == "mistral" else None)
    if family == "mistral":
        return window, 0
    if family == "llama" or not found.get("use_sliding_window", False) or window is None:
        return None, 0
    kinds = found.get("layer_types")
    if not kinds:
        return window, min(found.get("max_window_layers", 28), layers)
    start = sum(kind == "full_attention" for kind in kinds)
    if kinds != ["full_attention"] * start + ["sliding_attention"] * (layers - start):
        raise ValueError(f"config.json: layer_types: expected full_attention, then sliding_attention, got {kinds}")
    return window, start


def to_hf(config: Config) -> dict[str, Any]:
    """The `config.json` of a model, in the form of transformers 5 with the older names of RoPE and dtype beside it.

    Raises:
        ValueError: the family has no name for something that the config asks for.
    """
    family = config.family
    speakable = {
        "qkv_bias": family == "qwen2" or (family in ("llama", "qwen3") and config.qkv_bias == config.out_bias),
        "out_bias": family in ("llama", "qwen3"),
        "mlp_bias": family == "llama",
        "qk_norm": family == "qwen3",
        "window": family != "llama",
    }
    for name, can in speakable.items():
        if getattr(config, name) and not can:
            raise ValueError(f"llama.Config: {name}: expected none: config.json of {family!r} cannot say it")
    for name, expected in (("qkv_bias", family == "qwen2"), ("qk_norm", family == "qwen3")):
        if expected and not getattr(config, name):
            raise ValueError(f"llama.Config: {name}: expected True, as in every {family!r}")
    rope: dict[str, Any] = {"rope_type": config.rope.kind, "rope_theta": config.rope_theta}
    if config.rope.kind != "default":
        rope["factor"] = config.rope.factor
    if config.rope.kind == "llama3":
        rope |= {"low_freq_factor": config.rope.low, "high_freq_factor": config.rope.high}
        rope["original_max_position_embeddings"] = config.rope.original_context
    written: dict[str, Any] = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": config.vocabulary,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.eps,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope.kind == "default" else {k: v for k, v in rope.items() if k != "rope_theta"},
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos,
        "eos_token_id": list(config.eos) if isinstance(config.eos, tuple) else config.eos,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
    }
    if family == "llama":
        written |= {"attention_bias": config.out_bias, "mlp_bias": config.mlp_bias}
    if family == "mistral":
        written["sliding_window"] = config.window
    if family in ("qwen2", "qwen3"):
        written |= {"use_sliding_window": config.window is not None, "sliding_window": config.window}
        written["max_window_layers"] = config.window_from if config.window is not None else config.layers
    if family == "qwen3":
        written["attention_bias"] = config.out_bias
    return written


# ---- known shapes ----

_LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
_LLAMA32 = dataclasses.replace(_LLAMA3, factor=32.0)
_QWEN: dict[str, Any] = {"family": "qwen2", "qkv_bias": True, "rope_theta": 1e6, "context": 32768}
# As published in each model's config.json. vocabulary, layers, width, heads, kv_heads, hidden
KNOWN = {
    "llama-2-7b": Config(32000, 32, 4096, 32, 32, 11008, context=4096, eps=1e-5),
    "llama-2-13b": Config(32000, 40, 5120, 40, 40, 13824, context=4096, eps=1e-5),
    "llama-2-70b": Config(32000, 80, 8192, 64, 8, 28672, context=4096, eps=1e-5),
    "llama-3-8b": Config(128256, 32, 4096, 32, 8, 14336, context=8192, rope_theta=5e5, eps=1e-5),
    "llama-3-70b": Config(128256, 80, 8192, 64, 8, 28672, context=8192, rope_theta=5e5, eps=1e-5),
    "llama-3.1-8b": Config(128256, 32, 4096, 32, 8, 14336, context=131072, rope_theta=5e5, rope=_LLAMA3, eps=1e-5),
    "llama-3.2-1b": Config(
        128256, 16, 2048, 32, 8, 8192, context=131072, rope_theta=5e5, rope=_LLAMA32, eps=1e-5, tied=True
    ),
    "llama-3.2-3b": Config(
        128256, 28, 3072, 24, 8, 8192, context=131072, rope_theta=5e5, rope=_LLAMA32, eps=1e-5, tied=True
    ),
    "tinyllama-1.1b": Config(32000, 22, 2048, 32, 4, 5632, eps=1e-5),
    "mistral-7b": Config(32000, 32, 4096, 32, 8, 14336, context=32768, eps=1e-5, window=4096, family="mistral"),
    "qwen2.5-0.5b": Config(151936, 24, 896, 14, 2, 4864, tied=True, **_QWEN),
    "qwen2.5-7b": Config(152064, 28, 3584, 28, 4, 18944, **{**_QWEN, "context": 131072}),
}
