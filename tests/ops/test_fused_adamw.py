"""fused_adamw_ and global_norm: PyTorch's update, the same bits in whatever call, nothing written on a refusal."""

import math

import pytest
import torch
from calls import same_bits

import genai_kernels as gk
from genai_kernels.accuracy import compare
from genai_kernels.ops.fused_adamw.samples import step
from genai_kernels.optim import AdamW
from genai_kernels.registry import FLOATS, Make

NAN, INF = float("nan"), float("inf")
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
SHAPES = [(300, 7), (41,), (), (40000,)]


def all_of(call):
    """Every tensor of a call, copied."""
    lists, options = call
    return [t.clone() for tensors in (*lists, options.get("masters", []), options.get("emas", [])) for t in tensors]


def trained(dtype, make, steps=12, max_norm=None):
    """Parameters after some steps of a torch optimizer, from the same gradients each."""
    m = Make(torch.float32, seed=4)
    params = [torch.nn.Parameter(m(*s).to(dtype)) for s in SHAPES]
    optimizer = make(params)
    for _ in range(steps):
        for p in params:
            p.grad = m(*p.shape, scale=0.3).to(dtype)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


@pytest.mark.parametrize("max_norm", [None, 0.7], ids=["", "clipped"])
@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.3},
                                     {"maximize": True}], ids=["", "other numbers", "maximize"])  # fmt: skip
def test_the_update_of_torch(options, max_norm):
    """As near to AdamW in float64 as PyTorch's own is."""
    ours = trained(torch.float32, lambda p: AdamW(p, max_norm=max_norm, **options))
    eager, exact = (trained(d, lambda p: torch.optim.AdamW(p, **options), max_norm=max_norm)
                    for d in (torch.float32, torch.float64))  # fmt: skip
    verdict = compare("parameters", ours, eager, exact, 1.0, 1.0)
    assert verdict.ok, verdict.complaint


@each_dtype
def test_whatever_the_threads(dtype):
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        lists, options = step(Make(dtype), SHAPES, max_norm=0.5, ema=True)
        found.append(gk.fused_adamw_(*lists, **options))
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


@each_dtype
def test_whatever_else_is_in_the_lists(dtype):
    """One call for all, and one for each, given the norm of all."""
    lists, options = step(Make(dtype), SHAPES, max_norm=0.5, master=True)
    options["grad_norm"] = gk.global_norm(lists[1])
    alone = [[[t.clone()] for t in tensors] for tensors in (*lists, options["masters"])]
    together = gk.fused_adamw_(*lists, **options)
    for p, g, m, v, master in zip(*alone, strict=True):
        gk.fused_adamw_(p, g, m, v, **{**options, "masters": master})
    one_by_one = [t for k in (0, 2, 3, 4) for (t,) in alone[k]]
    assert same_bits(together[:-1], one_by_one)


def test_gradients_are_not_changed():
    lists, options = step(Make(torch.float32), max_norm=0.1, maximize=True)
    before = [g.clone() for g in lists[1]]
    gk.fused_adamw_(*lists, **options)
    assert same_bits(lists[1], before)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_norm_that_is_not_finite(value):
    """What becomes NaN and what 0 is what clip_grad_norm_ and AdamW make of it."""
    lists, options = step(Make(torch.float32), [(5,), (3,)], max_norm=1.0, first=True)
    lists[1][0][2] = value
    leaves = [torch.nn.Parameter(p.clone()) for p in lists[0]]
    for p, g in zip(leaves, lists[1], strict=True):
        p.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, 1.0)
    torch.optim.AdamW(leaves).step()
    *_, ours = gk.fused_adamw_(*lists, **options)
    assert same_bits([ours.isnan(), ours.isinf()], [norm.isnan(), norm.isinf()])
    assert [p.isnan().tolist() for p in lists[0]] == [p.isnan().tolist() for p in leaves]


def test_small_steps_add_up_in_a_master():
    p, m, v = torch.ones(8, dtype=torch.bfloat16), torch.zeros(8), torch.zeros(8)
    plain, master = p.clone(), torch.ones(8)
    moments = [m.clone(), v.clone()]
    for i in range(1, 41):
        g = torch.ones_like(p)
        gk.fused_adamw_([p], [g], [m], [v], step=i, lr=1e-3, weight_decay=0.0, masters=[master])
        gk.fused_adamw_([plain], [g], *([t] for t in moments), step=i, lr=1e-3, weight_decay=0.0)
    assert plain.tolist() == [1.0] * 8
    assert same_bits(p, master.bfloat16())
    assert 0.95 < p[0] < 0.97


@each_dtype
def test_the_norm(dtype):
    """Within half a unit of the exact one, also where squares overflow the dtype; the same bits for every cut."""
    tensors = [Make(dtype)(50000, scale=300.0), Make(dtype, seed=1)(7)]
    exact = math.sqrt(math.fsum(x * x for t in tensors for x in t.double().tolist()))
    found = gk.global_norm(tensors)
    assert found.dtype == torch.float32
    assert found.item() == torch.tensor(exact).item()
    cut = [tensors[0][:16384], tensors[0][16384:49152], tensors[0][49152:], tensors[1]]
    assert same_bits(gk.global_norm(cut), found)
    assert gk.global_norm([]).item() == 0
    assert gk.global_norm([torch.tensor([3e38] * 4)]).item() == INF  # the norm itself is no float32


def changed(**change):
    def build():
        lists, options = step(Make(torch.float32), [(4, 3), (5,)], ema=True, max_norm=1.0)
        names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
        call = {**dict(zip(names, lists, strict=True)), **options}
        for name, f in change.items():
            call[name] = f(call)
        return call

    return build


def second(name, f):
    return {name: lambda c: [c[name][0], f(c[name][1])]}


REFUSED = {
    "too few": (changed(grads=lambda c: c["grads"][:1]), ValueError, "grads: expected 2 tensors, one for each"),
    "no emas": (changed(emas=lambda c: c["emas"][:1]), ValueError, "emas: expected 2 tensors"),
    "shape": (changed(**second("exp_avgs", lambda t: t[:4])), ValueError, r"exp_avgs\[1\]: expected the shape of"),
    "strides": (changed(grads=lambda c: [c["grads"][0].T.contiguous().T, c["grads"][1]]), ValueError,
                r"grads\[0\]: expected the strides of params\[0\]"),
    "moments": (changed(**second("exp_avg_sqs", torch.Tensor.bfloat16)), TypeError,
                r"exp_avg_sqs\[1\]: expected float32, got bfloat16"),
    "gradient": (changed(**second("grads", torch.Tensor.bfloat16)), TypeError,
                 r"grads\[1\]: expected float32 or the dtype of params\[1\], float32, got bfloat16"),
    "float64": (changed(**second("params", torch.Tensor.double)), TypeError, r"params\[1\]: expected float32, bfl"),
    "integers": (changed(**second("params", torch.Tensor.int)), TypeError, r"params\[1\]: expected float32"),
    "gaps": (changed(params=lambda c: [c["params"][0], torch.zeros(10)[::2]],
                     max_norm=lambda c: None, **{n: lambda c, n=n: [c[n][0], torch.zeros(10)[::2]]
                                                 for n in ("grads", "exp_avgs", "exp_avg_sqs", "emas")}), ValueError,
             r"params\[1\]: expected a tensor whose elements fill its memory"),
    "overlap": (changed(exp_avgs=lambda c: [c["exp_avgs"][0], c["params"][1]]), ValueError, "does not overlap"),
    "twice": (changed(params=lambda c: [c["params"][0], c["params"][0].flatten()[:5]]), ValueError, "does not overlap"),
    "not a list": (changed(params=lambda c: c["params"][0]), TypeError, "params: expected a list of tensors"),
    "not a tensor": (changed(grads=lambda c: [c["grads"][0], None]), TypeError, r"grads\[1\]: expected a tensor"),
    "step": (changed(step=lambda c: 0), ValueError, "step: expected an integer from 1 on, got 0"),
    "lr": (changed(lr=lambda c: -1e-3), ValueError, "lr: expected a finite number >= 0"),
    "betas": (changed(betas=lambda c: (0.9, 1.0)), ValueError, "betas: expected two numbers"),
    "eps": (changed(eps=lambda c: NAN), ValueError, "eps: expected a finite number"),
    "max_norm": (changed(max_norm=lambda c: NAN), ValueError, "max_norm: expected a number >= 0"),
    "norm alone": (changed(max_norm=lambda c: None, grad_norm=lambda c: torch.ones(())), ValueError, "grad_norm: exp"),
    "norm": (changed(grad_norm=lambda c: torch.ones(2)), ValueError, "grad_norm: expected one float32"),
    "decay": (changed(ema_decay=lambda c: 1.5), ValueError, "ema_decay: expected 0 <= decay <= 1"),
    "requires grad": (changed(**second("params", lambda t: t.requires_grad_())), NotImplementedError, "no gradient"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_change_nothing(name):
    build, kind, text = REFUSED[name]
    call = build()
    lists = [t for t in call.values() if isinstance(t, list)]
    before = [t.clone() for tensors in lists for t in tensors if isinstance(t, torch.Tensor)]
    with pytest.raises(kind, match=r"genai_kernels\.fused_adamw_: .*" + text):
        gk.fused_adamw_(**call)
    assert same_bits([t for tensors in lists for t in tensors if isinstance(t, torch.Tensor)], before)


def test_the_norm_refuses():
    with pytest.raises(
        ValueError, match=r"global_norm: tensors\[1\]: expected a tensor whose elements fill its memory"
    ):
        gk.global_norm([torch.ones(3), torch.ones(6)[::2]])
    with pytest.raises(
        TypeError, match=r"global_norm: tensors\[0\]: expected float32, bfloat16 or float16, got float64"
    ):
        gk.global_norm([torch.ones(3, dtype=torch.float64)])
