"""F.scaled_dot_product_attention routed to flash_attention for a block: same results, all counted, all undone."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from genai_kernels.accuracy import compare
from genai_kernels.integrations import sdpa

attention = torch.nn.attention
if not hasattr(attention, "register_flash_attention_impl"):
    pytest.skip("this torch has no public registration of flash implementations", allow_module_level=True)


@pytest.fixture(autouse=True)
def _nothing_stays_active():
    yield
    assert attention.current_flash_attention_impl() is None
    assert torch.backends.mha.get_fastpath_enabled()


def qkv(b=2, h=4, hk=None, tq=7, tk=None, d=8, dv=None, dtype=torch.float64):
    shapes = ((b, h, tq, d), (b, hk or h, tk or tq, d), (b, hk or h, tk or tq, dv or d))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def some_mask(*shape):
    mask = torch.rand(shape) < 0.6
    mask[..., 3, :] = False  # a row that sees nothing
    return mask


CASES = {
    "plain": (qkv, {}),
    "causal": (qkv, {"is_causal": True}),
    "causal_more_keys": (lambda: qkv(tq=5, tk=11), {"is_causal": True}),
    "causal_more_queries": (lambda: qkv(tq=11, tk=5), {"is_causal": True}),
    "scale": (qkv, {"scale": 0.7}),
    "bool_mask": (qkv, {"attn_mask": lambda: some_mask(7, 7)}),
    "bool_mask_4d": (qkv, {"attn_mask": lambda: some_mask(2, 1, 7, 7)}),
    "float_mask": (qkv, {"attn_mask": lambda: torch.randn(2, 4, 7, 7, dtype=torch.float64)}),
    "mask_per_key": (qkv, {"attn_mask": lambda: torch.randn(2, 1, 1, 7, dtype=torch.float64)}),
    "gqa": (lambda: qkv(h=6, hk=2), {"enable_gqa": True, "is_causal": True}),
    "heads_first_strides": (lambda: [t.transpose(1, 2) for t in qkv()], {}),
    # what PyTorch's fused operator refuses
    "value_dim": (lambda: qkv(dv=5), {"is_causal": True}),
    "value_dim_more_keys": (lambda: qkv(tq=3, tk=9, dv=5), {"is_causal": True}),
    "value_dim_gqa": (lambda: qkv(h=6, hk=3, dv=5), {"enable_gqa": True}),
    "value_dim_bool_mask": (lambda: qkv(dv=5), {"attn_mask": lambda: some_mask(7, 7)}),
    "three_dims": (lambda: [t.detach()[0].requires_grad_() for t in qkv()], {"is_causal": True}),
    "three_dims_mask": (lambda: [t.detach()[0].requires_grad_() for t in qkv()],
                        {"attn_mask": lambda: some_mask(4, 7, 7)}),
}  # fmt: skip


def case(name):
    make, options = CASES[name]
    return make(), {key: value() if callable(value) else value for key, value in options.items()}


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name):
    call, options = case(name)
    expected = F.scaled_dot_product_attention(*call, **options)
    cotangent = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, call, cotangent)
    with sdpa.enabled() as report:
        out = F.scaled_dot_product_attention(*call, **options)
        gradients = torch.autograd.grad(out, call, cotangent)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    assert sum(n for what, n in report.served.items() if not what.startswith("backward")) == 1, report
    assert not report.passed_on, report


@pytest.mark.parametrize("name", CASES)
def test_inference_mode(name):
    call, options = case(name)
    with torch.inference_mode():
        expected = F.scaled_dot_product_attention(*call, **options)
        with sdpa.enabled() as report:
            out = F.scaled_dot_product_attention(*call, **options)
    torch.testing.assert_close(out, expected)
    assert (report.served.total(), report.passed_on.total()) == (1, 0), report


@pytest.mark.parametrize("name", ["plain", "causal", "causal_more_keys", "gqa", "heads_first_strides"])
def test_strides_are_pytorchs(name):
    call, options = case(name)
    expected = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*call, is_causal="is_causal" in options)
    with sdpa.enabled():
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*call, is_causal="is_causal" in options)
    assert [t.stride() for t in found] == [t.stride() for t in expected]
    torch.testing.assert_close(found, expected)  # the lse too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_at_least_as_exact_as_the_composition(dtype):
    call = qkv(tq=60, d=32, dtype=dtype)
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        eager = F.scaled_dot_product_attention(*call, is_causal=True)
        exact = F.scaled_dot_product_attention(*(t.double() for t in call), is_causal=True)
    with sdpa.enabled():
        out = F.scaled_dot_product_attention(*call, is_causal=True)
    verdict = compare("out", out, eager, exact, k=1.0, k_rms=1.0)
    assert verdict.ok, verdict.complaint


def test_gradient_of_the_mask():
    call, mask = qkv(), torch.randn(1, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    expected = F.scaled_dot_product_attention(*call, attn_mask=mask)
    with sdpa.enabled() as report:
        out = F.scaled_dot_product_attention(*call, attn_mask=mask)
        found = torch.autograd.grad(out.square().sum(), [*call, mask])
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), [*call, mask]))
    assert list(report.served) == ["float64, 4 heads, head_dim 8, mask"]


def test_dropout_drops_probabilities_and_scales_the_others():
    q, k, _ = qkv(tq=40)
    v = torch.eye(40, dtype=torch.float64).expand(2, 4, 40, 40)
    probabilities = F.scaled_dot_product_attention(q, k, v)
    with sdpa.enabled() as report:
        torch.manual_seed(5)
        kept = F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)
        torch.manual_seed(5)
        again = F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)
        other = F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    assert torch.equal(kept, again)
    assert not torch.equal(kept, other)
    assert 0.2 < (kept == 0).double().mean() < 0.3
    torch.testing.assert_close(kept, probabilities * (kept != 0) / 0.75)
    assert report.served == {"float64, 4 heads, head_dim 8 to 40, dropout 0.25": 3}
    assert not report.passed_on


def test_forward_and_backward_on_different_sides_of_the_block():
    for name in ("causal", "bool_mask", "causal_more_keys"):
        call, options = case(name)
        expected = F.scaled_dot_product_attention(*call, **options)
        cotangent = torch.randn_like(expected)
        gradients = torch.autograd.grad(expected, call, cotangent, retain_graph=True)
        with sdpa.enabled() as report:
            inside = F.scaled_dot_product_attention(*call, **options)
            torch.testing.assert_close(torch.autograd.grad(expected, call, cotangent), gradients)
        torch.testing.assert_close(torch.autograd.grad(inside, call, cotangent), gradients)
        assert sum(what.startswith("backward") for what in report.served) == 1


# ---- modules ----


def trained(module, x, **options):
    module.zero_grad()
    out = module(*x, **options)
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()
    return [out, *(p.grad.clone() for p in module.parameters())]


def self_attention():
    x = torch.randn(3, 9, 32, dtype=torch.float64)
    return nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64), (x, x, x)


@pytest.mark.parametrize("padded", [False, True])
def test_multihead_attention(padded):
    module, x = self_attention()
    padding = torch.arange(9) >= torch.tensor([[9], [4], [7]]) if padded else None
    options = {"need_weights": False, "key_padding_mask": padding}
    expected = trained(module, x, **options)
    with sdpa.enabled() as report:
        torch.testing.assert_close(trained(module, x, **options), expected)
    assert report.served.total() == 2, report  # forward, backward
    module.eval()
    with torch.inference_mode():
        expected = module(*x, **options)[0]
        with sdpa.enabled() as report:
            torch.testing.assert_close(module(*x, **options)[0], expected)
    assert (report.served.total(), report.passed_on.total()) == (1, 0), report


@pytest.mark.parametrize("causal", [False, True])
def test_transformer_encoder(causal):
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, dtype=torch.float64)
    module = nn.TransformerEncoder(layer, 2)
    x = (torch.randn(3, 9, 32, dtype=torch.float64),)
    options = {"mask": nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64), "is_causal": True}
    options = options if causal else {}
    expected = trained(module, x, **options)
    with sdpa.enabled() as report:
        torch.testing.assert_close(trained(module, x, **options), expected)
    assert report.served.total() == 4, report
    module.eval()
    with torch.no_grad():
        expected = module(*x, **options)
        with sdpa.enabled() as report:
            torch.testing.assert_close(module(*x, **options), expected)
    assert (report.served.total(), report.passed_on.total()) == (2, 0), report


def test_training_with_dropout_is_served():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    with sdpa.enabled() as report:
        results = trained(layer, (torch.randn(3, 9, 32),))
    assert report.served == {"float32, 4 heads, head_dim 8, dropout 0.1": 1}
    assert all(torch.isfinite(t).all() for t in results)


def test_autocast():
    q, k, v = qkv(dtype=torch.float32)
    with sdpa.enabled() as report, torch.autocast("cpu", torch.bfloat16):
        out = F.scaled_dot_product_attention(q, k, v)
        dropped = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert out.dtype == dropped.dtype == torch.bfloat16
    assert set(report.served) == {f"bfloat16, 4 heads, head_dim 8{end}" for end in ("", ", dropout 0.5")}


# ---- torch.compile ----


@pytest.mark.parametrize("name", ["causal", "causal_more_keys", "bool_mask", "gqa", "heads_first_strides"])
def test_compiled(name):
    torch.compiler.reset()
    call, options = case(name)
    call = [t.detach().requires_grad_() for t in call]

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **options).square().sum()

    expected = torch.autograd.grad(function(*call), call)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with sdpa.enabled() as report:
        found = torch.autograd.grad(compiled(*call), call)
    torch.testing.assert_close(found, expected)
    assert report.served.total() == 2, report
    with sdpa.enabled() as report:
        compiled(*call)
    assert report.served.total() == 1, report
    torch.testing.assert_close(compiled(*call), function(*call))  # the same graph, after the block


def test_compiled_composition_is_passed_on_and_said():
    torch.compiler.reset()
    q, k, v = qkv(dv=5)
    compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    with sdpa.enabled() as report:
        out = compiled(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    assert not report.served
    assert all("torch.compile traces the composition" in reason for reason in report.passed_on)
    assert report.passed_on


# ---- what is passed on ----


def only_reason(report):
    assert not report.served, report
    ((reason, count),) = report.passed_on.items()
    assert count == 1
    assert reason in str(report)
    return reason


def test_a_choice_of_the_user_is_respected():
    with sdpa.enabled() as report, attention.sdpa_kernel(attention.SDPBackend.MATH):
        F.scaled_dot_product_attention(*qkv())
    assert only_reason(report) == "sdpa_kernel excludes FLASH_ATTENTION"


@pytest.mark.parametrize("shape", [(2, 1, 7, 8), (1, 4, 7, 8)], ids=str)
def test_broadcast_shapes(shape):
    q, k = qkv()[0], torch.randn(shape, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, k)
    with sdpa.enabled() as report:
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k), expected)
    assert "need broadcasting" in only_reason(report)


def test_tensors_of_different_dimensions():
    q, k = torch.randn(2, 7, 8, dtype=torch.float64), torch.randn(2, 1, 7, 8, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, k)
    with sdpa.enabled() as report:
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k), expected)
    assert only_reason(report) == "tensors of different dimensions"


def test_dropout_of_everything():
    with sdpa.enabled() as report:
        out = F.scaled_dot_product_attention(*qkv(), dropout_p=1.0)
    assert not out.any()
    assert only_reason(report) == "dropout of everything, or by a mask"


def test_forward_mode():
    q, k, v = (t.detach() for t in qkv(dv=5))
    with sdpa.enabled() as report:
        _, tangent = torch.func.jvp(lambda q: F.scaled_dot_product_attention(q, k, v), (q,), (torch.ones_like(q),))
    step = 1e-6
    difference = F.scaled_dot_product_attention(q + step, k, v) - F.scaled_dot_product_attention(q - step, k, v)
    torch.testing.assert_close(tangent, difference / (2 * step), atol=1e-7, rtol=1e-5)
    assert not report.served


def test_the_composition_itself_gives_no_probabilities_that_could_be_believed():
    call = qkv()
    with sdpa.enabled():
        out, probabilities = torch.ops.aten._scaled_dot_product_attention_math(*call)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*call))
    assert probabilities.shape == (2, 4, 7, 7)
    assert probabilities.isnan().all()


def test_no_keys_give_zeros_without_any_call():
    q, k, v = qkv()
    with sdpa.enabled() as report:
        assert not F.scaled_dot_product_attention(q, k[:, :, :0], v[:, :, :0]).any()
    assert not report.served + report.passed_on


# ---- the block ----


def is_ours():
    return attention.current_flash_attention_impl() == "genai_kernels"


def test_restored_by_an_exception_and_usable_again():
    call = qkv()
    before = F.scaled_dot_product_attention(*call)
    for _ in range(2):
        with pytest.raises(KeyError), sdpa.enabled() as report:
            F.scaled_dot_product_attention(*call).mean(dim={}[0])
        assert report.served.total() == 1
        assert torch.equal(F.scaled_dot_product_attention(*call), before)
        assert report.served.total() == 1


def test_nested_blocks_count_each_for_itself():
    call = qkv()
    with sdpa.enabled() as outer:
        with sdpa.enabled() as inner:
            F.scaled_dot_product_attention(*call)
        assert is_ours()
        F.scaled_dot_product_attention(*call)
    assert (inner.served.total(), outer.served.total()) == (1, 2)


def test_another_implementation_is_put_back():
    log = []

    class Other:
        def __init__(self):
            log.append("on")

        def remove(self):
            log.append("off")

    attention.register_flash_attention_impl("other", register_fn=Other)
    attention.activate_flash_attention_impl("other")
    with sdpa.enabled():
        assert is_ours()
    assert attention.current_flash_attention_impl() == "other"
    with sdpa.enabled():
        attention.activate_flash_attention_impl("other")  # the user's own change inside the block stays
    assert attention.current_flash_attention_impl() == "other"
    attention.restore_flash_attention_impl()
    assert log == ["on", "off", "on", "off", "on", "off"]


def test_import_activates_nothing_and_activation_by_name_works():
    program = """
import torch, warnings
warnings.simplefilter("error")
from genai_kernels.integrations import sdpa
attention = torch.nn.attention
assert attention.current_flash_attention_impl() is None
q = torch.randn(1, 2, 5, 8, dtype=torch.float64)
before = torch.nn.functional.scaled_dot_product_attention(q, q, q)
assert "genai_kernels" in attention.list_flash_attention_impls()
attention.activate_flash_attention_impl("genai_kernels")
torch.testing.assert_close(torch.nn.functional.scaled_dot_product_attention(q, q, q), before)
with sdpa.enabled() as report:
    torch.nn.functional.scaled_dot_product_attention(q, q, q)
assert attention.current_flash_attention_impl() == "genai_kernels"
print(report)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.splitlines()[0], done.stderr) == (
        "calls of scaled_dot_product_attention served by genai_kernels: 1",
        "",
    )


def test_a_torch_without_the_registration(monkeypatch):
    monkeypatch.delattr(attention, "register_flash_attention_impl")
    expected = (
        r"sdpa\.enabled: expected a torch with torch\.nn\.attention\.register_flash_attention_impl \(2\.13 has it\)"
    )
    with pytest.raises(NotImplementedError, match=expected), sdpa.enabled():
        pass
    assert F.scaled_dot_product_attention(*qkv()).isfinite().all()
