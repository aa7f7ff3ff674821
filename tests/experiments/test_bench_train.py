"""The command `bench_train` on a CPU: what it measures, what it writes and how it refuses. No speed is judged."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.bench import torch_side

pytestmark = pytest.mark.quick_compile

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "qlora_jax" / "bench" / "torch_script.py"
SMALL = [
    "--config=configs/quickstart.py",
    "--config.model.remat=block",
    "--config.data.max_source_len=16",
    "--config.data.pad_to_multiple_of=16",
    "--config.train.batch_size=4",
    "--config.train.grad_accum=2",
    "--config.lora.dropout=0.1",
    "--config.lora.targets=q_proj,down_proj",
    "--config.optimizer.page_bytes=30000",
    "--config.eval.batch_size=4",
    "--config.optimizer.warmup_steps=0",
    "--steps=2",
    "--warmup=1",
]
MODEL = {  # weights are drawn: a folder has this alone
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 1024, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
RIVAL = {
    "versions": {"torch": "0", "bitsandbytes": "1"},
    "device": "a card",
    "dtype": "bfloat16",
    "optimizer": "PagedAdamW32bit",
    "tokens_per_second": 0.5,
    "peak_device_bytes": 2 * 10**9,
    "trainable_params": 7,
}


@pytest.fixture(scope="module")
def results(run_commands, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench_train")
    stand_in = folder / "python"
    stand_in.write_text(f"#!/bin/sh\ncat > {folder}/asked.json\necho a line of a library\necho '{json.dumps(RIVAL)}'\n")
    stand_in.chmod(0o755)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    small = [*SMALL, f"--config.model.path={folder / 'model'}"]
    always, never = ["--config.optimizer.paging=always"], ["--config.optimizer.paging=never"]
    commands = {
        "always": [*small, *always, f"--out={folder}/new/always.json", "--gpu-bytes=48GiB", "--trace"],
        "never": [
            *small,
            *never,
            f"--out={folder}/never.json",
            "--torch",
            f"--torch_python={stand_in}",
            "--members=3",
        ],
        "no torch": [*small, *never, f"--out={folder}/no_torch.json", "--torch"],
        "typo": [*small, "--config.train.batchsize=4"],
        "size": [*small, "--gpu_bytes=48G"],
        "nonsense": [*small, "--gpu_bytes=much"],
        "steps": [*small, "--steps=0"],
        "members": [*small, "--members=0"],
        "a pack that pages": [*small, *always, "--members=2"],
        "a pack of matrices": [*small, *never, "--members=2", "--config.lora.modules_to_save=lm_head"],
        "kernel": [*small, "--config.model.kernel=triton"],
        "micro-batches": [*small, "--config.train.grad_accum=3"],
        "rival": [*small, "--torch", "--config.quant.format=int4"],
        "model": ["--config=configs/guanaco_65b.py", "--config.model.path=nobody/nothing"],
    }
    found = run_commands([["experiments.bench_train", *flags] for flags in commands.values()])
    return dict(zip(commands, found, strict=True)) | {"folder": folder}


def report(results, name):
    return json.loads((results["folder"] / name).read_text())


def test_what_is_written(results):
    assert results["always"]["status"] == 0, results["always"]["err"]
    found = report(results, "new/always.json")
    assert "--gpu-bytes=48GiB" in found["command"] and found["versions"]["jax"] and found["device"] == "cpu"
    assert found["gpu_bytes"] is None and found["torch"] is None and found["order"] == ["jax"]
    assert found["kernel_seconds"] == {}  # profiled, but no GPU ran anything
    assert found["batch"] == {"micro_batches": 2, "sequences": 2, "length": 32}
    assert found["tokens_per_step"] == 128 and found["trainable_params"] == 2 * 16 * (64 + 64 + 176 + 64)
    assert len(found["losses"]) == 3 and len(found["every_gradient_seconds"]) == 2
    assert np.isfinite(found["losses"]).all() and np.isfinite(found["grad_norms"]).all()
    assert found["losses"][0] == pytest.approx(np.log(1024) + 0.5, rel=0.05)  # logits of unit variance
    for key in ("tokens_per_second", "gradient_seconds", "update_seconds", "resident_update_seconds"):
        assert found[key] > 0
    seconds = found["step_seconds"]
    assert found["tokens_per_second"] == pytest.approx(128 / seconds)
    share = found["utilization"]
    assert share["rate_source"] == "measured matmul"
    assert share["mfu"] == pytest.approx(share["model_flops"] / seconds / share["flops_per_second"])
    assert share["hfu"] / share["mfu"] == pytest.approx(share["hardware_flops"] / share["model_flops"])
    assert found["peak_device_bytes_source"] == "compiler"
    assert found["plan_to_measured"] == pytest.approx(1, abs=0.02)


def test_model_flops_by_hand(results):
    """4 a token for each frozen weight, 6 for each of the adapters', 4 for the head's, and attention three times."""
    found = report(results, "never.json")
    s, tokens, T = found["sizes"], found["tokens_per_step"], found["batch"]["length"]
    D, F, NH, KH = s["D"], s["F"], s["N"] * s["H"], s["K"] * s["H"]
    P = s["L"] * (2 * D * NH + 2 * D * KH + 3 * D * F)
    attention = 2 * NH * T * s["L"]  # two products over half the square
    adapters = found["trainable_params"]
    token = 4 * P + 6 * adapters + 4 * s["V"] * D + 3 * attention
    assert found["utilization"]["model_flops"] == tokens * token
    assert found["utilization"]["hardware_flops"] == tokens * (token + 2 * P + 2 * adapters + attention)


def test_pages_move_and_change_nothing(results):
    always, never = report(results, "new/always.json"), report(results, "never.json")
    assert always["losses"] == never["losses"] and always["grad_norms"] == never["grad_norms"]
    assert always["optimizer_pages"] > 1 and always["optimizer_pages_resident"] == 0
    assert always["page_traffic_bytes_each_way"] == 2 * 4 * always["trainable_params"]  # two moments in 32 bits
    assert never["page_traffic_bytes_each_way"] == 0 and never["resident_update_seconds"] is None
    assert never["optimizer_pages_resident"] == never["optimizer_pages"]
    assert "pages moved, each way a step" in results["always"]["out"]
    assert "pages moved, each way a step" not in results["never"]["out"]


def test_a_pack_is_held_against_single_runs(results):
    found = report(results, "never.json")
    pack = found["pack"]
    assert (pack["members"], pack["over"], len(pack["every_step_seconds"])) == (3, "map", 2)
    assert pack["tokens_per_second"] == pytest.approx(3 * 128 / pack["step_seconds"])
    assert pack["speed_to_single_runs"] == pack["tokens_per_second"] / found["tokens_per_second"]
    assert pack["planned_device_bytes"] == pack["peak_device_bytes"]  # of one program, which the plan finds again
    assert pack["losses"] == pytest.approx(3 * [found["losses"][-1]], rel=0.05) and len(set(pack["losses"])) == 3
    assert "pack of 3 (map): " in results["never"]["out"]


def test_a_cap_is_not_for_cpus(results):
    line = "--gpu_bytes=48GiB is not applied: this process computes on cpu, no GPU"
    assert results["always"]["out"].count(line) == 1


def test_torch_is_asked_for_the_same_and_compared(results):
    asked, found = report(results, "asked.json"), report(results, "never.json")
    assert asked["sizes"]["F"] == 176 and asked["sizes"]["tied"] and asked["batch"] == {"G": 2, "B": 2, "T": 32}
    assert asked["lora"]["targets"][0] == "q_proj" and asked["lora"]["dropout"] == 0.1 and asked["steps"] == 2
    assert found["order"] == ["torch", "jax"] and found["torch"] == RIVAL
    assert found["speed_to_torch"] == found["tokens_per_second"] / 0.5
    for words in ("torch first", "torch on a card", "not the same shape: torch trains 7 parameters"):
        assert words in results["never"]["out"]


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed here")
def test_without_torch_the_rest_is_measured(results):
    found = results["no torch"]
    assert found["status"] == 0 and "tokens/s, of the median step" in found["out"]
    said = [line for line in found["out"].splitlines() if line.startswith("torch is left out: ")]
    assert len(said) == 1 and f"torch cannot be imported by {sys.executable}: No module named" in said[0]
    written = report(results, "no_torch.json")
    assert written["torch"]["error"] in said[0] and "speed_to_torch" not in written


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (None, "cannot be run: No such file or directory"),
        ("echo one >&2; echo two >&2; exit 1", "two"),
        ("kill -9 $$", "exit status -9 without a word"),
    ],
)
def test_what_the_rival_dies_of_is_said(tmp_path, script, error):
    python = tmp_path / "python"
    if script:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    assert torch_side.run(str(python), {})["error"].endswith(error)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("typo", ["--config.train.batchsize", "did you mean --config.train.batch_size"]),
        ("size", ["--gpu_bytes=48G: expected a size with its unit, as 48GiB (48 * 2^30) or 48GB (48 * 10^9)"]),
        ("nonsense", ["--gpu_bytes=much: expected a size"]),
        ("steps", ["--steps=0"]),
        ("members", ["--members=0"]),
        ("a pack that pages", ["optimizer.paging is always", "set optimizer.paging=auto"]),
        ("a pack of matrices", ["a pack trains adapters alone", "leave them out"]),
        ("kernel", ["model.kernel is 'triton', which needs an NVIDIA GPU"]),
        ("micro-batches", ["train.batch_size 4 cannot be cut into train.grad_accum 3"]),
        ("rival", ["--torch measures quant.format nf4 and fp4, found 'int4'"]),
        ("model", ["nobody/nothing"]),
    ],
)
def test_mistakes_are_one_line(results, assert_one_line_error, name, words):
    assert_one_line_error(results[name], words)


def test_the_rival_itself(results):
    """Where torch is: bitsandbytes + PEFT + transformers on a small model, on whatever there is to compute on."""
    python = os.environ.get("QLORA_JAX_TORCH_PYTHON", sys.executable)
    asked = report(results, "asked.json") | {"steps": 1, "warmup": 1}
    one_thread = os.environ | {
        "OMP_NUM_THREADS": "1"
    }  # on busy cores OpenMP's threads wait for one another, for seconds
    done = subprocess.run([python, SCRIPT], input=json.dumps(asked), env=one_thread, capture_output=True, text=True)
    if done.returncode == 3 and "cannot be imported" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ours = report(results, "never.json")
    assert found["trainable_params"] == ours["trainable_params"] and found["linears_4bit"] == 7 * asked["sizes"]["L"]
    assert np.isfinite(found["losses"]).all() and found["losses"][0] == pytest.approx(ours["losses"][0], rel=0.05)
    assert found["tokens_per_second"] > 0 and found["optimizer"] in ("AdamW", "PagedAdamW32bit")
