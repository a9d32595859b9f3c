"""A model of diffusers taken over and given back: state, copies, files, LoRA, torch.compile, pipelines, the report."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers_models import (
    F64,
    accelerated,
    activations,
    autoencoder,
    conditional,
    diffusers,
    inputs,
    judge,
    normalization,
    output,
    resnet,
)
from torch import nn

import genai_kernels as gk


def everything(model):
    """What a model is, down to the objects in it."""
    return {
        name: (type(m), {k: id(v) for k, v in vars(m).items()}, {k: id(v) for k, v in m.named_parameters()})
        for name, m in model.named_modules()
    }


def test_restored_as_it_was():
    model, args = conditional(), inputs()
    before, states, text, expected = (
        everything(model),
        copy.deepcopy(model.state_dict()),
        repr(model),
        output(model, args),
    )
    accelerated.accelerate(model)
    assert everything(model) != before
    assert repr(model) == text
    assert list(model.state_dict()) == list(states)
    assert isinstance(model.mid_block.resnets[0], resnet.ResnetBlock2D)
    output(model, args)
    accelerated.restore(model)
    assert everything(model) == before
    assert torch.equal(output(model, args), expected)
    with accelerated.accelerate(model), accelerated.accelerate(model):
        assert everything(model) != before
    assert everything(model) == before
    with pytest.raises(KeyError), accelerated.accelerate(model):
        raise KeyError
    accelerated.restore(model)
    assert everything(model) == before
    assert all(torch.equal(t, states[name]) for name, t in model.state_dict().items())


def test_the_inner_of_two_leaves_the_outer():
    model, args = conditional(), inputs()
    with accelerated.accelerate(model) as outer:
        with accelerated.accelerate(model) as inner:
            output(model, args)
        assert inner.served.total() == 0
        assert outer.served.total() > 0
        assert "attention" in outer.modules.values()


def test_a_report_that_nobody_holds_is_replaced():
    model = conditional()
    accelerated.accelerate(model)
    with accelerated.accelerate(model) as report:
        output(model, inputs())
        assert report.served.total() > 0
    assert "not taken over: call accelerate again" in report.modules.values()


def test_part_of_a_model_is_restored():
    model, args = conditional(), inputs()
    expected = output(model, args)
    for part in (model.conv_norm_out, model.conv_act, model.mid_block):
        report = accelerated.accelerate(model)
        accelerated.restore(part)
        torch.testing.assert_close(output(model, args), expected)
        assert "not taken over: call accelerate again" in report.modules.values() or part is model.conv_act
        accelerated.restore(model)


def test_a_forward_that_someone_kept_serves_as_diffusers_own():
    model, args = conditional(), inputs()
    x = torch.randn(1, 16, 4, 4)
    expected = model.conv_norm_out(x)
    with accelerated.accelerate(model) as report:
        kept = model.conv_norm_out.forward
    assert torch.equal(kept(x), expected)
    assert not report.served
    model.conv_norm_out.forward = lambda x: x
    with accelerated.accelerate(model) as report:
        assert report.modules["conv_norm_out"] == "it has a forward of its own"
        assert "conv_act" not in report.modules
        output(model, args)


def test_copies_and_pickles():
    model, args = conditional(), inputs()
    theirs = output(model, args)
    report = accelerated.accelerate(model)
    ours, calls = output(model, args), report.served.total()
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, args), ours)
    assert report.served.total() == 2 * calls
    assert twin.conv_norm_out.__dict__["_genai_kernels"].partner is twin.conv_act
    accelerated.restore(twin)
    assert type(twin.conv_act) is nn.SiLU
    assert torch.equal(output(twin, args), theirs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    data = pickle.dumps(model)
    assert b"genai_kernels" not in data
    assert b"genai_kernels" not in file.getvalue()
    for read in (torch.load(file, weights_only=False), pickle.loads(data)):
        assert type(read.mid_block.resnets[0]) is resnet.ResnetBlock2D
        assert torch.equal(output(read, args), theirs)


def test_saved_alike(tmp_path):
    model = conditional()
    model.save_pretrained(tmp_path / "before")
    with accelerated.accelerate(model):
        model.save_pretrained(tmp_path / "after")
    files = sorted(p.name for p in (tmp_path / "before").iterdir())
    assert len(files) == 2
    for file in files:
        assert (tmp_path / "after" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()
    read = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "after").eval()
    assert torch.equal(output(read, inputs()), output(model, inputs()))


# ---- LoRA, gradient checkpointing, torch.compile ----


@pytest.fixture
def with_lora():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = conditional()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "proj", "conv1", "time_emb_proj"]))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.3
    return model.eval()


def test_lora_inside(with_lora):
    model, args = with_lora, inputs()
    report = judge(model, args, gradients=True)  # the gradients of the adapters
    assert not report.passed_on
    assert report.served["float32, GEGLU, 1 adapter"] == 4
    assert report.served["float32, ResNet block"] == 8  # conv1 is an adapter's
    adapted = output(model, args)
    model.disable_adapters()
    assert not torch.equal(output(model, args), adapted)
    assert judge(model, args).served["float32, self-attention, head_dim 8"] == 3


def test_lora_loaded_later_and_both_integrations(with_lora):
    from genai_kernels.integrations import peft as accelerated_peft

    model, args = with_lora, inputs()
    expected = output(model, args)
    with accelerated.accelerate(model) as report, accelerated_peft.accelerate(model) as of_peft:
        torch.testing.assert_close(output(model, args), expected)
        assert of_peft.served.total() > 0
        assert report.served.total() > 0
    plain = conditional()
    base = output(plain, args)
    with accelerated.accelerate(plain) as report:
        import peft

        plain.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "proj"], init_lora_weights=False), "one")
        adapted = output(plain, args)
        assert not torch.equal(adapted, base)
        assert report.served["float32, GEGLU, 1 adapter"] == 4
        plain.add_adapter(peft.LoraConfig(r=3, target_modules=["proj"], init_lora_weights=False), "two")
        plain.set_adapters(["one", "two"])
        both = output(plain, args)
        assert report.served["float32, GEGLU, 2 adapters"] == 4
        plain.disable_adapters()
        torch.testing.assert_close(output(plain, args), base)
        plain.enable_adapters()
        with torch.no_grad():
            plain.fuse_lora()
            torch.testing.assert_close(output(plain, args), both, rtol=1e-4, atol=1e-5)
            plain.unfuse_lora()
        assert not report.passed_on
        plain.add_adapter(peft.LoraConfig(r=3, target_modules=["proj"], use_dora=True), "three")
        plain.set_adapters(["three"])
        assert "DoRA" in report.modules.values()
        found = output(plain, args)
    torch.testing.assert_close(output(plain, args), found)
    assert report.passed_on == {"DoRA": 4}


def losses_of(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, args = [], inputs(F64)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = output(model, args).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(checkpointing):
    model = conditional().double().train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    ours = copy.deepcopy(model)
    expected = losses_of(model)
    report = accelerated.accelerate(ours)
    assert expected[-1] < expected[0]
    torch.testing.assert_close(losses_of(ours), expected)
    torch.testing.assert_close(ours.state_dict(), model.state_dict())
    assert not report.passed_on


def test_torch_compile():
    model, args = conditional().double(), inputs(F64)
    expected = output(model, args)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    with accelerated.accelerate(model) as report:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        y = output(compiled, args)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), list(model.parameters())), gradients)
        assert report.served["float64, ResNet block, with its convolutions"] == 8
        assert not report.passed_on
    torch.compiler.reset()


# ---- pipelines ----


def pipeline():
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(), unet=conditional(), text_encoder=None, tokenizer=None,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def test_pipeline():
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 5, 12)

    def paint():
        return pipe(
            prompt_embeds=text, negative_prompt_embeds=text * 0, num_inference_steps=3, height=16, width=16,
            generator=torch.Generator().manual_seed(0), output_type="pt",
        ).images  # fmt: skip

    expected = paint()
    with accelerated.accelerate(pipe) as report:
        torch.testing.assert_close(paint(), expected)
        names = {name.split(".")[0] for name in report.modules}
        assert names == {"unet", "vae", "scheduler"}
        assert report.modules["scheduler"] == "scheduler"
        assert report.served["float32, DDIM step"] == 3
        assert report.served["float32, ResNet block, with its convolutions"] > 3 * 8
        assert not report.passed_on
    assert torch.equal(paint(), expected)
    accelerated.accelerate(pipe)
    accelerated.restore(pipe)
    assert torch.equal(paint(), expected)


# ---- the report, and what is refused ----


def test_the_report():
    model = nn.ModuleDict(
        {
            "block": resnet.ResnetBlock2D(in_channels=32, temb_channels=None),
            "norm": nn.LayerNorm([2, 4]),
            "rms": normalization.RMSNorm(4, 1e-6),
            "ff": activations.GEGLU(4, 4),
        }
    )
    report = accelerated.accelerate(model)
    for _ in range(2):
        model["block"](torch.ones(1, 32, 2, 2), None)
    model["ff"](torch.ones(1, 4))
    model["norm"](torch.ones(1, 2, 4))
    assert str(report) == (
        "modules on genai_kernels: 4\n"
        "       2  group norm\n"
        "       1  ResNet block\n"
        "       1  GEGLU\n"
        "modules left to diffusers: 2\n"
        "          norm: a norm over 2 dimensions\n"
        "          rms: RMSNorm: no kernel stands for it\n"
        "calls served by genai_kernels: 3\n"
        "       2  float32, ResNet block, with its convolutions\n"
        "       1  float32, GEGLU\n"
        "calls passed on to diffusers: 1\n"
        "       1  a norm over 2 dimensions (norm)"
    )
    assert report.where == {"a norm over 2 dimensions": {"norm": 1}}


def test_a_model_without_such_layers_is_refused():
    for model, name in ((nn.Linear(2, 2), "Linear"), ("text", "str")):
        with pytest.raises(ValueError, match=f"expected a pipeline or a module with layers .* got {name} without"):
            accelerated.accelerate(model)


def test_importing_imports_no_diffusers():
    code = "import sys; import genai_kernels.integrations.diffusers; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_the_eager_twin():
    model, args = conditional(), inputs()
    expected = output(model, args)
    accelerated.accelerate(model)
    with gk.use_backend("reference"):
        torch.testing.assert_close(output(model, args), expected)
