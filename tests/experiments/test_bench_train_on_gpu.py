"""bench_train on a GPU: the cap holds, the plan is what is measured, and paging changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
}

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Each in a process of its own: the allocator's peak is a process's."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        pytest.skip("computes on a CPU")
    folder = tmp_path_factory.mktemp("bench_train")
    (folder / "config.json").write_text(json.dumps(SIZES))
    found = {}
    for paging in ("always", "never"):
        out = folder / f"{paging}.json"
        flags = ["--config=configs/guanaco.py", f"--config.model.path={folder}", f"--config.optimizer.paging={paging}"]
        flags += ["--config.data.eval_examples=0", "--config.optimizer.page_bytes=8000000", "--gpu_bytes=3GiB"]
        flags += ["--steps=5", f"--out={out}"]
        command = [sys.executable, "-m", "experiments.bench_train", *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr
        found[paging] = json.loads(out.read_text())
    return found


def test_the_cap_holds(reports):
    for found in reports.values():
        assert found["platform"] == "gpu" and found["gpu_bytes"] == 3 * 2**30
        assert found["device_limit_bytes"] == pytest.approx(3 * 2**30, rel=1e-3)
        assert found["peak_device_bytes"] <= found["device_limit_bytes"]


@pytest.mark.parametrize("paging", ["always", "never"])
def test_the_plan_is_what_is_measured(reports, paging):
    assert reports[paging]["peak_device_bytes_source"] == "allocator"
    assert reports[paging]["plan_to_measured"] == pytest.approx(1, abs=0.05)


def test_paging_changes_no_loss(reports):
    assert reports["always"]["losses"] == pytest.approx(reports["never"]["losses"], rel=1e-3)
    assert reports["always"]["page_traffic_bytes_each_way"] == 8 * reports["always"]["trainable_params"]
    assert 0 < reports["always"]["utilization"]["mfu"] < 1
