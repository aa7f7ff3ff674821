"""The doctor on machines that are not here: faked nvidia-smi, packages that are missing, a JAX that breaks."""

import configparser
import json
import sys
from pathlib import Path

import pytest

from qlora_jax.doctor import packages as packages_of
from qlora_jax.doctor.devices import devices
from qlora_jax.doctor.examine import report, text
from qlora_jax.doctor.findings import GUANACO
from qlora_jax.doctor.machine import machine
from qlora_jax.doctor.packages import CUDA, EXTRAS, install, name_of, packages

REPOSITORY = Path(__file__).resolve().parents[2]
SMI = "NVIDIA GeForce RTX 4090, 580.65.06, 8.9, 24564, 23900\n"
CPU = {"kind": "cpu", "platform": "cpu", "compute_capability": None, "memory_bytes": None, "memory_free_bytes": None}
GPU = {
    "kind": "NVIDIA H200", "platform": "gpu", "compute_capability": "9.0", "memory_bytes": 140 * 2**30,
    "memory_free_bytes": 139 * 2**30,
}  # fmt: skip
CUDA13 = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cublas")


def here(smi: str | Exception | None = None) -> dict:
    def run(command):
        assert command[0] == "nvidia-smi"
        if smi is None:
            raise FileNotFoundError("nvidia-smi")
        if isinstance(smi, Exception):
            raise smi
        return smi

    return machine(REPOSITORY, run)


def installed(*names: str, missing: tuple[str, ...] = ()) -> dict:
    return packages(lambda name: None if name in missing else "1.0", names)


def sees(*found: dict, **more) -> dict:
    return {"crash": None, "imports": {"jax": None}, "devices": list(found), "warnings": [], **more}


def lines(found: dict, begin: str) -> list[str]:
    return [line for line in text(found).splitlines() if line.startswith(begin)]


def test_a_cpu_can_train():
    found = report(here(), installed(), sees(CPU))
    assert found["can_train"] and not found["problems"] and found["largest_config"] is None
    assert text(found).splitlines()[-1] == "training can run here"
    assert lines(found, "gpu") == ["gpu      none (there is no nvidia-smi)"]


def test_a_gpu_in_use():
    kernels = {"training": {"scratch": 8}, "generation": {"mosaic": 2}, "table": "nvidia-h200.json"}
    found = report(here("NVIDIA H200, 580.1, 9.0, 143771, 143000\n"), installed(*CUDA13), sees(GPU, kernels=kernels))
    assert found["can_train"] and not found["problems"]
    assert found["largest_config"] == "configs/guanaco_65b.py"
    assert "training: scratch for 8 products, xla for the others; generation: mosaic for 2" in text(found)
    assert "driver 580.1, compute capability 9.0" in lines(found, "gpu")[0]


@pytest.mark.parametrize(
    "smi, names, more, words",
    [
        (SMI, (), {}, ["RTX 4090 is not used: JAX has no CUDA here", install("cuda13")]),
        (SMI.replace("580.65.06", "550.1"), (), {}, [install("cuda12")]),
        (SMI, CUDA13[:2], {}, ["no CUDA here"]),  # the extra plan alone runs on no GPU
        (SMI.replace("580.65.06", "550.1"), CUDA13, {}, ["cuda13 needs driver 580 or newer, 550.1 is there"]),
        (SMI, CUDA13, {"warnings": ["cuInit(0) failed"]}, ["cuInit(0) failed", "jax[cuda13]"]),
        (RuntimeError("nvidia-smi: Driver/library version mismatch"), CUDA13, {}, ["version mismatch", "driver"]),
        ("garbage\n", CUDA13, {}, ["lists no GPU", "garbage"]),
    ],
)
def test_a_gpu_that_is_not_used_is_said(smi, names, more, words):
    found = report(here(smi), installed(*names), sees(CPU, **more))
    (advice,) = lines(found, "advice")
    assert found["can_train"] and all(word in advice for word in words), advice


@pytest.mark.parametrize(
    "missing, jax, words",
    [
        (("optax",), sees(CPU), ["not installed: optax", "pip install optax"]),
        (("jax", "jaxlib"), {"crash": None, "imports": {"jax": "ImportError: no jax"}}, ["not installed: jax, jaxlib"]),
        ((), sees(imports={"jaxlib": "ImportError: GLIBC_2.99"}), ["GLIBC_2.99", "pip install --force-reinstall jax"]),
        ((), {"crash": "starting JAX ended its process by SIGSEGV"}, ["SIGSEGV", "JAX_PLATFORMS=cpu"]),
        ((), sees(device_error="RuntimeError: no backend"), ["JAX finds no device: RuntimeError: no backend"]),
    ],
)
def test_what_stops_training_is_a_problem_with_its_command(missing, jax, words):
    found = report(here(), installed(missing=missing), jax)
    problem = lines(found, "problem")[0]
    assert not found["can_train"] and all(word in problem for word in words), problem
    assert text(found).splitlines()[-1] == "training cannot run here"
    json.dumps(found, allow_nan=False)


def test_missing_extras_have_their_command():
    found = report(here(), installed(missing=("ray", "wandb")), sees(CPU))
    assert found["packages"]["extras"]["sweep"]["missing"] == ["ray"]
    assert "without sweep (sweeps over GPUs and machines): pip install optuna 'ray[tune]'" in text(found)
    assert "without wandb (a logger): pip install wandb" in text(found)


def test_extras_are_those_of_setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    there = {
        extra: tuple(line.partition(";")[0].strip() for line in value.split("\n") if line.strip())
        for extra, value in parser["options.extras_require"].items()
        if extra != "dev"
    }
    assert there == {extra: parts for extra, (_, parts) in EXTRAS.items()} | {name: (p,) for name, p in CUDA.items()}
    required = {name_of(line.strip()) for line in parser["options"]["install_requires"].split("\n") if line.strip()}
    assert set(packages_of.NEEDED) - {"jaxlib"} <= required


def test_the_sizes_of_guanaco_are_the_page_s():
    page = (REPOSITORY / "docs" / "memory.md").read_text()
    table = next(line for line in page.splitlines() if line.startswith("| device memory on an RTX 4090 "))
    assert [f"{size / 1e9:.2f} GB" for size in GUANACO.values()] == [
        cell.strip().removesuffix(" (does not fit)") for cell in table.split("|")[2:-1]
    ]


@pytest.mark.parametrize(
    "code, words",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("raise SystemError('broken plugin')", "exit status 1 (SystemError: broken plugin)"),
        ("import time; time.sleep(60)", "more than 1 s"),
        ("print('no json')", "exit status 0"),
    ],
)
def test_a_jax_that_breaks_its_process_is_reported(code, words):
    assert words in devices((sys.executable, "-S", "-c", code), seconds=1)["crash"]


def test_a_python_that_is_not_there():
    assert "cannot be started" in devices(("/nonexistent/python",))["crash"]


def test_the_command_on_this_machine(run_commands, tmp_path):
    (result,) = run_commands([["experiments.doctor", "--json", f"--out={tmp_path / 'new' / 'doctor.json'}"]])
    assert result["status"] == 0, result["err"]
    found = json.loads(result["out"])
    assert found == json.loads((tmp_path / "new" / "doctor.json").read_text())
    assert found["jax"]["devices"] and found["jax"]["kernels"]["table"] is None
    assert not [name for name, error in found["jax"]["imports"].items() if error]
