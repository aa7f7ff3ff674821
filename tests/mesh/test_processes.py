"""One model trained by two processes: the run of one device, whoever is killed on the way."""

import json
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.settings import resolved
from qlora_jax.train.loop import finetune
from tests.forked import Started
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.quick_compile
REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 6
# as `python -m` does it; forks of a process that has imported what most of their start is
COMMAND = """import runpy; runpy.run_module("tests.mesh.counted", run_name="__main__", alter_sys=True)"""


def start(golden: Path, folder: Path, by_slurm: bool = False, own: Sequence[str] = ()) -> list[Started]:
    """Two processes of one device each on the run of `folder`, which they divide; `own`: a flag of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    c = tiny_config(golden, folder)
    keys = {
        "model.path": c.model.path, "model.compute_dtype": "float32", "lora.rank": 2, "lora.dropout": 0.1,
        "lora.targets": "q_proj,down_proj", "data.batches": c.data.batches, "optimizer.learning_rate": 1e-2,
        "train.steps": STEPS, "train.batch_size": 4, "train.grad_accum": 2, "train.checkpoint_every": 1,
        "mesh.devices": 2,
    }  # fmt: skip
    command = [f"--config={REPOSITORY}/configs/base.py", f"--workdir={folder / 'run'}"]
    command += [f"--config.{key}={value}" for key, value in keys.items()]
    started = []
    for index in range(2):
        if by_slurm:  # as srun sets it, but for the port, which follows from the job's number
            step = {"JOB_ID": 1, "STEP_NODELIST": "127.0.0.1", "NTASKS": 2, "PROCID": index, "LOCALID": index}
            given = {f"SLURM_{name}": str(value) for name, value in step.items()} | {"JAX_COORDINATOR_PORT": str(port)}
            flags = ["--cluster"]
        else:
            given, flags = {}, [f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process={index}"]
        flags += [flag for flag in own[index : index + 1] if flag]
        started.append(Started(COMMAND, [*command, *flags], given | {"COUNTED": str(folder / "counted")}))
    return started


def rows(folder: Path) -> list[dict]:
    file = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_one_model_by_two_processes(golden, tmp_path):
    """The first is killed: the other says so and ends. Then one reads other data: both say so. Then the run of one."""
    two = start(golden, tmp_path)
    while len(rows(tmp_path)) < 2 and all(one.process.is_alive() for one in two):
        time.sleep(0.05)
    two[0].process.kill()
    killed, other = (one.ended(timeout=60) for one in two)
    assert other.returncode == 1 and killed.returncode == -signal.SIGKILL
    lines = [line for line in other.stderr.splitlines() if line and not line.startswith(("training:", "loading:"))]
    # on a busy machine the exchange between devices may say so before JAX's coordination service does
    lost = "error: another process of this run ended or cannot be reached ("
    assert len(lines) == 1 and lines[0].startswith(lost), other.stderr[-2000:]
    assert len(rows(tmp_path)) < STEPS

    np.save(tmp_path / "others.npy", np.zeros((STEPS, 4, 12), np.int32))
    two = start(golden, tmp_path, own=("", f"--config.data.batches={tmp_path / 'others.npy'}"))
    ended = [one.ended(timeout=60) for one in two]
    said = "error: process 1 reads another data.batches than process 0: give all the same files"
    assert [(one.stderr.splitlines()[-1], one.returncode) for one in ended] == 2 * [(said, 2)]

    (tmp_path / "counted").unlink(missing_ok=True)
    ended = [one.ended(timeout=300) for one in start(golden, tmp_path, by_slurm=True)]
    assert [one.returncode for one in ended] == [0, 0], ended
    assert "resumed" in ended[0].stdout and not ended[1].stdout.replace("[Gloo]", "").count("run:"), ended
    c = tiny_config(golden, tmp_path)
    c.train.steps, c.lora.dropout = STEPS, 0.1
    finetune(c, resolved(c), tmp_path / "one", lambda line: None)
    alone = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    together = rows(tmp_path)
    assert [row["step"] for row in together] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm"):
        a, b = ([row[key] for row in run] for run in (alone, together))
        np.testing.assert_allclose(a, b, rtol=2e-5)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    base = [json.loads((tmp_path / run / "inputs.json").read_text())["model.path"] for run in ("one", "run")]
    assert base[0] == base[1]  # the same checksums, of whoever read what

    size = (golden / "llama" / "llama1" / "model.safetensors").stat().st_size
    read = [int(line) for line in (tmp_path / "counted").read_text().split() if line != "0"]  # 0: of who watches
    assert len(read) == 2 and max(read) < 0.6 * size and size <= sum(read) < 1.1 * size, (read, size)
    parts = tmp_path / "run" / "checkpoints" / str(STEPS) / "default"
    written = [{path.name for path in (parts / f"ocdbt.process_{index}" / "d").iterdir()} for index in range(2)]
    sums = json.loads((parts / "checksums.json").read_text())
    assert all(written) and all(any(name.endswith(part) for name in sums) for part in written[0] | written[1])
