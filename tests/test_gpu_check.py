"""scripts/gpu_check.py where there is no GPU: it says so, counts what pytest prints, and stops what takes too long."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_in_one_line():
    found = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    if found.returncode == 2:
        assert found.stderr.startswith("error: JAX ") and found.stderr.count("\n") == 1
    else:
        pytest.skip("there is a GPU")


WORKERS = """8 workers [4 items]
tests/kernels/test_on_gpu.py::test_value[scratch-a few rows]\x20
[gw0] [ 25%] PASSED tests/kernels/test_on_gpu.py::test_value[scratch-a few rows]\x20
[gw3] [ 50%] FAILED tests/kernels/test_on_gpu.py::test_value[mosaic-PASSED rows]\x20
[gw1] [ 75%] SKIPPED tests/kernels/test_on_gpu.py::test_value[mosaic-fp4]\x20
[gw0] [100%] ERROR tests/kernels/test_on_gpu.py::test_pack[mosaic]\x20
FAILED tests/kernels/test_on_gpu.py::test_value[mosaic-PASSED rows] - AssertionError
"""
ONE = """collected 4 items
tests/kernels/test_on_gpu.py::test_value[scratch-a few rows] PASSED   [ 25%]
tests/kernels/test_on_gpu.py::test_value[mosaic-PASSED rows] FAILED   [ 50%]
tests/kernels/test_on_gpu.py::test_value[mosaic-fp4] SKIPPED (refused: ...) [ 75%]
tests/kernels/test_on_gpu.py::test_pack[mosaic] ERROR [100%]
=========================== short test summary info ============================
FAILED tests/kernels/test_on_gpu.py::test_value[mosaic-PASSED rows] - AssertionError
"""


@pytest.mark.parametrize("output", [ONE, WORKERS])
def test_outcomes_are_counted_without_the_summary(gpu_check, output):
    failures = ["test_value[mosaic-PASSED rows]", "test_pack[mosaic]"]
    assert gpu_check.counts(output) == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": [f"tests/kernels/test_on_gpu.py::{name}" for name in failures],
    }


def test_what_takes_too_long_is_stopped_and_its_lines_are_kept(gpu_check):
    began = time.monotonic()
    program = "import time; print('a line', flush=True); time.sleep(60)"
    found = gpu_check.run([sys.executable, "-c", program], 3)
    assert found["timed_out"] and found["exit"] != 0 and "a line" in found["output"]
    assert time.monotonic() - began < 50


def test_every_stage_is_a_command_that_parses(gpu_check, run_commands, tmp_path):
    """Flags and configs of the real stages, which no machine without a GPU runs; each result has a file of its own."""
    stages = gpu_check.stages(tmp_path, None)
    commands = [stage.command for stage in stages if stage.command[1] != "pytest"]
    found = run_commands([[command[1], *command[2:], "--only_check_args"] for command in commands])
    assert len(commands) >= 10 and all(result["status"] == 0 for result in found), [result["err"] for result in found]
    files = [stage.out for stage in stages if stage.out]
    assert len(files) == len(commands) == len(set(files))
    assert [stage.title for stage in stages if not stage.out] == ["what is new is right", "everything is right"]
    for stage in stages:
        for part in stage.command:
            assert not part.startswith("tests/") or (SCRIPT.parents[1] / part).exists(), part
    tiny = gpu_check.stages(tmp_path, tmp_path)
    assert [stage.title for stage in tiny] == [stage.title for stage in stages]


def stage_that(gpu_check, title: str, program: str, seconds: int = 60, out: str = ""):
    return gpu_check.Stage(title, ["-c", program], seconds, out)


def test_results_are_written_at_once_and_the_rest_goes_on_later(gpu_check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "versions", dict)
    measured = {"plan_to_measured": 1.0, "tokens_per_second": 5.0, "peak_device_bytes": 10**9}
    write = f"import pathlib; pathlib.Path({str(tmp_path / 'a.json')!r}).write_text({json.dumps(measured)!r})"
    stages = [
        stage_that(gpu_check, "tests", "print('tests/a.py::test_b PASSED [100%]')"),
        stage_that(gpu_check, "train", write, out="a.json"),
        stage_that(gpu_check, "long", "1", seconds=10**6, out="b.json"),
        stage_that(gpu_check, "broken", "raise SystemExit('it broke')", out="c.json"),
    ]
    assert gpu_check.check(stages, 1, tmp_path, "a GPU", time.monotonic() + 200) == 0
    assert "out of time: go on with --from=3 (long)" in capsys.readouterr().out
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [(stage["number"], stage["right"]) for stage in report["stages"]] == [(1, True), (2, True)]
    assert report["next"] == 3 and report["stages"][0]["passed"] == 1
    assert gpu_check.check(stages, 4, tmp_path, "a GPU", time.monotonic() + 200) == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [(stage["number"], stage["said"]) for stage in report["stages"]][::2] == [
        (1, "1 passed, 0 failed, 0 skipped"),
        (4, "it broke"),
    ]
    assert report["next"] is None
    assert gpu_check.check(stages, 5, tmp_path, "a GPU", 0) == 2


@pytest.mark.parametrize(("ratio", "right"), [(0.951, True), (1.049, True), (0.94, False), (1.06, False)])
def test_a_peak_far_from_its_plan_fails(gpu_check, tmp_path, ratio, right):
    measured = {"plan_to_measured": ratio, "tokens_per_second": 5.0, "peak_device_bytes": 10**9}
    (tmp_path / "a.json").write_text(json.dumps(measured))
    found = {"exit": 0, "timed_out": False, "seconds": 1.0, "output": ""}
    verdict = gpu_check.judged(stage_that(gpu_check, "train", "", out="a.json"), found, tmp_path)
    assert verdict["right"] == right and f"the plan says {ratio:.1%} of it" in verdict["said"]
    assert ("over 5% off" in verdict["said"]) != right


def test_what_was_not_measured_or_not_passed_is_not_right(gpu_check, tmp_path):
    found = {"exit": 0, "timed_out": False, "seconds": 1.0, "output": "no tests ran"}
    assert not gpu_check.judged(stage_that(gpu_check, "tests", ""), found, tmp_path)["right"]
    assert not gpu_check.judged(stage_that(gpu_check, "train", "", out="a.json"), found, tmp_path)["right"]
    (tmp_path / "a.json").write_text("{}")
    late = found | {"exit": -2, "timed_out": True}
    assert gpu_check.judged(stage_that(gpu_check, "bench", "", out="a.json"), late, tmp_path)["said"] == "out of time"
