"""What diffusion models run, as it is timed on a GPU."""

from __future__ import annotations

import torch

import genai_kernels as gk

from .case import Case, Function, Tensors


def group_norm(batch: int, channels: int, size: int, last: bool = False, backward: bool = False) -> Case:
    """Group norm and SiLU at a level of a UNet, channels first or last."""
    from genai_kernels.registry import OPS

    def make(device: str, dtype: torch.dtype) -> Tensors:
        x = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
        parameters = (torch.randn(channels, device=device, dtype=dtype) for _ in range(2))
        return (x.contiguous(memory_format=torch.channels_last) if last else x, *parameters)

    def of_two(function: Function) -> Function:
        return lambda x, weight, bias: function(x, min(channels, 32), weight, bias)

    reference = of_two(OPS["group_norm_silu"].reference)
    peers = {"compiled": torch.compile(reference, dynamic=False), "eager": reference}
    name = f"{batch}x{channels}x{size}x{size}" + (" last" if last else "")
    elements = (3 if backward else 2) * batch * channels * size * size
    op = "group_norm_silu"
    return Case(op, name, make, of_two(getattr(gk, op)), peers, reference, backward, elements=elements)


def convolution(
    batch: int, channels: int, size: int, norm: bool = False, last: bool = True, backward: bool = False
) -> Case:
    """3 x 3, and half of a residual block with the norm: what stands before and after the convolution is in it too."""
    from genai_kernels.registry import OPS

    def make(device: str, dtype: torch.dtype) -> Tensors:
        x, residual = (torch.randn(batch, channels, size, size, device=device, dtype=dtype) for _ in range(2))
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype) / (3 * channels**0.5)
        images = (t.contiguous(memory_format=torch.channels_last) if last else t for t in (x, residual))
        parameters = torch.randn(3, channels, device=device, dtype=dtype)
        return (*images, weight.contiguous(memory_format=torch.channels_last) if last else weight, *parameters)

    def block(function: Function) -> Function:
        def run(
            x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gamma: torch.Tensor,
            beta: torch.Tensor,
        ) -> torch.Tensor:  # fmt: skip
            before = gk.GroupNormPrologue(min(channels, 32), gamma, beta) if norm else None
            result: torch.Tensor = function(x, weight, bias, padding=1, norm=before, residual=residual)
            return result

        return run

    op = "conv2d"
    reference = block(OPS[op].reference)
    peers = {"compiled": torch.compile(reference, dynamic=False), "eager": reference}
    name = f"{batch}x{channels}x{size}x{size}" + (" norm" if norm else "") + ("" if last else " first")
    flops = (2 if backward else 1) * 18.0 * batch * channels**2 * size**2
    return Case(op, name, make, block(getattr(gk, op)), peers, reference, backward, flops=flops)


def upsampled(batch: int, channels: int, size: int, backward: bool = False) -> Case:
    """Operations are those of the convolution of the larger map."""
    from genai_kernels.registry import OPS

    def make(device: str, dtype: torch.dtype) -> Tensors:
        x = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype) / (3 * channels**0.5)
        return x.contiguous(memory_format=torch.channels_last), weight

    op = "up_conv2d"
    reference = OPS[op].reference
    peers = {"compiled": torch.compile(reference, dynamic=False), "eager": reference}
    flops = (2 if backward else 1) * 72.0 * batch * channels**2 * size**2
    name = f"{batch}x{channels}x{size}x{size}"
    return Case(op, name, make, getattr(gk, op), peers, reference, backward, flops=flops)


def sampler_step(batch: int, size: int) -> Case:
    """A guided step of DDIM on latents of 4 channels."""
    from genai_kernels.registry import OPS

    step = gk.StepCoefficients(1.31, -0.85, model=0.41, x0=0.91)

    def make(device: str, dtype: torch.dtype) -> Tensors:
        return tuple(torch.randn(batch, 4, size, size, device=device, dtype=dtype) for _ in range(3))

    def of_three(function: Function) -> Function:
        return lambda x, cond, uncond: function(x, cond, step, uncond=uncond, guidance_scale=7.5)

    op = "cfg_step"
    reference = of_three(OPS[op].reference)
    peers = {"compiled": torch.compile(reference, dynamic=False), "eager": reference}
    name, elements = f"{batch}x4x{size}x{size}", 4.0 * batch * 4 * size * size
    return Case(op, name, make, of_three(getattr(gk, op)), peers, reference, elements=elements)
