"""merge_attention_states beyond its samples: what is bit-exact, what is empty or infinite, strides, errors."""

import math
import re

import pytest
import torch

import genai_kernels as gk

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def states(*shape, dtype=torch.float32):
    """Two random states; lse in float32, or float64 for float64."""
    *batch, tokens, heads, _ = shape
    exact = torch.promote_types(dtype, torch.float32)
    return [
        t for _ in range(2) for t in (torch.randn(shape).to(dtype), torch.randn(*batch, heads, tokens, dtype=exact) * 3)
    ]


def bits(t):
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def gradients(call, d_o, dlse):
    call = [t.clone().requires_grad_() for t in call]
    o, lse = gk.merge_attention_states(*call)
    return torch.autograd.grad([o, lse], call, [d_o, dlse])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("empty", ["a", "b"])
def test_an_empty_side_leaves_the_bits_of_the_other(dtype, empty):
    o_a, lse_a, o_b, lse_b = states(2, 5, 3, 37, dtype=dtype)
    # a signalling NaN, a negative zero and an infinity must pass unchanged as well
    signalling = {2: 0x7F81 if dtype == torch.bfloat16 else 0x7C01, 4: 0x7F800001, 8: 0x7FF0000000000001}
    for o in (o_a, o_b):
        bits(o)[0, 0, 0, 0] = signalling[o.element_size()]
        o[0, 1, 0, :2] = torch.tensor([-0.0, INF])
    kept_o, kept_lse = (o_b, lse_b) if empty == "a" else (o_a, lse_a)
    (lse_a if empty == "a" else lse_b).fill_(-INF)
    (o_a if empty == "a" else o_b).fill_(NAN)
    kept_lse[0, 0, 0], kept_lse[0, 0, 1] = NAN, INF
    o, lse = gk.merge_attention_states(o_a, lse_a, o_b, lse_b)
    assert torch.equal(bits(o), bits(kept_o))
    assert torch.equal(bits(lse), bits(kept_lse))

    d_o, dlse = torch.randn_like(kept_o), torch.randn_like(kept_lse)
    d_o_a, dlse_a, d_o_b, dlse_b = gradients((o_a, lse_a, o_b, lse_b), d_o, dlse)
    if empty == "a":
        d_o_a, dlse_a, d_o_b, dlse_b = d_o_b, dlse_b, d_o_a, dlse_a
    assert torch.equal(bits(d_o_a), bits(d_o))
    assert torch.equal(bits(dlse_a), bits(dlse))
    assert not d_o_b.any()
    assert not dlse_b.any()


def test_both_empty():
    o_a, lse_a, o_b, lse_b = states(2, 4, 3, 8)
    lse_a[:], lse_b[:], o_a[:], o_b[:, 1] = -INF, -INF, NAN, INF
    o, lse = gk.merge_attention_states(o_a, lse_a, o_b, lse_b)
    assert torch.equal(bits(o), torch.zeros_like(bits(o)))
    assert (lse == -INF).all()
    for gradient in gradients((o_a, lse_a, o_b, lse_b), torch.randn_like(o), torch.randn_like(lse)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_infinite_lse_takes_all_the_weight_and_two_share():
    o_a, lse_a, o_b, lse_b = states(1, 2, 1, 8)
    lse_a[0, 0], lse_b[0, 0, 1] = INF, INF
    o, lse = gk.merge_attention_states(o_a, lse_a, o_b, lse_b)
    assert torch.equal(o[0, 0], o_a[0, 0])
    torch.testing.assert_close(o[0, 1], (o_a[0, 1] + o_b[0, 1]) / 2)
    assert (lse == INF).all()
    d_o, dlse = torch.randn_like(o), torch.randn_like(lse)
    d_o_a, dlse_a, d_o_b, dlse_b = gradients((o_a, lse_a, o_b, lse_b), d_o, dlse)
    torch.testing.assert_close(d_o_a[0, :, 0], d_o[0, :, 0] * torch.tensor([[1.0], [0.5]]))
    torch.testing.assert_close(d_o_b[0, :, 0], d_o[0, :, 0] * torch.tensor([[0.0], [0.5]]))
    torch.testing.assert_close(dlse_a[0, 0], dlse[0, 0] * torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(dlse_b[0, 0], dlse[0, 0] * torch.tensor([0.0, 0.5]))


def test_nan_stays_in_its_row():
    o_a, lse_a, o_b, lse_b = states(2, 4, 3, 8)
    expected = gk.merge_attention_states(o_a, lse_a, o_b, lse_b)
    o_a[0, 1, 2, 3], lse_b[1, 0, 2] = NAN, NAN
    o, lse = gk.merge_attention_states(o_a, lse_a, o_b, lse_b)
    wrong = torch.zeros_like(o, dtype=torch.bool)
    wrong[0, 1, 2, 3], wrong[1, 2, 0] = True, True
    assert torch.equal(o.isnan(), wrong)
    assert torch.equal(o[~wrong], expected[0][~wrong])
    assert int(lse.isnan().sum()) == 1
    assert lse[1, 0, 2].isnan()


def attend(q, k, v):
    """o and lse of dense attention, [batch, tokens, heads, dim], written out."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), scores.logsumexp(-1)


def test_parts_of_the_keys_make_the_whole_with_its_gradients():
    q, k, v = (torch.randn(2, n, 3, 16, dtype=torch.float64, requires_grad=True) for n in (7, 20, 20))
    whole = attend(q, k, v)
    state = attend(q, k[:, :4], v[:, :4])
    for part in (slice(4, 5), slice(5, 20)):
        state = gk.merge_attention_states(*state, *attend(q, k[:, part], v[:, part]))
    cotangents = [torch.randn_like(t) for t in whole]
    torch.testing.assert_close(state, whole)
    torch.testing.assert_close(
        torch.autograd.grad(state, [q, k, v], cotangents), torch.autograd.grad(whole, [q, k, v], cotangents)
    )


@pytest.mark.parametrize("which", ["o", "lse"])
def test_only_one_output_is_used(which):
    call = [t.requires_grad_() for t in states(2, 3, 2, 8, dtype=torch.float64)]
    ours = gk.merge_attention_states(*call)[which == "lse"].square().sum()
    with gk.use_backend("reference"):
        reference = gk.merge_attention_states(*call)[which == "lse"].square().sum()
    found, expected = torch.autograd.grad(ours, call), torch.autograd.grad(reference, call, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_threads_and_neighbours_change_no_bit():
    call = states(3, 400, 4, 24)
    call[1][:, :, ::7] = -INF
    d_o, dlse = torch.randn_like(call[0]), torch.randn_like(call[1])
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append([*gk.merge_attention_states(*call), *gradients(call, d_o, dlse)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = gk.merge_attention_states(*(t[1:2].clone() for t in call))
    assert torch.equal(alone[0], results[0][0][1:2])
    assert torch.equal(alone[1], results[0][1][1:2])


def scattered(t):
    """The same values with every dimension strided and NaN between them."""
    room = t.new_full([3 * n for n in t.shape], NAN)
    return room[tuple(slice(1, None, 3) for _ in t.shape)].copy_(t)


def test_strides_change_no_bit():
    call = states(2, 6, 3, 20)
    d_o, dlse = torch.randn_like(call[0]), torch.randn_like(call[1])
    expected = [*gk.merge_attention_states(*call), *gradients(call, d_o, dlse)]
    leaves = [scattered(t).requires_grad_() for t in call]
    outputs = gk.merge_attention_states(*leaves)
    found = [*outputs, *torch.autograd.grad(outputs, leaves, [scattered(d_o), scattered(dlse)])]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_expanded_gradient():
    call = [t.requires_grad_() for t in states(2, 3, 2, 8)]
    o, lse = gk.merge_attention_states(*call)
    found = torch.autograd.grad(o.sum() + lse.sum(), call)
    expected = gradients([t.detach() for t in call], torch.ones_like(o), torch.ones_like(lse))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_opcheck():
    call = [t.requires_grad_() for t in states(2, 3, 2, 8)]
    torch.library.opcheck(torch.ops.genai_kernels.merge_attention_states, call)
    plain, d_o = [t.detach() for t in call], torch.randn(2, 3, 2, 8)
    for dlse in (None, torch.randn(2, 2, 3)):
        torch.library.opcheck(torch.ops.genai_kernels.merge_attention_states_bwd, (d_o, dlse, *plain))


def test_compiled():
    call = [t.requires_grad_() for t in states(2, 3, 2, 8)]
    compiled = torch.compile(gk.merge_attention_states, fullgraph=True, backend="aot_eager")
    ours, expected = compiled(*call), gk.merge_attention_states(*call)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    cotangents = [torch.randn_like(t) for t in expected]
    found, wanted = (torch.autograd.grad(outputs, call, cotangents) for outputs in (ours, expected))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_double_backward_says_what_to_do():
    call = [t.requires_grad_() for t in states(1, 2, 1, 4)]
    o, _ = gk.merge_attention_states(*call)
    (first,) = torch.autograd.grad(o.sum(), call[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="merge_attention_states: double backward"):
        first.sum().backward()


def wrong(index, change):
    call = states(2, 5, 3, 8)
    call[index] = change(call[index])
    return call


ERRORS = [
    (ValueError, "o_a: expected [batch, tokens, heads, dim]", lambda: wrong(0, lambda t: t[0, 0])),
    (ValueError, "o_b: expected the shape of o_a, [2, 5, 3, 8], got [2, 4, 3, 8]",
     lambda: wrong(2, lambda t: t[:, 1:])),
    (ValueError, "lse_a: expected shape [batch, heads, tokens] = [2, 3, 5], got [2, 5, 3]",
     lambda: wrong(1, lambda t: t.mT)),
    (ValueError, "lse_b: expected shape [batch, heads, tokens]", lambda: wrong(3, lambda t: t[0])),
    (ValueError, "lse_a: expected shape [heads, tokens] = [2, 4], got [4, 2]",
     lambda: [t.mT if i == 1 else t for i, t in enumerate(states(4, 2, 8))]),
    (TypeError, "o_a: expected float32, bfloat16, float16 or float64, got int32", lambda: wrong(0, lambda t: t.int())),
    (TypeError, "o_b: expected the dtype of o_a, float32, got bfloat16", lambda: wrong(2, lambda t: t.bfloat16())),
    (TypeError, "lse_b: expected float32 where o is float32, got bfloat16", lambda: wrong(3, lambda t: t.bfloat16())),
    (TypeError, "lse_a: expected float64 where o is float64, got float32",
     lambda: [t.double() if i != 1 else t for i, t in enumerate(states(1, 2, 1, 4))]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "call"), ERRORS, ids=[f"{e[0].__name__}-{i}" for i, e in enumerate(ERRORS)])
def test_errors(kind, text, call):
    with pytest.raises(kind, match=re.escape(f"genai_kernels.merge_attention_states: {text}")):
        gk.merge_attention_states(*call())
