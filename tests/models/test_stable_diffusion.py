"""python_models.stable_diffusion: sizes, configs, files; the UNets and the decoder against diffusers' own."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import genai_kernels as gk
from genai_kernels.accuracy import compare
from python_models import stable_diffusion as sd
from python_models import stable_diffusion_configs as configs
from python_models import stable_diffusion_files as files

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
SMALL = configs.UNet((16, 24), (1, 0), heads=(2, 3), context=12, layers=1, groups=8)
SMALL_XL = configs.UNet((16, 16, 32), (0, 1, 2), heads=(1, 2, 4), context=12, middle_transformers=2,
                        linear_projection=True, pooled=10, size_width=8, groups=8)  # fmt: skip
SMALL_DECODER = configs.Decoder((16, 24, 32), layers=1, groups=8)


@pytest.fixture(scope="module")
def diffusers():
    if sys.version_info < (3, 11):
        pytest.skip("diffusers 0.42 needs Python 3.11")
    return pytest.importorskip("diffusers", reason="diffusers is not installed")


# ---- sizes and configs ----


def test_parameters():
    """The figures of the papers: 860 M, 2.6 B and 49.5 M."""
    assert sd.count(configs.SD15) == 859_520_964
    assert sd.count(configs.SDXL) == 2_567_463_684
    assert sd.count(configs.KL_F8) == 49_490_199
    with torch.device("meta"):
        assert sum(p.numel() for p in sd.Decoder(configs.KL_F8).decoder.parameters()) == 49_490_179


# as the published config.json files have it
OF_SD15 = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
OF_SDXL = {
    "act_fn": "silu", "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
    "class_embed_type": None, "class_embeddings_concat": False, "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "num_attention_heads": None, "only_cross_attention": False,
    "projection_class_embeddings_input_dim": 2816, "resnet_time_scale_shift": "default", "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10], "upcast_attention": None, "use_linear_projection": True,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip


def test_configs_of_diffusers():
    assert configs.unet_from_diffusers(OF_SD15) == configs.SD15
    assert configs.unet_from_diffusers(OF_SDXL) == configs.SDXL
    for config in (configs.SD15, configs.SDXL, SMALL, SMALL_XL):
        assert configs.unet_from_diffusers(configs.unet_to_diffusers(config)) == config
    for config in (configs.KL_F8, configs.KL_F8_XL, SMALL_DECODER):
        assert configs.decoder_from_diffusers(configs.decoder_to_diffusers(config)) == config


@pytest.mark.parametrize(
    ("option", "value"),
    [("act_fn", "gelu"), ("resnet_time_scale_shift", "scale_shift"), ("class_embed_type", "timestep"),
     ("freq_shift", 1), ("addition_embed_type", "image"), ("layers_per_block", [1, 2, 2, 2]),
     ("time_cond_proj_dim", 256), ("up_block_types", ["UpBlock2D"] * 4), ("mid_block_type", None)],
)  # fmt: skip
def test_configs_that_are_refused(option, value):
    with pytest.raises(ValueError, match=f"config of a UNet: .*{option}.*: expected"):
        configs.unet_from_diffusers(OF_SD15 | {option: value})
    with pytest.raises(ValueError, match="config of a decoder: use_post_quant_conv: expected True, got False"):
        configs.decoder_from_diffusers(configs.decoder_to_diffusers(SMALL_DECODER) | {"use_post_quant_conv": False})


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="expected one for each of the 2 levels"):
        configs.UNet((32, 64), (1,), heads=(1, 1), context=4)
    with pytest.raises(ValueError, match="expected multiples of 32 groups"):
        configs.UNet((32, 48), (1, 1), heads=(1, 1), context=4)
    with pytest.raises(ValueError, match="channels: expected multiples"):
        configs.Decoder((48,))
    with torch.device("meta"):
        unet = sd.UNet(SMALL)
    with pytest.raises(ValueError, match=r"latents: expected sides divisible by 2, got \[1, 4, 5, 4\]"):
        unet(torch.randn(1, 4, 5, 4), torch.ones(1), torch.randn(1, 3, 12))
    with pytest.raises(ValueError, match="pooled, sizes: expected the pooled text"):
        sd.UNet(SMALL_XL)(torch.randn(1, 4, 4, 4), torch.ones(1), torch.randn(1, 3, 12))


# ---- the UNet ----


def arguments(config, dtype=F32, batch=2):
    torch.manual_seed(1)
    latents, text = torch.randn(batch, 4, 8, 12), torch.randn(batch, 5, config.context)
    more = {}
    if config.pooled:
        more = {
            "pooled": torch.randn(batch, config.pooled).to(dtype),
            "sizes": torch.tensor([[1024.0, 768, 0, 5, 512, 512]] * batch),
        }
    return [latents.to(dtype), torch.tensor([7, 981])[:batch], text.to(dtype)], more


def run_theirs(model, args, more):
    latents, when, text = args
    added = {"text_embeds": more["pooled"], "time_ids": more["sizes"]} if more else None
    return model(latents, when, text, added_cond_kwargs=added).sample


def in_double(args, more):
    return [a if a.dtype == torch.int64 else a.double() for a in args], {k: v.double() for k, v in more.items()}


def gradients_of(model, y):
    torch.manual_seed(2)
    dy = torch.randn(y.shape).to(BF16).to(y.dtype)
    learnt = dict(sorted(model.named_parameters()))
    return torch.cat([g.flatten() for g in torch.autograd.grad(y, list(learnt.values()), dy)])


@pytest.mark.parametrize("config", [SMALL, SMALL_XL], ids=["sd", "sdxl"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_unet_is_diffusers(diffusers, config, dtype):
    theirs = sd.diffusers_unet(config).to(dtype)
    ours = sd.same_weights(config, theirs)
    assert list(ours.state_dict().keys() ^ theirs.state_dict().keys()) == []
    exact = sd.in_float64(copy.deepcopy(theirs))
    args, more = arguments(config, dtype)
    exact_args = in_double(args, more)
    ways = [ours(*args, **more), run_theirs(theirs, args, more), run_theirs(exact, *exact_args)]
    verdict = compare("noise", *(y.detach() for y in ways), **sd.FACTORS)
    assert verdict.ok, verdict.complaint
    found = [gradients_of(m, y) for m, y in zip((ours, theirs, exact), ways, strict=True)]
    verdict = compare("gradients", *found, **sd.FACTORS)
    assert verdict.ok, verdict.complaint
    with gk.use_backend("reference"):  # the eager twin
        verdict = compare("twin", ours(*args, **more).detach(), ways[1].detach(), ways[2].detach(), **sd.FACTORS)
    assert verdict.ok, verdict.complaint
    assert not torch.equal(ours(args[0], args[1] + 1, args[2], **more), ways[0])
    assert not torch.equal(ours(args[0], args[1], args[2] + 1, **more), ways[0])


@pytest.mark.parametrize("config", [SMALL, SMALL_XL], ids=["sd", "sdxl"])
@torch.no_grad()
def test_a_prompt_is_read_once(config):
    torch.manual_seed(0)
    unet = sd.UNet(config)
    (latents, when, text), more = arguments(config)
    prompt = sd.Prompt()
    for step in range(3):
        expected = unet(latents, when - step, text, **more)
        given = text if step == 0 else torch.full_like(text, float("nan"))  # no longer read
        assert torch.equal(unet(latents, when - step, given, prompt=prompt, **more), expected)


# ---- the decoder ----


def decoder_and_theirs(diffusers, config=SMALL_DECODER, dtype=F32):
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**configs.decoder_to_diffusers(config)).eval().to(dtype)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p), alpha=0.2)
    ours = sd.Decoder(config).to(dtype)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k.startswith(("decoder.", "post_quant"))})
    return ours.eval(), theirs


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@torch.no_grad()
def test_decoder_is_diffusers(diffusers, dtype):
    ours, theirs = decoder_and_theirs(diffusers, dtype=dtype)
    latents = torch.randn(2, 4, 6, 5).to(dtype)
    exact = copy.deepcopy(theirs).double().decode(latents.double()).sample
    expected = theirs.decode(latents).sample
    for name, y in (("whole", ours(latents)), ("stream", ours.stream(latents, rows=4))):
        verdict = compare(name, y, expected, exact, **sd.FACTORS)
        assert verdict.ok, verdict.complaint
    with gk.use_backend("reference"):
        verdict = compare("twin", ours(latents), expected, exact, **sd.FACTORS)
    assert verdict.ok, verdict.complaint


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_stream_has_the_bits_of_the_whole(dtype):
    torch.manual_seed(0)
    decoder = sd.Decoder(SMALL_DECODER).to(dtype)
    latents = torch.randn(2, 4, 7, 6).to(dtype)
    with torch.no_grad():
        whole = decoder(latents)
    for rows in (1, 3, 8, 27, 28):
        assert torch.equal(decoder.stream(latents, rows=rows), whole), rows
    with pytest.raises(ValueError, match="rows: expected 1 or more, got 0"):
        decoder.stream(latents, rows=0)


@torch.no_grad()
def test_tiles_are_diffusers(diffusers):
    ours, theirs = decoder_and_theirs(diffusers)
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = 8, 32
    latents = torch.randn(1, 4, 19, 14)
    expected = theirs.tiled_decode(latents).sample
    torch.testing.assert_close(ours.tiles(latents, tile=8), expected, rtol=1e-4, atol=1e-5)
    whole = ours(latents)
    assert torch.equal(ours.stream(latents, rows=8), whole)
    assert (expected - whole).abs().max() > 1e-4
    torch.testing.assert_close(ours.tiles(latents, tile=32), whole)


MEMORY = """
import sys, torch, genai_kernels as gk
from python_models import stable_diffusion as sd, stable_diffusion_configs as configs

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
decoder = sd.Decoder(configs.Decoder((32, 64, 64), layers=1, groups=8))
latents = torch.randn(1, 4, 96, 96)
with torch.no_grad():
    decoder.stream(latents[:, :, :8, :8]), decoder(latents[:, :, :8, :8])  # whatever is made once
    for way in ("stream", "whole", "eager"):
        open("/proc/self/clear_refs", "w").write("5")  # VmHWM from here on
        before = peak()
        with gk.use_backend("reference" if way == "eager" else "auto"):
            decoder.stream(latents, rows=8) if way == "stream" else decoder(latents)
        print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_memory_of_a_stream():
    """Of the widest map, 64 x 384 x 384: it and half of it again, and bands. Eager has it three times and more."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stream, whole, eager = (int(n) / (4 * 64 * 384 * 384) for n in done.stdout.split())
    assert stream < 2.2
    assert stream < whole < eager
    assert eager > 3


# ---- files ----


def test_files_of_diffusers(diffusers, tmp_path):
    theirs = sd.diffusers_unet(SMALL)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    theirs.save_pretrained(tmp_path / "half", variant="fp16")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    args, more = arguments(SMALL)
    expected = sd.same_weights(SMALL, theirs)(*args, **more)
    for model in (files.load_unet(tmp_path / "one"), files.load_unet(tmp_path / "shards"),
                  files.load_unet(tmp_path / "half", variant="fp16")):  # fmt: skip
        assert model.config == SMALL
        assert torch.equal(model(*args, **more), expected)
    assert {p.dtype for p in files.load_unet(tmp_path / "one", dtype=BF16).parameters()} == {BF16}
    files.save_unet(sd.same_weights(SMALL, theirs), tmp_path / "ours")
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in theirs.state_dict().items())


def test_files_of_a_decoder(diffusers, tmp_path):
    ours, theirs = decoder_and_theirs(diffusers)
    theirs.save_pretrained(tmp_path)
    latents = torch.randn(1, 4, 5, 5)
    assert torch.equal(files.load_decoder(tmp_path)(latents), ours(latents))
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, t in load_file(path).items():
        for ours_name, theirs_name in new.items():
            name = name.replace(f"attentions.0.{ours_name}.", f"attentions.0.{theirs_name}.")
        old[name] = t
    save_file(old, path)
    assert torch.equal(files.load_decoder(tmp_path)(latents), ours(latents))


def test_files_that_are_refused(tmp_path):
    torch.manual_seed(0)
    with pytest.raises(FileNotFoundError, match=r"expected config\.json in"):
        files.load_unet(tmp_path)
    files.save_unet(sd.UNet(SMALL), tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = load_file(path)
    cases = [
        ({k: v for k, v in whole.items() if k != "conv_in.bias"}, "none named conv_in.bias"),
        (whole | {"conv_mid.bias": torch.ones(1)}, "also conv_mid.bias"),
        (whole | {"conv_in.bias": torch.ones(3)}, r"conv_in.bias: expected shape \[16\], got \[3\]"),
        (whole | {"conv_in.bias": torch.ones(16, dtype=torch.int8)}, "conv_in.bias: expected one of F32.* got I8"),
    ]
    for tensors, message in cases:
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            files.load_unet(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        files.load_unet(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected diffusion_pytorch_model\.safetensors or"):
        files.load_unet(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(configs.unet_to_diffusers(SMALL) | {"act_fn": "mish"}))
    with pytest.raises(ValueError, match="act_fn: expected 'silu', got 'mish'"):
        files.load_unet(tmp_path)


def test_command(capsys):
    assert sd.main([]) == 0
    assert "859,520,964 parameters" in capsys.readouterr().out
