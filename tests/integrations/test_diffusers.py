"""genai_kernels.integrations.diffusers: outputs and gradients of whole models, with each option, against diffusers."""

import pytest
import torch
from diffusers_models import (
    BF16,
    F16,
    F32,
    F64,
    accelerated,
    attention_processor,
    autoencoder,
    conditional,
    inputs,
    judge,
    normalization,
    output,
    unconditional,
    vae,
)
from torch import nn

# ---- whole models ----


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_conditional_unet(dtype):
    report = judge(conditional(), inputs(), dtype, gradients=dtype in (F32, BF16))
    assert not report.passed_on
    name = str(dtype).removeprefix("torch.")
    # two blocks down, two in the middle, four up
    assert report.served[f"{name}, ResNet block, with its convolutions"] == 8
    assert report.served[f"{name}, cross-attention, head_dim 8"] == 3
    assert report.served[f"{name}, GEGLU"] == 4
    assert report.served[f"{name}, group norm and silu"] == report.served["an activation computed with its norm"] == 1
    assert set(report.modules.values()) == {
        "attention", "ResNet block", "upsampler", "downsampler", "GEGLU", "group norm", "layer norm",
        "activation, computed with its norm",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_unconditional_unet(dtype):
    args = [torch.randn(2, 3, 8, 8), torch.tensor([1, 2])]
    report = judge(unconditional(), args, dtype, gradients=True)
    assert not report.passed_on


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_autoencoder(dtype):
    report = judge(autoencoder(), [torch.randn(2, 3, 16, 16)], dtype, gradients=True)
    assert not report.passed_on
    name = str(dtype).removeprefix("torch.")
    assert report.served[f"{name}, self-attention, head_dim 32"] == 2  # one head, as wide as the map is deep


@pytest.mark.parametrize(
    "options",
    [
        {"resnet_time_scale_shift": "scale_shift"},
        {"act_fn": "gelu"},
        {"act_fn": "relu"},
        {"use_linear_projection": True, "attention_head_dim": (2, 3), "transformer_layers_per_block": 2},
        {"upcast_attention": True, "dual_cross_attention": False},
        {"resnet_skip_time_act": True, "resnet_out_scale_factor": 1.7},
        {"only_cross_attention": True},
        {"mid_block_type": None},
        {"class_embed_type": "timestep"},
    ],
    ids=str,
)
def test_options_of_the_conditional_unet(options):
    labels = {"class_labels": torch.tensor([3, 5])} if "class_embed_type" in options else {}
    report = judge(conditional(**options), inputs(), BF16 if "upcast_attention" in options else F32, **labels)
    assert not report.passed_on
    assert report.served.total() > 20


def test_added_keys_and_values():
    """The UNet of DeepFloyd and Kandinsky: SimpleCrossAttnDownBlock2D."""
    model = conditional(
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        resnet_time_scale_shift="scale_shift",
        cross_attention_norm="group_norm",
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    torch.manual_seed(0)
    args = [torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 5, 32)]
    report = judge(model, args, gradients=True)
    assert not report.passed_on
    assert report.served["float32, added keys, head_dim 8"] == 4
    assert report.served["float32, ResNet block, scale and shift, with its convolutions"] == 8
    assert report.served == judge(model, args, encoder_attention_mask=torch.tensor([[1] * 5, [1, 1, 0, 0, 1]])).served
    model.set_attn_processor(attention_processor.AttnAddedKVProcessor())
    assert report.served == judge(model, args).served


@pytest.mark.parametrize("processor", ["AttnAddedKVProcessor", "AttnAddedKVProcessor2_0", "SlicedAttnAddedKVProcessor"])
@pytest.mark.parametrize("only", [False, True])
def test_added_keys_and_values_without_a_text(processor, only):
    torch.manual_seed(0)
    made = getattr(attention_processor, processor)
    attn = attention_processor.Attention(
        query_dim=16, heads=2, dim_head=8, added_kv_proj_dim=16, norm_num_groups=4, bias=True, upcast_softmax=True,
        only_cross_attention=only, processor=made(1) if "Sliced" in processor else made(),
    ).eval()  # fmt: skip
    assert judge(attn, [torch.randn(2, 16, 5, 4)], gradients=True).served["float32, added keys, head_dim 8"] == 1


@pytest.mark.parametrize("options", [{"downsample_type": "resnet", "upsample_type": "resnet"}, {"add_attention": False},
                                     {"resnet_time_scale_shift": "scale_shift"}, {"attn_norm_num_groups": 4},
                                     {"mid_block_scale_factor": 2**0.5}, {"dropout": 0.3}], ids=str)  # fmt: skip
def test_options_of_the_unconditional_unet(options):
    args = [torch.randn(2, 3, 8, 8), torch.tensor([1, 2])]
    assert not judge(unconditional(**options), args).passed_on


# ---- attention: processors, masks, what a call brings ----


@pytest.mark.parametrize("name", ["AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "FusedAttnProcessor2_0"])
def test_processors(name):
    model = conditional()
    if name == "SlicedAttnProcessor":
        model.set_attention_slice(1)
    elif name == "FusedAttnProcessor2_0":
        model.fuse_qkv_projections()
    else:
        model.set_attn_processor(getattr(attention_processor, name)())
    assert {type(p).__name__ for p in model.attn_processors.values()} == {name}
    report = judge(model, inputs())
    assert not report.passed_on
    assert report.served["float32, self-attention, head_dim 8"] == 3


def test_processors_are_set_at_any_time():
    model, args = conditional(), inputs()
    expected = output(model, args)
    with accelerated.accelerate(model) as report, torch.no_grad():
        model.fuse_qkv_projections()
        torch.testing.assert_close(output(model, args), expected)
        assert not report.passed_on
        model.unfuse_qkv_projections()
        model.set_attn_processor(type("Own", (attention_processor.AttnProcessor2_0,), {})())
        torch.testing.assert_close(output(model, args), expected)
        assert report.passed_on == {"its processor is Own": 8}
        assert report.modules["mid_block.attentions.0.transformer_blocks.0.attn1"] == "its processor is Own"
        model.set_attn_processor(attention_processor.AttnProcessor2_0())
        assert "its processor is Own" not in report.modules.values()


@pytest.mark.parametrize("processor", ["AttnProcessor", "AttnProcessor2_0"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_masks(processor, dtype):
    model = conditional()
    model.set_attn_processor(getattr(attention_processor, processor)())
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    image = torch.ones(2, 64)
    image[0, ::3] = 0
    args = inputs()
    unmasked = output(model, args)
    assert not judge(model, args, dtype, encoder_attention_mask=mask).passed_on
    assert not torch.equal(output(model.float(), args, encoder_attention_mask=mask), unmasked)
    # at two sizes of the map no mask fits both: one level
    single = conditional(
        block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
    )
    single.set_attn_processor(getattr(attention_processor, processor)())
    assert not judge(single, args, dtype, attention_mask=image).passed_on


ATTENTION = [
    {"residual_connection": True, "rescale_output_factor": 1.3, "norm_num_groups": 4},
    {"scale_qk": False, "upcast_attention": True, "upcast_softmax": True},
    {"qk_norm": "layer_norm"},
    {"qk_norm": "rms_norm"},
    {"cross_attention_dim": 20, "cross_attention_norm": "layer_norm"},
    {"cross_attention_dim": 20, "cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 5},
    {"bias": True, "out_bias": False, "dropout": 0.2},
    {"out_dim": 32, "dim_head": 16},
]


@pytest.mark.parametrize("options", ATTENTION, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_options_of_attention(options, dtype):
    torch.manual_seed(0)
    attn = attention_processor.Attention(query_dim=16, **{"heads": 2, "dim_head": 8} | options).eval()
    x, text = torch.randn(4, 120, 16), torch.randn(4, 33, 20)  # the largest error of few numbers is mostly luck
    args = [x, text] if "cross_attention_dim" in options else [x]
    assert judge(attn, args, dtype, gradients=True).served.total() >= 1
    if "norm_num_groups" in options:
        assert not judge(attn, [torch.randn(2, 16, 5, 6)], dtype, gradients=True).passed_on
        assert not judge(attn, [torch.randn(2, 16, 5, 6).to(memory_format=torch.channels_last)], dtype).passed_on


def test_a_mask_for_each_head_and_a_mask_of_bools():
    torch.manual_seed(0)
    attn = attention_processor.Attention(query_dim=16, heads=2, dim_head=8).eval()
    x = torch.randn(3, 10, 16)
    for mask in (torch.randn(6, 1, 10), torch.randn(3, 10, 10), torch.rand(3, 1, 10) > 0.3, torch.randn(3, 10)):
        report = judge(attn, [x], run=lambda m, a, mask=mask: m(*a, attention_mask=_like(mask, a[0])))
        assert report.served.total() == 1


def _like(mask, x):
    return mask if mask.dtype == torch.bool else mask.to(x.dtype)


def test_spatial_norm():
    """The decoder of a MoVQ: the norms take the latents, which only diffusers' ResnetBlockCondNorm2D does."""
    torch.manual_seed(0)
    decoder = vae.Decoder(4, 3, ("UpDecoderBlock2D",) * 2, (32, 32), 1, norm_num_groups=8, norm_type="spatial").eval()
    z = torch.randn(2, 4, 6, 6)
    report = judge(decoder, [z, z], gradients=True)
    assert not report.passed_on
    assert report.served["float32, self-attention, head_dim 32"] == 1
    assert report.modules["mid_block.resnets.0"] == "ResnetBlockCondNorm2D: no kernel stands for it"


def test_ada_group_norm():
    torch.manual_seed(0)
    for act in (None, "silu"):
        norm = normalization.AdaGroupNorm(12, 16, 4, act_fn=act)
        args = [torch.randn(2, 16, 5, 5), torch.randn(2, 12)]
        assert judge(norm, args, gradients=True).served == {"float32, group norm with scale and shift": 1}


# ---- what is left to diffusers, and why ----


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("mid_block.resnets.0.norm2", "a hook on norm2"),
        ("mid_block.resnets.0.nonlinearity", "a hook on the activation"),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", "a hook on proj"),
        ("conv_norm_out", "a hook on the norm"),
        ("conv_act", "a hook on the activation"),
    ],
)
def test_hooks_are_called(path, reason):
    model, args, seen = conditional(), inputs(), []
    expected = output(model, args)
    module = model.get_submodule(path)
    with accelerated.accelerate(model) as report:
        handle = module.register_forward_hook(lambda m, given, y: seen.append((given[0].clone(), y.clone())))
        torch.testing.assert_close(output(model, args), expected)
        assert seen
        assert reason in report.modules.values()
        handle.remove()
        assert reason not in report.modules.values()
        before = len(seen)
        torch.testing.assert_close(output(model, args), expected)
        assert len(seen) == before
    hooked_alone = []
    module.register_forward_hook(lambda m, given, y: hooked_alone.append((given[0].clone(), y.clone())))
    output(model, args)
    torch.testing.assert_close(seen, hooked_alone)  # what a hook sees is what it sees with diffusers


def test_dropout_in_training():
    """The same draws: dropout is torch's module in both."""
    model, args = conditional(dropout=0.3).train(), inputs()
    torch.manual_seed(3)
    expected = output(model, args)
    with accelerated.accelerate(model) as report:
        torch.manual_seed(3)
        torch.testing.assert_close(output(model, args), expected)
        torch.manual_seed(4)
        assert not torch.allclose(output(model, args), expected)
    assert not report.passed_on


def test_unusual_layers():
    model, args = conditional(), inputs()
    model.mid_block.resnets[0].norm1 = nn.Identity()
    model.mid_block.resnets[1].nonlinearity = nn.Mish()
    expected = output(model, args)
    with accelerated.accelerate(model) as report:
        assert report.modules["mid_block.resnets.0"] == "norm1 is Identity"
        assert report.modules["mid_block.resnets.1"] == "the activation is Mish"
        torch.testing.assert_close(output(model, args), expected)
    assert report.passed_on == {"norm1 is Identity": 1, "the activation is Mish": 1}
    assert report.served["float32, group norm"] == 4 + 1 + 2  # of the transformers; norm2; norm1 and norm2


def test_forward_mode():
    model, (image, *others) = conditional(), inputs()
    model.set_attn_processor(attention_processor.AttnProcessor())  # PyTorch's fused attention has none
    tangent = torch.randn_like(image)

    def derivative():
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            y = output(model, [torch.autograd.forward_ad.make_dual(image, tangent), *others])
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    expected = derivative()
    with accelerated.accelerate(model) as report:
        torch.testing.assert_close(derivative(), expected)
    assert set(report.passed_on) == {"a transform of torch.func, or forward-mode derivatives"}
    # the head's activation stays with its norm
    assert set(report.served) == {
        "by PyTorch, a transform of torch.func, or forward-mode derivatives: group norm and activation",
        "an activation computed with its norm",
    }


def test_a_hook_on_all_modules():
    model, args, seen = conditional(), inputs(), []
    with accelerated.accelerate(model) as report, torch.no_grad():
        handle = nn.modules.module.register_module_forward_hook(lambda m, *given: seen.append(type(m).__name__))
        try:
            output(model, args)
        finally:
            handle.remove()
    ours = seen[:]
    seen.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *given: seen.append(type(m).__name__))
    try:
        output(model, args)
    finally:
        handle.remove()
    assert ours == seen
    assert "a hook on all modules" in report.passed_on


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_autocast(dtype):
    model, args = conditional().to(dtype), [a if a.dtype == torch.int64 else a.to(dtype) for a in inputs()]
    exact = output(conditional().double(), [a if a.dtype == torch.int64 else a.double() for a in args])
    with torch.autocast("cpu", torch.bfloat16):
        theirs = output(model, args)
        with accelerated.accelerate(model) as report:
            ours = output(model, args)
    assert ours.dtype == theirs.dtype
    assert report.passed_on == {"a convolution under autocast": 2}
    error = [(y.double() - exact).square().mean().sqrt() for y in (ours, theirs)]
    assert error[0] <= 1.1 * error[1]
