"""Small models of diffusers with random weights, and the comparison that their accelerated twins are held to."""

import copy
import sys

import pytest
import torch

if sys.version_info < (3, 11):
    pytest.skip("diffusers 0.42 needs Python 3.11", allow_module_level=True)
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
diffusers.utils.logging.set_verbosity_error()

from diffusers.models import activations, attention_processor, normalization, resnet  # noqa: E402, F401  for the tests
from diffusers.models.autoencoders import vae  # noqa: E402, F401

from genai_kernels.accuracy import compare  # noqa: E402  not before the skips
from genai_kernels.integrations import diffusers as accelerated  # noqa: E402

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# How far two eager computations of a whole model may be apart: the widest of any op's, attention's backward.
FACTORS = {"k": 1.5, "k_rms": 1.1}
# The error of a whole model's gradients over that of eager is 0.7 to 1.7, from draw to draw, and 1.0 in the mean.
OF_GRADIENTS = {"k": 3, "k_rms": 2}


def randomise(model, seed=0):
    """Norms and biases that do something: their own start at one and zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.eval()


def conditional(**options):
    """A UNet of Stable Diffusion's kind."""
    given = {
        "sample_size": 8, "block_out_channels": (16, 24), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 12, "attention_head_dim": 2,
    }  # fmt: skip
    return randomise(diffusers.UNet2DConditionModel(**given | options))


def unconditional(**options):
    given = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }  # fmt: skip
    return randomise(diffusers.UNet2DModel(**given | options))


def autoencoder(**options):
    given = {
        "block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 4, "sample_size": 16,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    return randomise(diffusers.AutoencoderKL(**given | options))


def inputs(dtype=F32, batch=2, size=8, tokens=5, seed=0):
    """Image, time and text for `conditional`."""
    torch.manual_seed(seed)
    image, text = torch.randn(batch, 4, size, size), torch.randn(batch, tokens, 12)
    return image.to(dtype), torch.tensor([7, 400])[:batch], text.to(dtype)


def moved(args, dtype):
    return [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def output(model, args, **kwargs):
    found = model(*args, **kwargs)
    return getattr(found, "sample", found)


def redrawn(args, draw):
    """Other images and texts, but for the first draw."""
    torch.manual_seed(draw)
    return [torch.randn(a.shape) if draw and a.is_floating_point() and a.dim() > 1 else a for a in args]


def judge(model, args, dtype=F32, gradients=False, run=output, **kwargs):
    """Ours no further from float64 than diffusers' own, outputs and gradients. Returns the report.

    Of several draws where there are gradients, and by OF_GRADIENTS: what the first layers round goes through all the
    others and into every gradient, amplified differently in every draw. The report is that of the first.
    """
    model = model.to(dtype)
    ours, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    report = accelerated.accelerate(ours)
    report.model = ours  # which the report itself does not keep alive
    found = []
    for draw in range(3 if gradients else 1):
        for m, to in ((ours, dtype), (model, dtype), (exact, F64)):
            given = moved(moved(redrawn(args, draw), dtype), to)
            with torch.set_grad_enabled(gradients):
                y = run(m, given, **kwargs)
            tensors = [y.detach().flatten()]
            if gradients:
                learnt = [p for p in m.parameters() if p.requires_grad]
                torch.manual_seed(1)
                dy = torch.randn(y.shape).to(BF16).to(y.dtype)  # the same numbers in every dtype
                each = torch.autograd.grad(y, learnt, dy, allow_unused=True)
                tensors.append(torch.cat([g.flatten() for g in each if g is not None]))
            found.append(tensors)
        if draw == 0:
            counted = report.served.copy(), report.passed_on.copy()
    report.served, report.passed_on = counted
    of_each = [[torch.cat(draws) for draws in zip(*found[way::3], strict=True)] for way in range(3)]
    for what, ways in zip(("output", "gradients"), zip(*of_each, strict=True), strict=False):
        if dtype == F64:  # diffusers' own is the reference
            torch.testing.assert_close(ways[0], ways[1], rtol=1e-12, atol=1e-12)
            continue
        verdict = compare(what, *ways, **(FACTORS if what == "output" else OF_GRADIENTS))
        assert verdict.ok, verdict.complaint
        assert verdict.eager_error > 0, "nothing was compared"
    return report
