"""Sums over many tiles of queries and keys: their error must not outgrow eager's."""

import pytest
import torch

from genai_kernels.accuracy import verify_sample
from genai_kernels.ops.flash_attention.samples import heads_first
from genai_kernels.registry import OPS, Sample


@pytest.mark.parametrize("causal", [False, True])
def test_four_thousand_tokens(causal):
    sample = Sample("long", lambda m: heads_first(m, b=1, tq=4096, h=1, d=16, causal=causal))
    verdicts = verify_sample(OPS["flash_attention"], sample, torch.float32, draws=2)
    assert [f"{v.what}: {v.complaint}" for v in verdicts if not v.ok] == []
