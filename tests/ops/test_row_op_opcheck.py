"""torch.library.opcheck on every torch op of the row-wise ops, with and without gradients."""

import pytest
import torch

import genai_kernels  # noqa: F401  registers the ops

OPS = torch.ops.genai_kernels


def r(*shape):
    return torch.randn(shape)


CASES = {
    "rms_norm": lambda: (r(3, 8), r(8), 1e-6),
    "rms_norm_out": lambda: (r(3, 8), r(8), 1e-6, r(3, 8)),
    "rms_norm_bwd": lambda: (r(3, 8), r(3, 8), r(8), 1e-6, True),
    "fused_add_rms_norm": lambda: (r(3, 8), r(3, 8), r(8), 1e-6),
    "fused_add_rms_norm_out": lambda: (r(3, 8), r(3, 8), r(8), 1e-6, r(3, 8), r(3, 8)),
    "fused_add_rms_norm_bwd": lambda: (r(3, 8), r(3, 8), r(3, 8), r(8), 1e-6, True),
    "layer_norm": lambda: (r(3, 8), r(8), r(8), 1e-6),
    "layer_norm_out": lambda: (r(3, 8), r(8), r(8), 1e-6, r(3, 8)),
    "add_layer_norm": lambda: (r(3, 8), r(3, 8), r(8), r(8), 1e-6),
    "add_layer_norm_out": lambda: (r(3, 8), r(3, 8), r(8), r(8), 1e-6, r(3, 8), r(3, 8)),
    "layer_norm_bwd": lambda: (r(3, 8), None, r(3, 8), r(8), r(8), 1e-6, True, True),
    "silu_and_mul": lambda: (r(3, 8),),
    "silu_and_mul_out": lambda: (r(3, 8), r(3, 4)),
    "silu_and_mul_bwd": lambda: (r(3, 4), r(3, 8)),
    "gelu_and_mul": lambda: (r(3, 8),),
    "gelu_and_mul_out": lambda: (r(3, 8), r(3, 4)),
    "gelu_and_mul_bwd": lambda: (r(3, 4), r(3, 8)),
    "gelu_tanh_and_mul": lambda: (r(3, 8),),
    "gelu_tanh_and_mul_out": lambda: (r(3, 8), r(3, 4)),
    "gelu_tanh_and_mul_bwd": lambda: (r(3, 4), r(3, 8)),
    "rotary_embedding": lambda: (r(3, 2, 8), r(9, 4), r(9, 4), torch.tensor([0, 8, 3]), False, False),
    "rotary_embedding_out": lambda: (r(3, 2, 8), r(3, 4), r(3, 4), None, True, False, r(3, 2, 8)),
}
BACKWARD = ("test_schema", "test_faketensor")  # a backward op is not differentiable itself, and says so


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, requires_grad):
    args = CASES[name]()
    op = getattr(OPS, name).default
    if name.endswith("_out") or (requires_grad and name.endswith("_bwd")):
        torch.library.opcheck(op, args, test_utils=BACKWARD)
        return
    if requires_grad:
        args = tuple(a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    torch.library.opcheck(op, args)
