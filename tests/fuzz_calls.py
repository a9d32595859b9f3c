"""Random calls of every op through the dispatcher: shapes, strides, options, dtypes, against float64 (hypothesis).

A case is a few numbers; every tensor follows from its seed, so that what hypothesis prints replays the call.
"""

import torch
from calls import run
from hypothesis import strategies as st

from genai_kernels import StepCoefficients
from genai_kernels.accuracy import UNIT_ROUNDOFF, map_tensors
from genai_kernels.registry import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "offset")


class Tensors:
    """Random tensors in random layouts."""

    def __init__(self, seed, dtype):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def integer(self, high):
        return int(torch.randint(high, (), generator=self.generator))

    def __call__(self, *shape, dtype=None):
        values = torch.randn(shape, generator=self.generator).to(dtype or self.dtype)
        layout = LAYOUTS[self.integer(len(LAYOUTS))]
        if layout == "transposed" and len(shape) > 1:
            return values.transpose(-2, 0).contiguous().transpose(-2, 0)
        if layout in ("sliced", "strided") and values.dim():
            step = 2 if layout == "strided" else 1
            holder = torch.full((*shape[:-1], shape[-1] * step + 3), torch.nan, dtype=values.dtype)
            view = holder[..., 1 : 1 + shape[-1] * step : step]
            return view.copy_(values)
        if layout == "offset":
            holder = torch.full((values.numel() + 1,), torch.nan, dtype=values.dtype)
            return holder[1:].view(shape).copy_(values)
        return values


@st.composite
def attention(draw):
    dtype = draw(st.sampled_from(DTYPES))
    make = Tensors(draw(st.integers(0, 2**32)), dtype)
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(0, 150)), draw(st.integers(0, 200))
    d, dv = draw(st.integers(1, 80)), draw(st.integers(1, 80))
    heads = kv_heads * group
    options = {
        "causal": draw(st.booleans()),
        "window_size": (draw(st.integers(-1, 100)), draw(st.integers(-1, 100))),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.5])),
        "return_lse": True,
    }
    broadcast = draw(st.tuples(*[st.booleans()] * 4))
    shape = [1 if b else n for b, n in zip(broadcast, (batch, heads, queries, keys), strict=True)]
    if draw(st.booleans()):
        options["attn_bias"] = make(*shape).requires_grad_()
    if draw(st.booleans()):
        options["attn_mask"] = torch.rand(shape, generator=make.generator) < 0.7
    if draw(st.booleans()):
        options["sink"] = torch.randn(heads, generator=make.generator).requires_grad_()
    if draw(st.integers(0, 3)) == 0:
        options.update(dropout_p=0.25, seed=draw(st.integers(0, 2**40)), offset=draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        options["alibi_slopes"] = torch.rand(heads, generator=make.generator)
    args = make(batch, queries, heads, d), make(batch, keys, kv_heads, d), make(batch, keys, kv_heads, dv)
    return "flash_attention", tuple(t.requires_grad_() for t in args), options


@st.composite
def packed(draw):
    dtype = draw(st.sampled_from(DTYPES))
    make = Tensors(draw(st.integers(0, 2**32)), dtype)
    lengths = draw(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 90)), min_size=1, max_size=4))
    cu = [torch.tensor([0, *part]).cumsum(0).int() for part in zip(*lengths, strict=True)]
    tail, kv_heads, group, d = (
        draw(st.integers(0, 4)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 70)),
    )
    args = (
        make(int(cu[0][-1]) + tail, kv_heads * group, d),
        make(int(cu[1][-1]), kv_heads, d),
        make(int(cu[1][-1]), kv_heads, d),
    )
    options = {"causal": draw(st.booleans()), "window_size": (draw(st.integers(-1, 60)), draw(st.integers(-1, 60)))}
    return "flash_attention_varlen", (*(t.requires_grad_() for t in args), *cu), {**options, "return_lse": True}


@st.composite
def rows(draw):
    dtype = draw(st.sampled_from(DTYPES))
    make = Tensors(draw(st.integers(0, 2**32)), dtype)
    shape = draw(st.lists(st.integers(0, 7), min_size=0, max_size=3))
    n = draw(st.integers(1, 400))
    name = draw(st.sampled_from(["rms_norm", "fused_add_rms_norm", "layer_norm", "silu_and_mul", "gelu_and_mul",
                                 "gelu_tanh_and_mul", "rotary_embedding", "merge_attention_states"]))  # fmt: skip
    x, w = make(*shape, 2 * n), make(2 * n)
    options = {}
    if name == "fused_add_rms_norm":
        args = (x, make(*shape, 2 * n), w)
    elif name == "layer_norm":
        args = (x, w, make(2 * n))
        if draw(st.booleans()):
            options["residual"] = make(*shape, 2 * n).requires_grad_()
    elif name == "rms_norm":
        args = (x, w)
    elif name == "rotary_embedding":
        tokens, half = draw(st.integers(1, 20)), draw(st.integers(1, n))
        angle = torch.randn(tokens, half, generator=make.generator)
        x = make(draw(st.integers(1, 3)), tokens, draw(st.integers(1, 3)), 2 * n)
        options["interleaved"] = draw(st.booleans())
        return name, (x.requires_grad_(), angle.cos(), angle.sin()), options
    elif name == "merge_attention_states":
        tokens, heads = draw(st.integers(0, 20)), draw(st.integers(1, 3))
        state = [(make(tokens, heads, n), make(heads, tokens, dtype=torch.float32)) for _ in range(2)]
        args = (*state[0], *state[1])
    else:
        args = (x,)
    return name, tuple(t.requires_grad_() for t in args), options


@st.composite
def steps(draw):
    dtype = draw(st.sampled_from(DTYPES))
    make = Tensors(draw(st.integers(0, 2**32)), dtype)
    batch, channels = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    shape = (batch, channels, *draw(st.lists(st.integers(1, 12), max_size=2)))
    seeds = torch.randint(-(2**62), 2**62, (batch,), generator=make.generator)
    if draw(st.booleans()):
        options = {"seed": seeds} if draw(st.booleans()) else {"noise": make(*shape).requires_grad_()}
        return "gaussian_sample_kl", (make(*shape).requires_grad_(), make(*shape).requires_grad_()), options
    numbers = draw(st.lists(st.sampled_from([0.0, 0.0, 0.7, -0.4, 1.0]), min_size=7, max_size=7))
    step = StepCoefficients(1.2, *numbers[:1], draw(st.sampled_from([0.5, float("inf")])), *numbers[1:6],
                            known=0.8, known_noise=numbers[6])  # fmt: skip
    options = {"seed": seeds, "offset": draw(st.integers(0, 2**32 - 1)), "return_x0": draw(st.booleans())}
    if draw(st.booleans()):
        rescale = draw(st.sampled_from([0.0, 0.7])) if shape[1:] != (1,) * (len(shape) - 1) else 0.0
        options |= {"uncond": make(*shape), "guidance_scale": 3.0, "guidance_rescale": rescale}
    if numbers[4] or draw(st.booleans()):
        options["previous_x0"] = make(*shape)
    for name in ("noise", "known_noise"):
        if draw(st.booleans()):
            options[name] = make(*shape)
    if draw(st.booleans()):
        mask = make(*[1 if draw(st.booleans()) else size for size in shape])
        mask = mask > 0 if draw(st.booleans()) else mask.float().clamp(0, 1).to(dtype)
        options |= {"known": make(*shape), "mask": mask}
    else:
        options.pop("known_noise", None)
    return "cfg_step", (make(*shape), make(*shape), step), options


def check(case):
    """Ours against float64: no worse than eager by more than a few roundings, NaN and infinity in the same places.

    One small call is not the draws that the accuracy rule's factors are for: 4 takes the place of 1 and 1.5.
    """
    name, args, kwargs = case
    op = OPS[name]

    def exact(t):
        return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

    given = args, kwargs
    ours, eager = run(op.function, given), run(op.reference, given)
    ref = run(op.reference, map_tensors(exact, given))
    assert len(ours) == len(eager) == len(ref)
    leaves = []
    map_tensors(lambda t: leaves.append(t) if t.requires_grad else None, given)
    for i, (o, e, r) in enumerate(zip(ours, eager, ref, strict=True)):
        where = f"{name}, result {i}"
        assert o.shape == r.shape, where
        assert o.dtype == e.dtype, where
        u = UNIT_ROUNDOFF[o.dtype]
        if i >= len(ours) - len(leaves) and o.dtype == torch.float32:
            u = max(u, UNIT_ROUNDOFF[ours[0].dtype] / 4)  # as of a sink: `out`, as it was rounded, is a factor
        o, e, r = o.double(), e.double(), r.double()
        assert torch.equal(o.isnan(), r.isnan()), where
        finite = o.isfinite() & r.isfinite() & e.isfinite()
        assert torch.equal(o[~finite & e.isinf() & r.isinf()], r[~finite & e.isinf() & r.isinf()]), where
        if finite.any():
            error, eager_error = (o - r)[finite].abs().max(), (e - r)[finite].abs().max()
            limit = 4 * eager_error + 4 * u * r[finite].abs().max() + 1e-6 * (u > 1e-4) + 1e-6
            assert error <= limit, f"{where}: error {error:.3e}, eager {eager_error:.3e}"


GROUPS = {"attention": attention(), "packed": packed(), "rows": rows(), "steps": steps()}
