"""sample: the next token of each request from its logits; see README.md for why it is exact without a sort."""

from __future__ import annotations

from typing import Any

import torch

from ...registry import op
from ...torch_ops import fake, kernel
from . import samples
from .reference import sample_reference

__all__ = ["sample"]

_sample = kernel("sample")
_sample_logprobs = kernel("sample_logprobs")


def _number(name: str, value: Any, whole: bool) -> tuple[torch.Tensor | None, Any]:
    """A parameter as the torch op takes it: a tensor, or a number beside None."""
    if isinstance(value, torch.Tensor):
        return value, 0
    try:
        if not whole:
            return None, float(value)
        if value == int(value) and -(2**63) <= int(value) < 2**63:
            return None, int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    kind = "an int64" if whole else "a number"
    raise TypeError(f"genai_kernels.sample: {name}: expected {kind} or a tensor [batch], got {value!r}")


@op(
    reference=sample_reference,
    samples=samples.SAMPLES,
    exact=True,
    differentiable=False,
    gpu=("triton",),
    overloads=("sample", "sample_logprobs"),
    peers=samples.PEERS,
)
def sample(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    repetition_penalty: float | torch.Tensor = 1.0,
    previous_tokens: torch.Tensor | None = None,
    previous_lens: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor = 0,
    return_logprobs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws the next token of each request from its logits.

    A request's token follows from its logits, its parameters, its seed and its offset alone: not from the other rows,
    its place among them, the threads or the instruction set. It is the one that a sort of the vocabulary and exact sums
    would give; nothing is sorted.

    Every parameter from `temperature` to `repetition_penalty`, `seed` and `offset` is a number for all requests or a
    tensor `[batch]`. They apply in this order, as in Hugging Face's `generate`:

    1. `repetition_penalty`: a logit of a token in `previous_tokens` is divided by it where positive, multiplied where
       negative, once however often the token occurs;
    2. `temperature`: probabilities are in proportion to `exp(logit / temperature)`;
    3. `top_k`: the k largest logits are kept;
    4. `top_p`: of these, each whose probability mass before it, from the largest logit down, is less than p: the fewest
       that together reach p;
    5. `min_p`: of these, each with at least `min_p` times the probability of the largest.

    Of equal logits the one with the lower index comes first, in 3, in 4 and in the choice at temperature 0. The largest
    logit is always kept. A logit of -inf, and one 41 halvings of probability below the largest, is never drawn.

    Args:
        logits: `[batch, vocabulary]`, float32, bfloat16 or float16, any strides; at most 2^22 tokens.
        temperature: 0 or more; 0 takes the largest logit, whatever top_k, top_p, min_p and the seed are.
        top_k: 0 or -1 for no limit.
        top_p, min_p: 0 to 1. A float32 tensor holds other numbers than Python does: 0.9 is 0.89999998.
        repetition_penalty: above 0; 1 for none. Others than 1 need `previous_tokens`.
        previous_tokens: int32 or int64 `[batch, tokens]`: the prompt and what was generated.
        previous_lens: int32 or int64 `[batch]`: how many of `previous_tokens` count; default all. The rest, padding, is
            not looked at.
        seed: of each request; any int64. None draws one for each from PyTorch's generator.
        offset: of this draw of the request, such as the position of the token; any int64. A request must not use one
            twice. A batch of several rows needs a tensor for the seed or for the offset: with the same two numbers, all
            rows would draw alike.
        return_logprobs: also return logarithms of probabilities, natural.

    Returns:
        int64 `[batch]`; with `return_logprobs` also float32 `[batch]`: the token's log-probability in
        `softmax(logits)`, before any of the above (what OpenAI's API reports), and in the distribution it was drawn
        from (0 at temperature 0).

    Raises:
        ValueError: parameters out of range; a row with NaN or +inf, or with nothing but -inf.
        IndexError: a token of `previous_tokens` that is not in the vocabulary.
        TypeError: dtypes that do not fit.
        On a GPU nothing waits for what tensors hold: parameters in tensors are not looked at, previous tokens that are
        not in the vocabulary are skipped, and a row that no token can be drawn from has the token -1 and NaN.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019 (top-p); Nguyen et al., "Turning Up
    the Heat: Min-p Sampling", 2024; Keskar et al., "CTRL", 2019 (repetition penalty); Salmon et al., "Parallel Random
    Numbers: As Easy as 1, 2, 3", 2011 (Philox). The draw inverts the distribution function.

    >>> import torch, genai_kernels as gk
    >>> logits = torch.tensor([[1.0, 3.0, 2.0, -1.0], [0.0, 0.0, 0.0, 5.0]])
    >>> gk.sample(logits, temperature=0)
    tensor([1, 3])
    >>> gk.sample(logits, top_k=2, top_p=0.95, seed=torch.tensor([7, 8]), offset=0)
    tensor([1, 3])
    """
    if seed is None:
        greedy = not isinstance(temperature, torch.Tensor) and temperature == 0
        seed = 0 if greedy else torch.randint(2**63 - 1, logits.shape[:1])
    run = _sample_logprobs if return_logprobs else _sample
    return run(
        logits, previous_tokens, previous_lens,
        *_number("temperature", temperature, False), *_number("top_k", top_k, True), *_number("top_p", top_p, False),
        *_number("min_p", min_p, False), *_number("repetition_penalty", repetition_penalty, False),
        *_number("seed", seed, True), *_number("offset", offset, True),
    )  # fmt: skip


@fake("sample")
def _(logits, *_):
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


@fake("sample_logprobs")
def _(logits, *_):
    tokens = logits.new_empty(logits.shape[:1], dtype=torch.int64)
    return tokens, *(logits.new_empty(tokens.shape, dtype=torch.float32) for _ in range(2))
