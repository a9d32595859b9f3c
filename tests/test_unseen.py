"""NaN and infinity: where no query sees them they change no bit; where one does they reach its row and no other."""

import pytest
import torch
from calls import same_bits

import genai_kernels as gk

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def attend(q, k, v, dout, dlse, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = gk.flash_attention(*leaves, return_lse=True, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, [dout, dlse])]


def case(dtype, queries=50, keys=150):
    q, dout = (torch.randn(1, queries, 4, 24).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, keys, 2, 24).to(dtype) for _ in range(2))
    return q, k, v, dout, torch.randn(1, 4, queries)


HIDDEN = {  # name: (queries, keys, which keys nobody sees, options)
    "window": (50, 150, slice(0, 83), {"window_size": (17, 0)}),
    "padding": (50, 150, slice(123, 150), {}),
    "holes": (50, 150, slice(3, 150, 7), {}),
}


def hidden_case(name, kind):
    queries, keys, where, options = HIDDEN[name]
    if kind == "window":
        return queries, keys, where, options
    seen = torch.ones(1, 1, 1, keys, dtype=torch.bool)
    seen[..., where] = False
    if kind == "mask":
        return queries, keys, where, {"attn_mask": seen}
    return queries, keys, where, {"attn_bias": torch.zeros(seen.shape).masked_fill(~seen, -INF)}


@each_dtype
@pytest.mark.parametrize("fill", [NAN, INF, 3e4], ids=["nan", "inf", "large"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("window", "window"), ("padding", "mask"), ("padding", "bias"), ("holes", "mask"), ("holes", "bias")],
)
def test_keys_that_no_query_sees_change_no_bit(name, kind, fill, dtype):
    queries, keys, where, options = hidden_case(name, kind)
    q, k, v, dout, dlse = case(dtype, queries, keys)
    k[:, where], v[:, where] = 0, 0
    expected = attend(q, k, v, dout, dlse, **options)
    k[:, where], v[:, where] = fill, fill
    found = attend(q, k, v, dout, dlse, **options)
    assert same_bits(found, expected)
    assert not found[3][:, where].any()
    assert not found[4][:, where].any()


@each_dtype
def test_queries_without_keys_change_no_bit(dtype):
    """NaN in q, dout and dlse of rows that see nothing: zeros out, zero gradients, the others' bits unchanged."""
    q, k, v, dout, dlse = case(dtype, 50, 20)
    empty = slice(0, 30)
    q[:, empty], dout[:, empty], dlse[:, :, empty] = 0, 0, 0
    expected = attend(q, k, v, dout, dlse, causal=True)
    q[:, empty], dout[:, empty], dlse[:, :, empty] = NAN, NAN, NAN
    found = attend(q, k, v, dout, dlse, causal=True)
    assert same_bits(found, expected)
    assert not found[0][:, empty].any()
    assert (found[1][:, :, empty] == -INF).all()
    assert not found[2][:, empty].any()


@each_dtype
def test_tokens_that_no_sequence_owns_change_no_bit(dtype):
    lengths_q, lengths_k = torch.tensor([0, 13, 40], dtype=torch.int32), torch.tensor([0, 70, 77], dtype=torch.int32)
    q, dout = (torch.randn(51, 4, 24).to(dtype) for _ in range(2))
    k, v = (torch.randn(90, 2, 24).to(dtype) for _ in range(2))
    dlse = torch.randn(4, 51)
    results = []
    for fill in (0, NAN):
        q[40:], dout[40:], dlse[:, 40:], k[77:], v[77:] = (fill,) * 5
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = gk.flash_attention_varlen(*leaves, lengths_q, lengths_k, causal=True, return_lse=True)
        gradients = torch.autograd.grad([out, lse], leaves, [dout, dlse])
        results.append([out.detach(), lse.detach(), *gradients])
    assert same_bits(*results)
    out, lse, dq, dk, dv = results[1]
    assert not any(t.any() for t in (out[40:], dq[40:], dk[77:], dv[77:]))
    assert (lse[:, 40:] == -INF).all()


@each_dtype
@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
def test_a_query_that_is_nan_stays_in_its_row(value, dtype):
    q, k, v, dout, dlse = case(dtype, 100, 100)
    expected = attend(q, k, v, dout, dlse, causal=True)
    q[0, 41, 2, 5] = value
    found = attend(q, k, v, dout, dlse, causal=True)
    others = torch.ones(1, 100, 4, dtype=torch.bool)
    others[0, 41, 2] = False
    assert found[0][0, 41, 2].isnan().all()
    assert found[2][0, 41, 2].isnan().any()
    for i in (0, 2):  # out, dq
        assert same_bits(found[i][others], expected[i][others])
    assert same_bits(found[1].mT[others], expected[1].mT[others])
    for i in (3, 4):  # dk, dv: row 41 sees keys up to 41, of key head 1
        assert same_bits(found[i][:, 42:], expected[i][:, 42:])
        assert same_bits(found[i][:, :, 0], expected[i][:, :, 0])


@each_dtype
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_key_or_value_that_is_nan_reaches_only_the_queries_that_see_it(which, dtype):
    q, k, v, dout, dlse = case(dtype, 100, 100)
    expected = attend(q, k, v, dout, dlse, causal=True)
    {"k": k, "v": v}[which][0, 70, 1, 3] = NAN
    found = attend(q, k, v, dout, dlse, causal=True)
    out = found[0]
    if which == "v":  # only element 3 of the heads 2 and 3
        assert out[0, 70:, 2:, 3].isnan().all()
        assert not out[..., 4:].isnan().any()
    else:
        assert out[0, 70:, 2:].isnan().all()
    assert same_bits(out[:, :70], expected[0][:, :70])
    assert same_bits(out[:, :, :2], expected[0][:, :, :2])
    assert same_bits(found[2][:, :70], expected[2][:, :70])  # dq
    for i in (3, 4):  # dk, dv of the other key head
        assert same_bits(found[i][:, :, 0], expected[i][:, :, 0])


@each_dtype
def test_a_seen_nan_counts_however_small_its_probability(dtype):
    q, k, v = torch.full((1, 40, 1, 8), 1.0), torch.zeros(1, 40, 1, 8), torch.randn(1, 40, 1, 8)
    k[0, 0], v[0, 1] = 100, NAN
    out = gk.flash_attention(*(t.to(dtype) for t in (q, k, v)), causal=True)
    assert out[0, 1:].isnan().all()
    assert not out[0, 0].isnan().any()


@each_dtype
@pytest.mark.parametrize("norm", [gk.rms_norm, gk.layer_norm], ids=["rms_norm", "layer_norm"])
def test_a_nan_stays_in_its_row_of_a_norm(norm, dtype):
    x, dy = torch.randn(13, 70).to(dtype), torch.randn(13, 70).to(dtype)

    def both():
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        return [y.detach(), *torch.autograd.grad(y, leaf, dy)]

    expected = both()
    x[5, 69] = NAN
    others = torch.arange(13) != 5
    for found, before in zip(both(), expected, strict=True):
        assert found[5].isnan().all()
        assert same_bits(found[others], before[others])


@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize(
    ("algorithm", "dtype"),
    [
        *(("auto", dtype) for dtype in FLOATS),
        *(pytest.param("winograd", dtype, marks=pytest.mark.cpu_only) for dtype in FLOATS),
        pytest.param("winograd_f4", torch.float32, marks=pytest.mark.cpu_only),
    ],
    ids=str,
)
def test_a_pixel_that_is_not_finite_reaches_only_those_that_see_it(value, algorithm, dtype):
    """Also of a Winograd tile, whose results are all made of all its pixels."""
    x, weight = torch.randn(3, 40, 13, 9).to(dtype), torch.randn(50, 40, 3, 3).to(dtype)
    norm = gk.GroupNormPrologue(5)
    expected, next_norm = gk.conv2d(x, weight, padding=1, algorithm=algorithm, return_stats=norm)
    x[1, 7, 5, 4] = value
    found, after = gk.conv2d(x, weight, padding=1, algorithm=algorithm, return_stats=norm)
    seen = torch.zeros_like(found, dtype=torch.bool)
    seen[1, :, 4:7, 3:6] = True
    assert torch.equal(~found.isfinite(), seen)
    if value == INF:
        taps = weight[:, 7].float().flip(1, 2).sign() * INF
        assert torch.equal(found[1, :, 4:7, 3:6].float(), taps)
    assert (found - expected)[~seen].abs().max() < 0.05 * expected.std()  # another order of additions, and a rounding
    in_a_tile = torch.zeros_like(seen)
    in_a_tile[1, :, 4:8, :8] = True
    assert same_bits(found[~in_a_tile], expected[~in_a_tile])
    others = torch.tensor([0, 2])
    assert all(same_bits(a[others], b[others]) for a, b in zip(after, next_norm, strict=True))
    assert all(a[1].isnan().all() for a in after)
