"""genai_kernels.integrations.diffusers: ResNet blocks and upsamplers with their convolutions, and without."""

import pytest
import torch
from diffusers_models import BF16, F32, F64, accelerated, conditional, inputs, judge, output, resnet
from torch import nn

from genai_kernels.integrations.diffusers import convolutions
from genai_kernels.integrations.diffusers.convolutions import _packed


def block(**options):
    torch.manual_seed(0)
    given = {"in_channels": 16, "out_channels": 24, "temb_channels": 12, "groups": 8, "output_scale_factor": 1.3}
    made = resnet.ResnetBlock2D(**given | options).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return made


_GENERATOR = torch.Generator().manual_seed(0)  # the same numbers whatever was imported before
ARGS = [torch.randn(2, 16, 6, 5, generator=_GENERATOR), torch.randn(2, 12, generator=_GENERATOR)]
FUSED = "ResNet block, with its convolutions"


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "ResNet block, with its convolutions"),
        ({"out_channels": 16, "non_linearity": "gelu"}, "ResNet block, with its convolutions"),
        ({"time_embedding_norm": "scale_shift"}, "ResNet block, scale and shift, with its convolutions"),
        ({"skip_time_act": True}, "ResNet block, with its convolutions"),
        ({"up": True}, "ResNet block"),
        ({"down": True}, "ResNet block"),
        ({"up": True, "kernel": "fir"}, "ResNet block"),
        ({"conv_2d_out_channels": 8, "conv_shortcut_bias": False}, "ResNet block, with its convolutions"),
    ],
    ids=str,
)
def test_blocks(options, what, dtype):
    report = judge(block(**options), ARGS, dtype, gradients=True)
    assert report.served[f"{str(dtype).removeprefix('torch.')}, {what}"] == 1
    assert not report.passed_on


def test_channels_last():
    x = ARGS[0].to(memory_format=torch.channels_last)
    model = block()
    assert judge(model.to(memory_format=torch.channels_last), [x, ARGS[1]]).served.total() == 1
    accelerated.accelerate(model)
    assert output(model, [x, ARGS[1]]).is_contiguous(memory_format=torch.channels_last)


def test_dropout_and_hooks():
    model = block(dropout=0.5)
    with accelerated.accelerate(model) as report:
        for training in (True, False):
            output(model.train(training), ARGS)
        seen = []
        handle = model.conv1.register_forward_hook(lambda *given: seen.append(1))
        expected = output(model, ARGS)
        handle.remove()
        torch.testing.assert_close(output(model, ARGS), expected)
        handle = model.dropout.register_forward_hook(lambda *given: seen.append(2))
        torch.testing.assert_close(output(model, ARGS), expected)
        handle.remove()
    assert seen == [1, 2]
    assert report.served == {"float32, ResNet block": 3, f"float32, {FUSED}": 2}
    torch.manual_seed(1)
    expected = output(model.train(), ARGS)
    with accelerated.accelerate(model):
        torch.manual_seed(1)
        torch.testing.assert_close(output(model, ARGS), expected)


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(24, 24, 3, padding=1, groups=2), nn.Conv2d(24, 24, 3, padding=2, dilation=2),
     nn.Conv2d(24, 24, 3, padding="same"), nn.Conv2d(24, 24, 3, padding=1, padding_mode="reflect"),
     nn.Sequential(nn.Conv2d(24, 24, 3, padding=1))],
    ids=str,
)  # fmt: skip
def test_other_convolutions(conv):
    model = block()
    model.conv2 = conv
    assert judge(model, ARGS, gradients=True).served == {"float32, ResNet block": 1}


def test_where_pytorch_is_faster(monkeypatch):
    model, args = conditional(), inputs()
    monkeypatch.setattr(convolutions, "_FEWEST_PIXELS", 2 * 8 * 8)  # the larger of two maps
    report = judge(model, args)
    assert report.served[f"float32, {FUSED}"] == 3  # one down, two up; two down and up and two between are smaller
    assert report.served["float32, ResNet block"] == 5
    assert report.passed_on == {"a convolution that PyTorch's engine is faster at": 2}  # the up- and the downsampler
    monkeypatch.setattr(convolutions, "_low_precision_is_fast", lambda: True)
    assert f"bfloat16, {FUSED}" not in judge(model, args, BF16).served


def test_upsamplers():
    torch.manual_seed(0)
    for layer in (resnet.Upsample2D(6, use_conv=True, out_channels=5), resnet.Upsample2D(6, True, name="Conv2d_0")):
        for dtype in (F32, BF16):
            assert judge(layer, [torch.randn(2, 6, 5, 4)], dtype, gradients=True).served.total() == 1
    x = torch.randn(1, 6, 5, 4)
    assert not judge(layer, [x], run=lambda m, a: m(*a, output_size=(10, 8))).passed_on
    assert judge(layer, [x], run=lambda m, a: m(*a, output_size=(9, 8))).passed_on == {
        "a map of other than twice the size": 1
    }
    with pytest.raises(ValueError, match="got Upsample2D without any"):
        accelerated.accelerate(resnet.Upsample2D(6))
    other = resnet.Upsample2D(6, True, norm_type="ln_norm", eps=1e-5, elementwise_affine=True)
    assert judge(other, [x]).passed_on == {"an upsampler of another kind": 1}
    other = resnet.Upsample2D(6, True, kernel_size=5, padding=2)
    assert judge(other, [x]).passed_on == {"a convolution of (5, 5) pixels": 1}


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_downsamplers(padding):
    """0 is the autoencoder's: zeros at the right and at the bottom alone."""
    torch.manual_seed(0)
    layer = resnet.Downsample2D(6, use_conv=True, out_channels=5, padding=padding, name="op")
    for size, dtype in (((6, 4), F32), ((5, 7), F32), ((6, 7), BF16)):
        report = judge(layer, [torch.randn(2, 6, *size)], dtype, gradients=True)
        assert report.served == {f"{str(dtype).removeprefix('torch.')}, downsampler": 1}
        assert not report.passed_on
    with accelerated.accelerate(layer.float(), prepack=True), torch.no_grad():
        x = torch.randn(1, 6, 9, 8)
        expected = output(layer, [x])
        assert torch.equal(output(layer, [x]), expected)
        assert len(_packed) == 1
    torch.testing.assert_close(output(layer, [x]), expected)


def test_downsamplers_that_are_left():
    with pytest.raises(ValueError, match="got Downsample2D without any"):
        accelerated.accelerate(resnet.Downsample2D(6))
    other = resnet.Downsample2D(6, True, norm_type="ln_norm", eps=1e-5, elementwise_affine=True)
    assert judge(other, [torch.randn(1, 6, 4, 4)]).passed_on == {"a downsampler of another kind": 1}
    layer = resnet.Downsample2D(6, True)
    layer.conv.register_forward_hook(lambda *given: None)
    assert judge(layer, [torch.randn(1, 6, 4, 4)]).passed_on == {"a hook on a convolution": 1}
    with accelerated.accelerate(layer), pytest.raises(AssertionError):
        output(layer, [torch.randn(1, 5, 4, 4)])


def test_prepacked():
    model, args = conditional(), inputs()
    expected = output(model, args)
    with accelerated.accelerate(model) as report, torch.no_grad():
        plain = output(model, args)
    with accelerated.accelerate(model, prepack=True) as report:
        assert len(_packed) == 8 * 2 + 5 + 2  # two in each block, shortcuts, an upsampler and a downsampler
        assert torch.equal(output(model, args), plain)  # a gradient is wanted: not used
        assert not any(_packed.values())
        with torch.no_grad():
            assert torch.equal(output(model, args), plain)
            assert sum(kept is not None for kept in _packed.values()) == 8 * 2 + 2  # shortcuts are called as modules
            model.mid_block.resnets[0].conv1.weight.mul_(2)
            changed = output(model, args)
            assert not torch.equal(changed, plain)
            model.mid_block.resnets[0].conv1.weight.mul_(0.5)
            assert torch.equal(output(model, args), plain)
        assert report.served[f"float32, {FUSED}"] == 8 * 4
    assert not _packed
    torch.testing.assert_close(output(model, args), expected)
    accelerated.accelerate(model, prepack=True)
    accelerated.restore(model)
    assert not _packed
