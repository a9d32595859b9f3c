"""Small models with PEFT's adapters, for the tests of genai_kernels.integrations.peft."""

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def randomise(model, seed=0):
    """Adapters that add something: PEFT's own start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def one_layer(*names, dtype=F32, adapter_dtype=F32, conv1d=False, bias=True, r=4, **options):
    """A lora.Linear of 40 -> 24 in a model, with adapters of ranks 4, 5, ...: all of them active.

    Their scalings are 2, 1, 0.5: a power of two rounds nothing, so that it makes no difference to the few rows here
    whether it multiplies S = x A' or the gradient.
    """
    from transformers.pytorch_utils import Conv1D

    base = Conv1D(24, 40) if conv1d else nn.Linear(40, 24, bias=bias)
    nn.init.normal_(base.weight, std=0.2)
    if bias:
        nn.init.normal_(base.bias)
    model = nn.ModuleDict({"layer": base.to(dtype)})
    names = names or ("default",)
    for i, name in enumerate(names):
        alpha = (r + i) * 2.0 ** (1 - i)
        config = peft.LoraConfig(r=r + i, lora_alpha=alpha, target_modules=["layer"], fan_in_fan_out=conv1d, **options)
        model = peft.get_peft_model(model, config, name) if i == 0 else (model.add_adapter(name, config), model)[1]
    model.base_model.set_adapter(list(names))
    for name, p in randomise(model).named_parameters():
        if "lora_" in name:
            p.data = p.data.to(adapter_dtype)
    return model


def layer_of(model):
    return model.base_model.model["layer"]


def learnt(model):
    return [p for p in model.parameters() if p.requires_grad]
