"""The benchmarks' own code: README agrees with the committed results, and a short run writes what the report reads."""

import json

import pytest
import torch

from benchmarks import peft_model, report, run
from genai_kernels.cli.bench import load


def test_readme_agrees_with_the_committed_results():
    for path, text in report.expected_files(report.results()).items():
        assert path.read_text() == text, f"{path.name} is out of date: run `python -m benchmarks.report`"


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A result of rms_norm alone, measured shortly, with a small buffer for the rate of memory."""
    path = tmp_path_factory.mktemp("run") / "machine.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("genai_kernels.cli.machine._memory_bytes", lambda: 2**26)
        options = ["--quick", "--op", "rms_norm", "--dtype", "bf16", "--threads", "1", "--seconds", "0.01"]
        code = run.main([*options, "--no-compile", "--out", str(path)])
    assert code == 0
    return path


def test_a_run_writes_what_the_report_reads(short_run, tmp_path):
    found = load(short_run)
    assert {case["op"] for case in found["cases"]} == {"rms_norm"}
    assert [row["mode"] for row in found["overhead"]] == ["inference_mode", "no_grad", "autograd"]
    block = report.readme_block({"machine": found})
    assert "| rms_norm | bfloat16 | forward | 1 |" in block
    assert "| rms_norm | bfloat16 | backward | 1 |" in block
    assert found["machine"]["id"] in report.page("machine", found)
    images = report.draw("machine", found, tmp_path)
    report.report.html_report(tmp_path / "r.html", "t", report.sections(found, images))
    assert (tmp_path / "r.html").read_text().count("data:image/png") == len(images) > 0


def test_cases_replace_their_like_only(short_run, tmp_path):
    found = load(short_run)
    other = json.loads(json.dumps(found))
    for case in other["cases"] + other["overhead"]:
        case["op"] = "another"
    path = tmp_path / "old.json"
    path.write_text(json.dumps(other))
    both = run.merged(json.loads(json.dumps(found)), path)
    assert [case["op"] for case in both["cases"]] == ["another"] * 2 + ["rms_norm"] * 2
    other["machine"]["id"] = "another machine"
    path.write_text(json.dumps(other))
    assert len(run.merged(found, path)["cases"]) == 2


def test_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="expected the markers"):
        report.with_block("text", "block")
    changed = report.with_block(f"a\n{report.BEGIN}\nold\n{report.END}\nb", "new\n")
    assert changed == f"a\n{report.BEGIN}\nnew\n{report.END}\nb"


@pytest.mark.parametrize(
    ("sample", "kind"),
    [("512x4096", ""), ("n2048_d64", ""), ("n2048_d64_causal", "causal"), ("n4096_d64_window256", "window")],
)
def test_kind_of_a_sample(sample, kind):
    assert report.kind(sample) == kind


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_peft_model_is_checked_and_timed(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(peft_model, "HIDDEN", 96)
    options = ["--dtype", dtype, "--threads", "1", "--seconds", "0.001", "--out", str(tmp_path / "found.json")]
    assert peft_model.main(options) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    committed = json.loads((peft_model.RESULTS / f"llama_{dtype}.json").read_text())
    assert [c["what"] for c in found["cases"]] == [c["what"] for c in committed["cases"]]
    assert all(set(c["timings"]) == {peft_model.PEFT, peft_model.OURS, peft_model.BASE} for c in found["cases"])


def test_a_wrong_peft_model_gets_no_speed(monkeypatch):
    monkeypatch.setattr(peft_model, "HIDDEN", 96)
    models = peft_model.build(torch.float32)
    next(p for name, p in models[peft_model.OURS].named_parameters() if "lora_B" in name).data[0] += 0.01
    with pytest.raises(SystemExit, match="no speed is shown for a wrong result"):
        peft_model.case(models, "forward", (1, 4), 0.001)
