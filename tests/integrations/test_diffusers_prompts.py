"""genai_kernels.integrations.diffusers: keys and values of a prompt, computed once where nothing has changed."""

import copy
import gc

import pytest
import torch
from diffusers_models import BF16, F32, accelerated, conditional, inputs, output

from genai_kernels.integrations.diffusers.prompts import _kept

PLAIN, AGAIN = "cross-attention, head_dim 8", "cross-attention with keys and values of an earlier call, head_dim 8"
LAYERS = 3  # of head_dim 8; the one in the middle has 12


def counts(report, dtype=F32):
    name = str(dtype).removeprefix("torch.")
    return report.served[f"{name}, {PLAIN}"], report.served[f"{name}, {AGAIN}"]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_steps_of_one_prompt(dtype):
    """The same bits as without; the keys and values of each layer are made once."""
    model, (x, t, text) = conditional().to(dtype), inputs(dtype)
    steps = [torch.randn_like(x) for _ in range(4)]
    with torch.no_grad():
        with accelerated.accelerate(model) as report:
            expected = [output(model, (x, t, text)) for x in steps]
        assert counts(report, dtype) == (4 * LAYERS, 0)
        with accelerated.accelerate(model, keep_prompt=True) as report:
            found = [output(model, (x, t, text)) for x in steps]
            assert counts(report, dtype) == (LAYERS, 3 * LAYERS)
            assert AGAIN in str(report)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not _kept


def change_text(model, text):
    text[0, 1] += 1


def change_a_weight(model, text):
    model.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(1.5)


def replace_a_weight(model, text):
    layer = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v
    layer.weight = torch.nn.Parameter(layer.weight * 2)


def replace_the_layer(model, text):
    attn = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attn.to_v = copy.deepcopy(attn.to_v)
    attn.to_v.weight.mul_(2)


def hook_a_layer(model, text):
    layer = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v
    layer.register_forward_hook(lambda module, args, y: 2 * y)


@pytest.mark.parametrize(
    ("change", "made_again"),
    [(change_text, LAYERS), (change_a_weight, 1), (replace_a_weight, 1), (replace_the_layer, 1), (hook_a_layer, 1)],
)
def test_what_has_changed_is_seen(change, made_again):
    model, args = conditional(), inputs()
    with torch.no_grad(), accelerated.accelerate(model, keep_prompt=True) as report:
        before = output(model, args)
        change(model, args[2])
        found = output(model, args)
        assert counts(report) == (LAYERS + made_again, LAYERS - made_again)
        expected = output(model, (*args[:2], args[2].clone()))
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)


def test_another_text_of_the_same_numbers_is_another():
    model, args = conditional(), inputs()
    with torch.no_grad(), accelerated.accelerate(model, keep_prompt=True) as report:
        for _ in range(3):
            output(model, (*args[:2], args[2].clone()))  # maybe at the address of the one before
            gc.collect()
            assert not any(_kept.values())  # nothing outlives its text
    assert counts(report) == (3 * LAYERS, 0)


def test_gradients_and_inference_mode():
    model, args = conditional(), inputs()
    with accelerated.accelerate(model, keep_prompt=True) as report:
        with torch.no_grad():
            output(model, args)
        weight = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight
        for _ in range(2):  # kept keys have no gradient
            assert torch.autograd.grad(output(model, args).square().sum(), weight)[0].abs().sum() > 0
        with torch.inference_mode():
            for _ in range(2):
                output(model, args)
        model.requires_grad_(False)  # what was made in inference mode must not be saved for backward
        x = args[0].clone().requires_grad_()
        for _ in range(2):
            torch.autograd.grad(output(model, (x, *args[1:])).sum(), x)
        assert counts(report) == (6 * LAYERS, LAYERS)
        with torch.autocast("cpu", BF16):
            output(model, args)
        assert counts(report, BF16) == (LAYERS, 0)
