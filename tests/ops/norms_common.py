"""Calls of the row-wise ops, for the tests that hold for all of them."""

import torch

import genai_kernels as gk

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def rms(x, w, b):
    return (gk.rms_norm(x, w),)


def fused(x, w, b):
    return gk.fused_add_rms_norm(x, x.flip(-1), w)


def layer(x, w, b):
    return (gk.layer_norm(x, w, b),)


def layer_residual(x, w, b):
    return gk.layer_norm(x, w, b, residual=x.flip(-1))


def silu(x, w, b):
    return (gk.silu_and_mul(x),)


def gelu(x, w, b):
    return (gk.gelu_and_mul(x),)


def gelu_tanh(x, w, b):
    return (gk.gelu_tanh_and_mul(x),)


def rotary(x, w, b):
    angle = torch.arange(x.shape[-1] // 2, dtype=torch.float32).expand(x.shape[0], -1) * 0.1
    return (gk.rotary_embedding(x.unsqueeze(1), angle.cos(), angle.sin()),)


NORMS = (rms, fused, layer, layer_residual)
CALLS = (*NORMS, silu, gelu, gelu_tanh, rotary)
