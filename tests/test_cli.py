"""The commands: exit codes, what they refuse, and what they write."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import genai_kernels as gk
from genai_kernels import cli
from genai_kernels.accuracy import verify_sample
from genai_kernels.cli import console, doctor, report
from genai_kernels.cli.plots import Line, line_plot
from genai_kernels.cli.report import Section
from genai_kernels.cli.timing import interleaved, peak_memory
from genai_kernels.registry import OPS, Accuracy, Op, Part, Sample

PACKAGE = Path(gk.__file__).parent


def command(*arguments, cwd=None, package_root=PACKAGE.parent, **environment):
    """Runs `python -m genai_kernels ...` in a process of its own."""
    variables = {**os.environ, "PYTHONPATH": str(package_root), **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-m", "genai_kernels", *arguments],
        capture_output=True, text=True, env=variables, cwd=cwd or package_root, timeout=300,
    )  # fmt: skip


def scaled(factor):
    """An op named `planted` whose result is wrong by `factor`."""

    def reference(x):
        return x * 2.0

    def function(x):
        return x * (2.0 * factor)

    samples = [
        Sample("small", lambda m: ((m(3, 5),), {})),
        Sample("64x64", lambda m: ((m(64, 64),), {}), bench=True, elements=2 * 4096, backward_elements=2 * 4096),
    ]
    return Op("planted", function, reference, samples, Accuracy(), peers={"twice": lambda x: x + x})


@pytest.fixture
def planted(monkeypatch):
    """Registers a wrong op beside the others and gives its name."""
    monkeypatch.setitem(OPS, "planted", scaled(1.01))
    return "planted"


@pytest.fixture
def planted_right(monkeypatch):
    monkeypatch.setitem(OPS, "planted", scaled(1.0))
    return "planted"


# ---- the command line ----


def test_no_command_and_an_unknown_one(capsys):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    assert cli.main(["bech"]) == 2
    assert "got 'bech'" in capsys.readouterr().err


def test_an_unknown_option_is_refused():
    with pytest.raises(SystemExit) as exit:
        cli.main(["verify", "--ops", "rms_norm"])
    assert exit.value.code == 2


# ---- doctor ----


def test_doctor_names_the_instruction_set_that_was_forced():
    result = command("doctor", "--json", GENAI_KERNELS_ISA="baseline")
    report = json.loads(result.stdout)
    found = {f["name"]: f for f in report["findings"]}
    assert found["instruction set"]["text"] == "baseline: forced by GENAI_KERNELS_ISA"
    isa = next(v for v in report["environment"] if v["name"] == "GENAI_KERNELS_ISA")
    assert isa["effective"] == "baseline"
    assert isa["origin"] == "set to 'baseline'"
    assert found["OpenMP"]["status"] == "ok"
    assert result.returncode == (0 if report["ready"] else 1)


def test_doctor_with_a_wrong_instruction_set_says_what_mends_it():
    result = command("doctor", GENAI_KERNELS_ISA="avx9", GENAI_KERNELS_IAS="1")
    assert result.returncode == 1
    assert result.stdout.rstrip().splitlines()[-1].endswith("run: unset GENAI_KERNELS_ISA")
    assert "misspelling" in result.stdout


def test_doctor_with_a_planted_wrong_op(planted, capsys):
    assert cli.main(["doctor"]) == 1
    assert "planted: largest error" in capsys.readouterr().out


@pytest.fixture
def without_library(tmp_path):
    """A copy of the Python files alone, as in a source folder that was never built."""
    shutil.copytree(PACKAGE, tmp_path / "genai_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_without_the_library(without_library):
    result = command("doctor", package_root=without_library)
    assert result.returncode == 1
    assert "verdict: BROKEN: library" in result.stdout
    assert "pip install" in result.stdout.splitlines()[-1]
    result = command("verify", package_root=without_library)
    assert result.returncode == 1
    assert "doctor" in result.stderr
    assert "Traceback" not in result.stderr
    plain = subprocess.run(
        [sys.executable, "-c", "import genai_kernels"],
        capture_output=True, text=True, cwd=without_library, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert plain.returncode == 1
    assert "pip install -e ." in plain.stderr.splitlines()[-1]


def test_doctor_without_rich_is_plain_text(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "HAS_RICH", False)
    monkeypatch.setattr(console, "HAS_RICH", False)
    for name in ("rich", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    cli.main(["doctor"])
    out = capsys.readouterr().out
    assert 'pip install "genai_kernels[cli]"' in out
    assert "\u2503" not in out
    assert out.splitlines()[-1].startswith("verdict: ")


def test_two_openmp_runtimes_are_found():
    maps = "\n".join(
        f"7f00-7f01 r-xp 00000000 00:00 1 {path}"
        for path in ("/t/libgomp.so.1", "/t/libgomp.so.1", "/o/libiomp5.so", "/o/libgomp-a34.so.1", "/o/liborc.so")
    )
    assert doctor.openmp_libraries(maps) == ["/o/libgomp-a34.so.1", "/o/libiomp5.so", "/t/libgomp.so.1"]


# ---- verify ----


def test_verify_passes_and_fails(planted, capsys, monkeypatch):
    assert cli.main(["verify", "--op", planted, "--dtype", "fp32"]) == 1
    assert "planted float32 cpu: small, output 0: largest error" in capsys.readouterr().out
    monkeypatch.setitem(OPS, "planted", scaled(1.0))
    assert cli.main(["verify", "--op", planted]) == 0
    assert "verify: ok: 3 samples" in capsys.readouterr().out


def test_verify_reports_an_op_that_raises(monkeypatch, capsys):
    def refuses(x):
        raise ValueError("not today")

    monkeypatch.setitem(OPS, "planted", Op("planted", refuses, refuses, scaled(1.0).samples, Accuracy()))
    assert cli.main(["verify", "--op", "planted", "--dtype", "float32"]) == 1
    assert "small: ValueError: not today" in capsys.readouterr().out


def test_verify_with_nothing_to_verify_fails(monkeypatch):
    monkeypatch.setitem(OPS, "planted", Op("planted", abs, abs, [], Accuracy()))
    assert cli.main(["verify", "--op", "planted"]) == 1


def test_verify_runs_each_instruction_set():
    result = command("verify", "--op", "rms_norm", "--dtype", "bfloat16", "--forward-only", "--isa", "baseline")
    assert "instruction set baseline" in result.stdout
    assert result.returncode == 0, result.stdout
    assert command("verify", "--isa", "avx9").returncode == 2


def test_a_verdict_carries_its_limit():
    op = OPS["rms_norm"]
    assert all(v.limit >= v.error for v in verify_sample(op, op.samples[0], torch.bfloat16))


# ---- explain ----


def test_explain_in_python():
    x = torch.ones(2, 8)
    taken = gk.explain(gk.rms_norm, x, eps=1e-3)
    assert (taken.op, taken.backend, taken.isa) == ("rms_norm", "cpu", torch.ops.genai_kernels.isa())
    assert set(taken.not_taken) >= {"cuda", "triton", "reference"}
    assert "float32[2, 8], eps=0.001" in str(taken)
    with gk.use_backend("reference"):
        forced = gk.explain("rms_norm", x)
    assert (forced.backend, forced.isa) == ("reference", "")
    assert "forced by use_backend" in forced.not_taken["cpu"]
    assert gk.explain(gk.rms_norm, x.to("meta")).backend == "none"
    with pytest.raises(ValueError, match=r"genai_kernels\.explain: fn: expected an op"):
        gk.explain(torch.relu, x)


def test_explain_says_what_attention_skips_and_multiplies():
    q = torch.ones(1, 100, 2, 8)
    assert "10% of the scores are visible" in gk.explain(gk.flash_attention, q, q, q, window_size=(10, 0)).path
    taken = gk.explain(gk.flash_attention, q, q, q, softcap=3.0, attn_bias=torch.zeros(100))
    assert "every key is read; a pass over the scores for softcap, attn_bias" in taken.path


def test_explain_on_the_command_line(capsys):
    assert (
        cli.main(["explain", "rms_norm", "--shape", "4x64", "--dtype", "bf16", "--weight-shape", "64", "--eps=0.5"])
        == 0
    )
    out = capsys.readouterr().out
    assert "rms_norm(" in out
    assert "x=bfloat16[4, 64], weight=bfloat16[64], eps=0.5" in out
    assert cli.main(["explain", "rms_norm", "--sample", "strided_rows"]) == 0
    assert "strides [80, 1]" in capsys.readouterr().out


def test_explain_says_that_a_call_is_refused(capsys):
    assert cli.main(["explain", "rms_norm", "--shape", "4x64", "--weight-shape", "63"]) == 1
    assert "refused: ValueError: genai_kernels.rms_norm: weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--shape", "4x64", "--causal"], ["--eps", "1"], ["--sample", "nosuch"], ["--shape", "4x64", "stray"]]
)
def test_explain_with_a_wrong_command_line(options):
    assert cli.main(["explain", "rms_norm", *options]) == 2


# ---- demo ----


def test_demo_outside_a_checkout_is_one_sentence(without_library, monkeypatch, capsys):
    from genai_kernels.cli import demo

    monkeypatch.setattr(demo, "_ROOT", without_library)
    monkeypatch.chdir(without_library)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_demo_runs_its_chapters(monkeypatch, capsys):
    from genai_kernels.cli import demo

    ran = []

    def run(command, **options):
        ran.append(command[2:])
        return subprocess.CompletedProcess(command, returncode=len(ran) - 1)

    monkeypatch.setattr(demo.subprocess, "run", run)
    assert cli.main(["demo"]) == 3  # the fourth one failed worst
    assert ran == list(demo.CHAPTERS.values())
    assert cli.main(["demo", "--chapter", "serving", "--out", "x"]) == 4
    assert ran[4:] == [["python_models.serving_demo", "--out", "x"]]
    assert cli.main(["demo", "--out", "x"]) == 2  # whose option?
    assert "expected --chapter (training, serving, adapters, painting) with --out x" in capsys.readouterr().err
    assert len(ran) == 5


# ---- bench ----


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch):
    """A small buffer for the rate of memory, which no test looks at closely."""
    monkeypatch.setattr("genai_kernels.cli.machine._memory_bytes", lambda: 2**26)


QUICK = ["bench", "--op", "planted", "--dtype", "float32", "--threads", "1", "--seconds", "0.01"]


def test_bench_writes_what_it_measured(planted_right, tmp_path, capsys):
    files = [tmp_path / name for name in ("new.json", "new.csv", "new.png")]
    assert cli.main([*QUICK, "--json", str(files[0]), "--csv", str(files[1]), "--png", str(files[2])]) == 0
    found = json.loads(files[0].read_text())
    assert found["schema"] == 1
    assert {"id", "cpu", "caches", "cores", "isa", "torch", "compiler", "governor", "load"} <= set(found["machine"])
    assert found["limits"]["1"]["peaks"]["fma_f32"] > 0
    assert found["limits"]["1"]["memory"]["read"] > 0
    forward, backward = found["cases"]
    assert (forward["pass"], backward["pass"]) == ("forward", "backward")
    for case in found["cases"]:
        assert set(case["timings"]) == {"ours", "eager", "twice"}
        assert not case["refused"]
        assert not case["failed"]
        timing = case["timings"]["ours"]
        assert 0 < timing["low"] <= timing["median"] <= timing["high"]
        assert timing["rounds"] >= 5
        assert case["limit"]["what"] == "copy"
        assert case["share"] == pytest.approx(2 * 4096 * 4 / timing["median"] / case["limit"]["rate"])
    assert len(files[1].read_text().splitlines()) == 3
    assert files[2].read_bytes().startswith(b"\x89PNG")
    assert "planted" in capsys.readouterr().out

    old = json.loads(files[0].read_text())
    for case in old["cases"]:
        case["timings"]["ours"]["median"] *= 1e6
    old["machine"].update(id="another", cores=999)
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert cli.main([*QUICK, "--compare", str(tmp_path / "old.json")]) == 0
    out = capsys.readouterr().out
    assert "now against before" in out
    assert "cores: 999 ->" in out


def test_no_speed_for_a_wrong_result(planted, tmp_path, capsys):
    assert cli.main([*QUICK, "--json", str(tmp_path / "new.json")]) == 1
    forward, backward = json.loads((tmp_path / "new.json").read_text())["cases"]
    assert forward["timings"] == {}
    assert backward["timings"] == {}
    assert "wrong result: output 0: largest error" in forward["refused"]
    assert "wrong result: gradient 0: largest error" in backward["refused"]
    assert "REFUSED planted 64x64 float32 forward: wrong result" in capsys.readouterr().out


def test_no_speed_for_results_that_change_after_the_check(monkeypatch, tmp_path):
    right = scaled(1.0)
    calls = 0

    def drifts(x):
        nonlocal calls
        calls += 1
        return x * 2.0 if calls < 3 else x * 2.0 * (1 + 2**-20)

    monkeypatch.setitem(OPS, "planted", dataclasses.replace(right, function=drifts, differentiable=False))
    assert cli.main([*QUICK, "--json", str(tmp_path / "new.json")]) == 1
    (case,) = json.loads((tmp_path / "new.json").read_text())["cases"]
    assert "other bits" in case["refused"]
    assert case["timings"] == {}


def test_peers_that_refuse_and_that_are_wrong_have_no_time(monkeypatch, tmp_path, capsys):
    def refuses(x):
        raise RuntimeError("not on this machine")

    op = dataclasses.replace(
        scaled(1.0), peers={"absent": refuses, "wrong": lambda x: x * 2.5, "twice": lambda x: x + x}
    )
    monkeypatch.setitem(OPS, "planted", op)
    assert cli.main([*QUICK, "--json", str(tmp_path / "new.json")]) == 0
    case = json.loads((tmp_path / "new.json").read_text())["cases"][0]
    assert set(case["timings"]) == {"ours", "eager", "twice"}
    assert case["failed"]["absent"] == "RuntimeError: not on this machine"
    assert case["failed"]["wrong"].startswith("wrong result")
    assert "absent has no time in planted forward: RuntimeError: not on this machine" in capsys.readouterr().out


def two_halves(x):
    """The lower half of the rows of a call of `planted`, checked alone."""
    lower = (slice(32, 64),)
    return [Part((x[32:].detach(),), {}, outputs=[lower], gradients=[(lower, (slice(None),))])]


@pytest.mark.parametrize("wrong_row", [0, 40])
def test_a_part_of_a_large_result_is_really_checked(monkeypatch, tmp_path, wrong_row):
    """Only the named part is compared, and with the right rows of the timed call's own output and gradient."""

    def function(x):
        factor = torch.full((len(x), 1), 2.0)
        factor[wrong_row % len(x)] = 2.1
        return x * factor

    op = dataclasses.replace(scaled(1.0), function=function, parts=two_halves)
    monkeypatch.setitem(OPS, "planted", op)
    assert cli.main([*QUICK, "--json", str(tmp_path / "new.json")]) == (1 if wrong_row == 40 else 0)
    cases = json.loads((tmp_path / "new.json").read_text())["cases"]
    assert [bool(case["refused"]) for case in cases] == [wrong_row == 40] * 2


def test_bench_options(planted):
    for options in (["--threads", "0"], ["--threads", "two"], ["--op", "nosuch"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(["bench", *options])
        assert exit.value.code == 2
    assert cli.main([*QUICK, "--compare", "/nonexistent.json"]) == 2


def test_overhead(tmp_path, planted_right):
    assert cli.main(["bench", "--overhead", "--op", "planted", "--json", str(tmp_path / "new.json")]) == 0
    rows = json.loads((tmp_path / "new.json").read_text())["overhead"]
    assert [row["mode"] for row in rows] == ["inference_mode", "no_grad", "autograd"]
    assert all(row["ratio"] == pytest.approx(row["ours"] / row["add"]) for row in rows)


def test_timings_are_interleaved():
    order = []
    calls = {name: (lambda name=name: (order.append(name), time.sleep(2e-3))) for name in "ab"}
    timings, limit = interleaved(calls, seconds=0.02, limit=lambda: order.append("limit") or 5.0)
    turns = order[2:]  # after one call each, to see how long they take
    rounds = " ".join(turns).removesuffix(" limit").split(" limit ")
    assert set(rounds) <= {"a b", "a", "b"}  # whichever needs fewer rounds is left out of some
    assert "a b" in rounds
    assert len(rounds) == limit.rounds >= 5
    assert timings["a"].rounds == turns.count("a")
    assert timings["a"].median >= 2e-3
    assert limit.median == 5.0


def test_peak_memory_sees_what_a_call_allocates_and_frees():
    for megabytes in (8, 64):
        found = peak_memory(lambda n=megabytes: torch.ones(n, 2**18).sum())
        # Linux counts pages in batches for each thread
        assert (megabytes - 1) * 2**20 < found < (megabytes + 8) * 2**20


def test_the_limits_of_the_machine():
    kernels = torch.ops.genai_kernels
    assert kernels.measure_peak("fma_f32", 10) > 0
    has_dot = kernels.isa() == "avx512_bf16"
    assert (kernels.measure_peak("dot_bf16", 10) > 0) == has_dot
    buffer = torch.arange(1001, dtype=torch.float32)
    assert kernels.measure_stream("read", buffer) > 0
    assert torch.equal(buffer, torch.arange(1001.0))
    kernels.measure_stream("copy", buffer[:1000])
    assert torch.equal(buffer, torch.cat([torch.arange(500.0), torch.arange(500.0), torch.tensor([1000.0])]))
    with pytest.raises(ValueError, match="measure_peak: what: expected fma_f32"):
        kernels.measure_peak("warp", 10)
    with pytest.raises(ValueError, match="measure_stream: buffer: expected a contiguous"):
        kernels.measure_stream("copy", torch.ones(4, 4).t())


# ---- reports ----


def test_html_report_is_self_contained(tmp_path):
    line_plot(tmp_path / "a.png", [Line("x < y", [1, 2, 4], [1, 2, 3])], title="t", xlabel="x", ylabel="y", log_x=True)
    sections = [Section("A & B", "one\n\ntwo", [(("op", "ms"), [("<b>", "1.5")])], [tmp_path / "a.png"])]
    report.html_report(tmp_path / "r.html", "Title", sections)
    page = (tmp_path / "r.html").read_text()
    assert "data:image/png;base64," in page
    assert "A &amp; B" in page
    assert "&lt;b&gt;" in page
    assert "<td class=number>1.5</td>" in page
    assert "http" not in page


def test_plots_without_matplotlib_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr("genai_kernels.cli.plots.available", lambda: False)
    assert not line_plot(tmp_path / "a.png", [], title="", xlabel="", ylabel="")
    assert not (tmp_path / "a.png").exists()
