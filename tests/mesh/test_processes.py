"""One model trained by two processes: the run of one device, whoever is killed on the way."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.settings import resolved
from qlora_jax.train.loop import finetune
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.quick_compile
REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 6


def start(golden: Path, folder: Path, *flags: str) -> list[subprocess.Popen]:
    """Two processes of one device each on the run of `folder`, which they divide."""
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
    command = [sys.executable, "-m", "experiments.train", f"--config={REPOSITORY}/configs/base.py"]
    command += [f"--config.{key}={value}" for key, value in keys.items()]
    command += [f"--workdir={folder / 'run'}", f"--coordinator=127.0.0.1:{port}", "--processes=2", *flags]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return [
        subprocess.Popen(
            [*command, f"--process={index}"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for index in range(2)
    ]


def rows(folder: Path) -> list[dict]:
    file = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_killed_process_ends_the_other_with_an_error_and_both_go_on_to_the_run_of_one(golden, tmp_path):
    two = start(golden, tmp_path)
    while len(rows(tmp_path)) < 2 and all(process.poll() is None for process in two):
        time.sleep(0.05)
    two[1].send_signal(signal.SIGKILL)
    _, said = two[0].communicate(timeout=60)
    assert two[0].returncode not in (0, None) and two[1].wait() == -signal.SIGKILL
    assert "error: another process of this run ended or cannot be reached" in said, said[-2000:]
    assert len(rows(tmp_path)) < STEPS

    ended = [process.communicate(timeout=300) for process in start(golden, tmp_path)]
    assert "resumed" in ended[0][0] and not ended[1][0].replace("[Gloo]", "").count("run:"), ended
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
