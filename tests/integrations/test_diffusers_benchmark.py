"""benchmarks.diffusers_model on tiny models: every case is checked before it is timed."""

import json

import pytest
import torch
from diffusers_models import autoencoder, conditional

from benchmarks import diffusers_model as benchmark


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_are_checked_and_timed(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "unet", lambda: conditional(cross_attention_dim=768))
    monkeypatch.setattr(benchmark, "decoder", lambda: autoencoder().decoder)
    out = tmp_path / "found.json"
    options = ["--dtype", dtype, "--threads", "1", "--seconds", "0.001", "--out", str(out)]
    assert benchmark.main(options) == 0
    found = json.loads(out.read_text())
    committed = json.loads((benchmark.RESULTS / f"diffusers_{dtype}.json").read_text())
    assert {c["what"] for c in committed["cases"]} <= {c["what"] for c in found["cases"]}
    assert all({benchmark.THEIRS, benchmark.OURS} <= set(c["timings"]) for c in found["cases"])
    assert benchmark.main([*options, "--only", "decoder"]) == 0
    assert {c["what"] for c in json.loads(out.read_text())["cases"]} == {c["what"] for c in found["cases"]}


def test_a_wrong_model_gets_no_speed(monkeypatch):
    accelerate = benchmark.integration.accelerate

    def wrong(model, **options):
        model.conv_out.bias.data[0] += 0.1
        return accelerate(model, **options)

    monkeypatch.setattr(benchmark.integration, "accelerate", wrong)
    with pytest.raises(SystemExit, match="no speed is shown for a wrong result"):
        benchmark.case("decoder", lambda: autoencoder().decoder, [torch.randn(1, 4, 4, 4)], torch.float32, 0.001)
