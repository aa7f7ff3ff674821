"""scripts/gpu_check.py where there is no GPU: it says so, counts what pytest prints, and stops what takes too long."""

import importlib.util
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
