"""The GPU runner without a GPU: its dry run, what it does with a run that was cut, and README's table."""

import dataclasses
import json

import pytest

from benchmarks import device_run
from benchmarks.device import report
from benchmarks.device.cases import cases
from benchmarks.device.log import Log
from benchmarks.device.timing import time_case


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    code = device_run.main(["--dry-run", "--minutes", "9", "--out", str(folder)])
    return code, Log(folder / "log.jsonl"), folder


def test_a_dry_run_goes_through_every_stage(dry):
    code, log, folder = dry
    assert code == 0, (folder / "table.txt").read_text()
    assert {r["stage"] for r in log.read()} == {"fingerprint", "ceilings", "correct", "sanitize", "time", "profile"}
    checked = log.read("correct")
    assert {r["op"] for r in checked} == device_run.DRY_OPS
    assert all(r["samples"] == 2 and r["comparisons"] > 2 and not r["failures"] for r in checked)
    timed = log.read("time")
    assert len(timed) == 4
    assert all("cpu" in r["timings"] and r["timings"]["cpu"]["error"] < 2e-2 for r in timed)


@pytest.mark.parametrize("case", cases(dry=True), ids=lambda case: f"{case.op} {case.name}")
def test_every_case_is_right_and_is_timed(case, tmp_path):
    log = Log(tmp_path / "log.jsonl")
    time_case(log, "cpu", dataclasses.replace(case, peers={}), ["cpu"], rounds=1)
    (timed,) = log.read("time")
    assert not timed["failed"]
    assert timed["timings"]["cpu"]["error"] < 2e-2


def test_what_fails_is_not_timed(tmp_path):
    run = device_run.Run(tmp_path, "cpu", 1)
    good = {"samples": 1, "comparisons": 1, "failures": [], "worst_share": 0.5}
    for dtype in ("float32", "bfloat16", "float16"):
        run.log.add("correct", op="rms_norm", backend="cuda", dtype=dtype, **good)
        failures = ["plain: wrong"] if dtype == "float16" else []
        run.log.add("correct", op="rms_norm", backend="triton", dtype=dtype, **{**good, "failures": failures})
    run.log.add("correct", op="layer_norm", backend="cuda", dtype="float32", **good)  # ended early
    assert run.passed() == {"cuda": ["rms_norm"]}


def test_a_cut_run_keeps_what_it_has(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.add("ceilings", copy_tb_s=3.0, bf16_tflop_s=790.0)
    with log.path.open("a") as file:
        file.write('{"stage": "time", "op": "rms')
    assert [r["stage"] for r in log.read()] == ["ceilings"]


def test_a_stage_that_dies_is_recorded(tmp_path):
    run = device_run.Run(tmp_path, "cpu", 1)
    assert not run.child("no such stage", limit=60)
    (record,) = run.log.read("failed")
    assert "expected a stage" in record["why"]


def records():
    timing = {"p20": 1, "p80": 1, "reversed": 0.0, "graph": True, "not_captured": "", "error": 1e-3}
    return [
        {"stage": "fingerprint", "name": "NVIDIA Test"},
        {"stage": "ceilings", "copy_tb_s": 3.0, "bf16_tflop_s": 800.0},
        {
            "stage": "time", "op": "flash_attention", "name": "d128 n8192 full", "backward": False, "flops": 8e12,
            "bytes": 0, "timings": {"cuda": {"ms": 20.0, **timing}, "sdpa cudnn": {"ms": 16.0, **timing}},
            "failed": {"triton": "wrong"},
        },
        {
            "stage": "time", "op": "rms_norm", "name": "16384x4096", "backward": False, "flops": 0, "bytes": 3e9,
            "timings": {"triton": {"ms": 2.0, **timing}}, "failed": {},
        },
    ]  # fmt: skip


def test_the_table_says_what_was_measured_and_what_was_not():
    empty = report.readme_block({})
    assert empty.count(report.MISSING) == 4 * len(report.ROWS)
    block = report.readme_block({"NVIDIA Test": records()})
    assert "| attention forward, d128, 8192 tokens | 400 TFLOP/s | wrong | 500 TFLOP/s (sdpa cudnn) | 50 % |" in block
    assert "| rms_norm, 16384 x 4096 | not yet measured | 1.50 TB/s | not yet measured | 50 % |" in block
    assert block.count(report.MISSING) == 4 * (len(report.ROWS) - 2) + 2


def test_every_row_of_the_table_is_timed():
    from benchmarks.device.cases import cases

    timed = {(case.op, case.name, case.backward) for case in cases()}
    assert {row[1:] for row in report.ROWS} <= timed


def test_committed_results_are_of_cards():
    for path in report.RESULTS.glob("*.json"):
        stages = {r["stage"] for r in json.loads(path.read_text())["records"]}
        assert {"fingerprint", "ceilings", "correct"} <= stages
