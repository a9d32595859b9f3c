"""Quantised weights: what comes back from few bits goes there as it was; a product is that with what comes back."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from calls import same_bits

import genai_kernels as gk
from genai_kernels.quantized import NF4, QuantizedWeight, pack, unpack

KINDS = {
    "int8": (lambda w: gk.quantize_int8(w), gk.int8_linear),
    "int8_groups": (lambda w: gk.quantize_int8(w, 32), gk.int8_linear),
    "int4_32": (lambda w: gk.quantize_int4(w, 32), gk.int4_linear),
    "int4_128": (lambda w: gk.quantize_int4(w, 128), gk.int4_linear),
    "nf4": (lambda w: gk.quantize_nf4(w), gk.nf4_linear),
    "nf4_32_single": (lambda w: gk.quantize_nf4(w, 32, double_quant=False), gk.nf4_linear),
}
KIND = pytest.mark.parametrize("kind", KINDS)
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def hard(rows, columns):
    """Rows of all kinds: normal, zero, constant, of one sign, tiny, huge, with an outlier; all signs of zero."""
    w = torch.randn(rows, columns) * torch.logspace(-3, 2, rows)[:, None]
    w[1], w[2], w[3], w[4], w[5] = 0, -0.0, 0.3, w[4].abs(), -w[5].abs()
    w[6] *= 1e-33
    w[7] *= 1e36
    w[8, 3::50] *= 200
    return w


# ---- quantise and back ----


@KIND
@pytest.mark.parametrize("columns", [1, 31, 64, 77, 300, 2048])
def test_quantised_again_it_is_the_same(kind, columns):
    quantize = KINDS[kind][0]
    q = quantize(hard(300 if columns == 2048 else 20, columns))
    dense = gk.dequantize(q)
    again = quantize(dense)
    assert dense.isfinite().all()
    assert same_bits(gk.dequantize(again) + 0.0, dense + 0.0)  # -0 has no code
    assert all(torch.equal(t, again.tensors()[name]) for name, t in q.tensors().items())


@KIND
def test_the_error_is_at_most_half_a_step(kind):
    quantize = KINDS[kind][0]
    w = torch.randn(30, 300)
    q = quantize(w)
    groups = q.scale.shape[1]
    largest = torch.zeros(30, groups * (q.group_size or 300))
    largest[:, :300] = w.abs()
    largest = largest.view(30, groups, -1).amax(2)
    span = {"int8": largest / 127, "int4": q.scale, "nf4": largest * 0.305}[q.kind]  # of NF4: the widest gap, 1 - 0.696
    step = span.repeat_interleave(q.group_size or 300, 1)[:, :300]
    error = (gk.dequantize(q) - w).abs()
    assert (error <= 0.51 * step + largest.max() / 255 * (q.code_scale is not None)).all()
    assert error.max() > 0.2 * step.min()


@KIND
def test_zeros_have_no_scale_and_come_back(kind):
    quantize, linear = KINDS[kind]
    w = torch.randn(4, 100)
    w[2] = 0
    q = quantize(w)
    assert (q.scale[2] == 0).all()
    assert (gk.dequantize(q)[2] == 0).all()
    assert (linear(torch.randn(3, 100), q)[:, 2] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 2.0**127])
@pytest.mark.parametrize("quantize", [gk.quantize_int8, gk.quantize_int4, gk.quantize_nf4])
def test_what_has_no_code_is_refused(quantize, value):
    w = torch.randn(3, 40)
    w[1, 7] = value
    with pytest.raises(ValueError, match=rf"{quantize.__name__}: weight\[1, 7\]: expected less than 2\*\*127, got"):
        quantize(w)


def test_the_layout_is_what_is_documented():
    codes = torch.arange(70).remainder(16)[None]
    data = pack(codes)
    assert data.shape == (1, 48)
    for column in range(70):
        byte = int(data[0, column // 32 * 16 + column % 16])
        assert (byte >> 4 if column % 32 >= 16 else byte & 15) == codes[0, column]
    assert torch.equal(unpack(data, 70), codes)
    q = QuantizedWeight(data, torch.tensor([[2.0, 4.0, 8.0]]), (1, 70), 32)
    expected = [NF4[c] * 2.0 ** (1 + i // 32) for i, c in enumerate(codes[0].tolist())]
    assert torch.equal(gk.dequantize(q), torch.tensor([expected]))


def test_double_quantisation_has_a_byte_for_each_scale():
    w = torch.randn(40, 1000)
    q = gk.quantize_nf4(w)
    assert q.scale.dtype == torch.uint8
    assert q.code_scale.shape == (3,)  # 40 * 16 scales in blocks of 256
    assert q.nbytes == 40 * 512 + 640 + 12
    single = gk.quantize_nf4(w, double_quant=False)
    errors = [(gk.dequantize(x) - w).norm() / w.norm() for x in (q, single)]
    assert errors[0] < 1.02 * errors[1]
    assert errors[1] < 0.11


@KIND
def test_a_state_dict_brings_it_back(kind):
    quantize, linear = KINDS[kind]
    q, x = quantize(torch.randn(9, 70)), torch.randn(4, 70)
    back = QuantizedWeight.from_state_dict(q.state_dict("a."), "a.")
    assert (back.kind, back.shape, back.group_size) == (q.kind, (9, 70), q.group_size)
    assert torch.equal(linear(x, back), linear(x, q))


# ---- products ----


@KIND
@pytest.mark.parametrize(("width", "out"), [(192, 320), (1100, 70), (33, 50)])
def test_in_float32_it_is_linear_with_the_matrix_bit_for_bit(kind, width, out):
    quantize, linear = KINDS[kind]
    q, bias = quantize(torch.randn(out, width)), torch.randn(out)
    dense = gk.dequantize(q)
    for rows in (1, 2, 3, 5, 8, 9, 130):
        x, dy = torch.randn(rows, width, requires_grad=True), torch.randn(rows, out)
        ours, expected = linear(x, q, bias), gk.linear(x, dense, bias)
        assert torch.equal(ours, expected)
        assert torch.equal(*(torch.autograd.grad(y, x, dy)[0] for y in (ours, expected)))


@KIND
@FLOATS
def test_a_row_has_the_same_bits_in_any_company(kind, dtype):
    quantize, linear = KINDS[kind]
    functions = [linear] + [gk.w8a8_linear] * (kind == "int8")
    for width, out in ((1100, 70), (33, 50)):
        q, x, bias = quantize(torch.randn(out, width)), torch.randn(300, width).to(dtype), torch.randn(out).to(dtype)
        for function in functions:
            expected = function(x, q, bias)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for rows in (0, 1, 2, 3, 4, 5, 7, 9, 33, 129):
                    assert torch.equal(function(x[:rows], q, bias), expected[:rows]), rows
                assert torch.equal(function(x[77], q, bias), expected[77])


def test_a_gradient_of_the_bias_and_none_of_the_weight():
    q, x = gk.quantize_nf4(torch.randn(8, 40)), torch.randn(6, 40)
    bias, dy = torch.zeros(8, requires_grad=True), torch.randn(6, 8)
    gk.nf4_linear(x, q, bias).backward(dy)
    torch.testing.assert_close(bias.grad, dy.sum(0))
    single = gk.quantize_nf4(torch.randn(8, 40), double_quant=False)
    trained = dataclasses.replace(single, scale=single.scale.requires_grad_())
    with pytest.raises(NotImplementedError, match="a quantized weight takes no gradient"):
        gk.nf4_linear(x, trained)


@FLOATS
def test_w8a8_is_the_sum_of_integers(dtype):
    for rows, width, out in ((1, 64, 7), (5, 77, 31), (130, 5000, 26), (4, 1, 1)):
        x, q, bias = torch.randn(rows, width).to(dtype), gk.quantize_int8(torch.randn(out, width)), torch.randn(out)
        largest = x.float().abs().amax(1, keepdim=True)
        steps = (x.float() * (torch.tensor(127.0) / largest)).round().long()
        y = (steps @ q.data.long().t()).float() * (largest / 127) * q.scale.t() + bias.to(dtype).float()
        assert torch.equal(gk.w8a8_linear(x, q, bias.to(dtype)), y.to(dtype))


def test_w8a8_keeps_what_is_not_finite_in_its_row():
    x, q = torch.randn(5, 70), gk.quantize_int8(torch.randn(6, 70))
    expected = gk.w8a8_linear(x, q)
    x[1, 3], x[3, 69] = torch.nan, -torch.inf
    y = gk.w8a8_linear(x, q)
    assert y[[1, 3]].isnan().all()
    assert torch.equal(y[[0, 2, 4]], expected[[0, 2, 4]])


def test_w8a8_of_the_largest_sums_there_are():
    x, w = torch.full((1, 1 << 17), 127.0), torch.full((2, 1 << 17), -127.0)
    assert gk.w8a8_linear(x, gk.quantize_int8(w)).tolist() == [[-127.0 * 127 * 131072] * 2]
    with pytest.raises(NotImplementedError, match="w8a8_linear: weight: expected at most 131072 inputs"):
        gk.w8a8_linear(torch.ones(1, 131073), gk.quantize_int8(torch.ones(1, 131073)))


def test_opcheck():
    for quantize, _ in KINDS.values():
        q = quantize(torch.randn(6, 40))
        args = (torch.randn(3, 40, requires_grad=True), *q.arguments(), torch.randn(6, requires_grad=True))
        torch.library.opcheck(torch.ops.genai_kernels.quantized_linear.default, args)
        dy = (torch.randn(3, 6), *q.arguments())
        tests = ("test_schema", "test_faketensor")  # a backward op is not differentiable itself, and says so
        torch.library.opcheck(torch.ops.genai_kernels.quantized_linear_dx.default, dy, test_utils=tests)
    q = gk.quantize_int8(torch.randn(6, 40))
    args = (torch.randn(3, 40), q.data, q.scale, 40, torch.randn(6))
    torch.library.opcheck(torch.ops.genai_kernels.w8a8_linear.default, args, test_utils=tests)


# ---- errors ----

INT8, INT4 = gk.quantize_int8(torch.ones(4, 40)), gk.quantize_int4(torch.ones(4, 40), 32)
X = torch.ones(2, 40)


def changed(**what):
    return dataclasses.replace(INT4, **what)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: gk.int8_linear(X[:, :3], INT8), ValueError, r"x: expected a last dimension of 40 .* \[2, 3\]"),
        (lambda: gk.int8_linear(torch.tensor(1.0), INT8), ValueError, r"x: expected \[..., in\]"),
        (lambda: gk.int8_linear(X.int(), INT8), TypeError, r"x: expected float32, .* got int32"),
        (
            lambda: gk.int8_linear(X, INT4),
            TypeError,
            r"weight: expected one of quantize_int8, got one of quantize_int4",
        ),
        (lambda: gk.int8_linear(X, torch.ones(4, 40)), TypeError, r"weight: expected a QuantizedWeight, got Tensor"),
        (lambda: gk.int8_linear(X, INT8, torch.ones(3)), ValueError, r"bias: expected \[4\], got shape \[3\]"),
        (lambda: gk.int8_linear(X, INT8, torch.ones(4).half()), TypeError, r"bias: expected the dtype of x"),
        (lambda: gk.int4_linear(X, changed(data=INT4.data[:, 1:])), ValueError, r"weight.data: expected \[out, 32\]"),
        (lambda: gk.int4_linear(X, changed(data=INT4.data[:2])), ValueError, r"weight.data: expected 4 rows"),
        (lambda: gk.int4_linear(X, changed(scale=INT4.scale[:, :1])), ValueError, r"weight.scale: expected a contig"),
        (lambda: gk.int4_linear(X, changed(scale=INT4.scale.double())), TypeError, r"weight.scale: expected float32"),
        (lambda: gk.int4_linear(X, changed(zero=INT4.zero.int())), TypeError, r"weight.zero: expected uint8"),
        (lambda: gk.int4_linear(X, changed(group_size=48)), ValueError, r"weight.group_size: expected a power of two"),
        (lambda: gk.w8a8_linear(X, gk.quantize_int8(torch.ones(4, 40), 32)), ValueError, r"weight: expected a scale"),
        (lambda: gk.w8a8_linear(X.double(), INT8), TypeError, r"x: expected float32, bfloat16 or float16, got"),
        (
            lambda: gk.w8a8_linear(X.requires_grad_(False).clone().requires_grad_(), INT8),
            NotImplementedError,
            "no grad",
        ),
        (lambda: gk.quantize_int4(torch.ones(4, 40), 48), ValueError, r"group_size: expected a power of two .* got 48"),
        (lambda: gk.quantize_nf4(torch.ones(4)), ValueError, r"weight: expected \[out, in\], got shape \[4\]"),
        (lambda: gk.quantize_int8(torch.ones(4, 4).int()), TypeError, r"weight: expected a floating dtype, got int32"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=r"genai_kernels\.\w+: .*" + text):
        call()
