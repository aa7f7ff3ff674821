"""A run ends the same however it was interrupted, and stops with a clear line where it cannot go on."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.errors import InputError
from qlora_jax.optim.paged import PagedOptimizer
from qlora_jax.optim.residency import RESERVED, decide
from qlora_jax.settings import resolved
from qlora_jax.train import checkpoints, loop
from qlora_jax.train.checks import check_config
from qlora_jax.train.loop import Run, Stopped, finetune

pytestmark = pytest.mark.quick_compile


def train(config, path: Path) -> dict:
    return finetune(config, resolved(config), path, say=lambda line: None)


def adapter(path: Path) -> dict[str, np.ndarray]:
    return load_file(path / "adapter" / "adapter_model.safetensors")


def losses(path: Path) -> list[float]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def interrupt_at(monkeypatch, step: int, action) -> None:
    original = Run._step

    def interrupted(self, index):
        if index == step:
            action()
        return original(self, index)

    monkeypatch.setattr(Run, "_step", interrupted)


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_resumed_equals_uninterrupted_bit_for_bit(tiny_config, tmp_path, monkeypatch):
    summary = train(tiny_config, tmp_path / "whole")

    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(tiny_config, tmp_path / "cut")
    again = train(tiny_config, tmp_path / "cut")
    assert_same(adapter(tmp_path / "whole"), adapter(tmp_path / "cut"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert len(losses(tmp_path / "cut")) == 6
    assert {k: summary[k] for k in ("config_hash", "final_train_loss", "steps")} == {
        k: again[k] for k in ("config_hash", "final_train_loss", "steps")
    }


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(tiny_config, tmp_path):
    train(tiny_config, tmp_path / "run")
    before, rows = adapter(tmp_path / "run"), losses(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "6"
    largest = max(newest.rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    said: list[str] = []
    finetune(tiny_config, resolved(tiny_config), tmp_path / "run", said.append)
    assert f"{newest} cannot be used" in said[0] and said[0].endswith("set aside as 6.set_aside, going on from step 4")
    assert "run: resumed, 4 of 6 steps done" in said
    assert_same(before, adapter(tmp_path / "run"))
    assert losses(tmp_path / "run") == rows
    assert sorted(path.name for path in newest.parent.iterdir()) == ["4", "6", "6.set_aside"]


def test_dropout_is_part_of_the_resumed_state(tiny_config, tmp_path):
    without = tiny_config.copy_and_resolve_references()
    without.lora.dropout = 0.0
    train(tiny_config, tmp_path / "with")
    train(without, tmp_path / "without")
    assert losses(tmp_path / "with") != losses(tmp_path / "without")


def test_sigterm_saves_and_a_second_start_goes_on(tiny_config, tmp_path, monkeypatch):
    tiny_config.train.checkpoint_every = 100
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="after step 4"):
            train(tiny_config, tmp_path / "stopped")
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["4"]
    train(tiny_config, tmp_path / "stopped")
    train(tiny_config, tmp_path / "whole")
    assert_same(adapter(tmp_path / "whole"), adapter(tmp_path / "stopped"))


def test_base_is_bit_identical_after_training(tiny_config, tmp_path, monkeypatch):
    seen = {}
    original = Run.finish

    def finish(self):
        seen["before"] = jax.tree.map(np.array, jax.tree.leaves(self.prepared.base))
        result = original(self)
        seen["after"] = jax.tree.map(np.array, jax.tree.leaves(self.prepared.base))
        return result

    monkeypatch.setattr(Run, "finish", finish)
    train(tiny_config, tmp_path / "run")
    for before, after in zip(seen["before"], seen["after"], strict=True):
        assert before.tobytes() == after.tobytes()


def give_device(monkeypatch, optimizer_bytes: int) -> None:
    """As if the device had memory for the run's programs and this much besides."""
    monkeypatch.setattr(loop, "memory_limit", lambda: 1)

    def decided(paging, pages, limit, programs, share):
        assert limit == 1 and programs > 0 and share == 1
        return decide(paging, pages, math.ceil((programs + optimizer_bytes) / (1 - RESERVED)) + 2, programs)

    monkeypatch.setattr(loop, "decide", decided)


def said_of_pages(said: list[str]) -> str:
    (line,) = (line for line in said if line.startswith("optimizer: "))
    return line


def test_paging_changes_no_bit(tiny_config, tmp_path, monkeypatch):
    """Nor does where a run goes on after it was cut off: every third part of this one has pages elsewhere."""
    tiny_config.optimizer.page_bytes = 1000
    for paging in ("never", "always", "auto"):
        tiny_config.optimizer.paging = paging
        train(tiny_config, tmp_path / paging)
    said: list[list[str]] = []

    def part(optimizer_bytes: int, cut_at: int | None) -> None:
        said.append([])
        with monkeypatch.context() as patch:
            give_device(patch, optimizer_bytes)
            if cut_at is None:
                finetune(tiny_config, resolved(tiny_config), tmp_path / "parts", said[-1].append)
                return
            interrupt_at(patch, cut_at, lambda: (_ for _ in ()).throw(RuntimeError("power cut")))
            with pytest.raises(RuntimeError, match="power cut"):
                finetune(tiny_config, resolved(tiny_config), tmp_path / "parts", said[-1].append)

    part(0, cut_at=2)
    part(4_000, cut_at=4)
    part(1 << 30, cut_at=None)
    everywhere, partly, nowhere = (
        re.search(r"(all|\d+) (?:of (\d+) pages|on the device)", said_of_pages(x)) for x in said
    )
    assert everywhere and partly and nowhere
    assert everywhere[1] == everywhere[2] == partly[2] and 0 < int(partly[1]) < int(partly[2]) and nowhere[1] == "all"
    for name in ("always", "auto", "parts"):
        assert_same(adapter(tmp_path / "never"), adapter(tmp_path / name))
    assert losses(tmp_path / "never") == losses(tmp_path / "parts")


def test_auto_compiles_the_programs_that_training_uses(tiny_config, tmp_path, monkeypatch):
    """What the decision was made from is not compiled again."""
    runs: list[Run] = []
    original = Run.finish
    monkeypatch.setattr(Run, "finish", lambda self: (runs.append(self), original(self))[1])
    give_device(monkeypatch, 0)
    tiny_config.train.steps = 2
    train(tiny_config, tmp_path / "run")
    assert len(runs[0].gradient._compiled) == 1


def test_a_paged_name_is_the_plain_one_paged(tiny_config, tmp_path):
    """With rows large enough for 8-bit state."""
    tiny_config.lora.rank, tiny_config.lora.targets, tiny_config.optimizer.page_bytes = 128, ("q_proj",), 30_000
    tiny_config.optimizer.name, tiny_config.optimizer.paging = "adamw8bit", "never"
    train(tiny_config, tmp_path / "plain")
    tiny_config.optimizer.name, tiny_config.optimizer.paging = "paged_adamw8bit", "auto"
    said: list[str] = []
    finetune(tiny_config, resolved(tiny_config), tmp_path / "paged", say=said.append)
    assert any("in host memory (optimizer.paging = always)" in line for line in said)
    assert_same(adapter(tmp_path / "plain"), adapter(tmp_path / "paged"))


def test_a_paged_name_that_may_never_page_is_refused(tiny_config, tmp_path):
    tiny_config.optimizer.name, tiny_config.optimizer.paging = "paged_lion", "never"
    with pytest.raises(InputError, match="set optimizer.paging=auto, or optimizer.name=lion"):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_update_that_spoils_the_adapter_is_never_saved(tiny_config, tmp_path, monkeypatch):
    """One value of it, by the last update, after which no loss would show it."""
    original, updates = PagedOptimizer.update, []

    def spoil(self, *arguments):
        adapter, states = original(self, *arguments)
        updates.append(1)
        if len(updates) == 6:
            leaves, treedef = jax.tree.flatten(adapter)
            adapter = jax.tree.unflatten(treedef, [*leaves[:-1], leaves[-1].at[-1, -1, -1].set(math.nan)])
        return adapter, states

    monkeypatch.setattr(PagedOptimizer, "update", spoil)
    message = r"step 6: the adapter holds NaN or inf .*batch 5\]; not saved, the checkpoint of step 4 is whole"
    with pytest.raises(InputError, match=message):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "checkpoints" / "6").exists()


def test_a_held_out_loss_that_is_not_finite_is_an_error(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "evaluate", lambda self, examples: float("nan"))
    tiny_config.train.steps = 1
    with pytest.raises(InputError, match="the held-out loss after 1 steps is nan"):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", math.nan), ("learning_rate", math.inf), ("max_grad_norm", math.nan),
        ("weight_decay", math.nan), ("weight_decay", -0.1), ("beta1", 1.0), ("beta2", math.nan), ("eps", 0.0),
        ("eps", math.nan),
    ],
)  # fmt: skip
def test_numbers_that_no_optimizer_can_have(tiny_config, key, value):
    """A comparison with NaN is never true: max_grad_norm = nan would silently not clip."""
    tiny_config.optimizer[key] = value
    with pytest.raises(InputError, match=f"optimizer.{key}"):
        check_config(tiny_config)
    if not math.isfinite(value):
        with pytest.raises(InputError, match=f"config key optimizer.{key} is {value}; expected a finite number"):
            resolved(tiny_config)


def test_loss_that_is_not_finite_stops_and_names_step_and_batch(tiny_config, tmp_path, monkeypatch):
    original = loop.Program.__call__

    def poisoned(self, *arguments):
        result = original(self, *arguments)
        if len(arguments) == 5 and poisoned.calls == 4:
            result = (result[0], result[1]._replace(loss=np.float32("nan")))
        poisoned.calls += len(arguments) == 5
        return result

    poisoned.calls = 0
    monkeypatch.setattr(loop.Program, "__call__", poisoned)
    with pytest.raises(InputError, match=r"step 5: loss nan.*batches.npy, batch 4.*checkpoint of step 4"):
        train(tiny_config, tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["2", "4"]


def test_workdir_of_another_config_is_refused_with_the_keys(tiny_config, tmp_path):
    train(tiny_config, tmp_path / "run")
    tiny_config.optimizer.learning_rate = 3e-4
    tiny_config.lora.rank = 3
    with pytest.raises(
        InputError, match=r"lora.rank: 2 there, 3 here; optimizer.learning_rate: 0.01 there, 0.0003 here"
    ):
        train(tiny_config, tmp_path / "run")


def test_finished_run_started_again_writes_the_same_files(tiny_config, tmp_path):
    first = train(tiny_config, tmp_path / "run")
    before = adapter(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    second = train(tiny_config, tmp_path / "run")
    assert_same(before, adapter(tmp_path / "run"))
    assert first["final_train_loss"] == second["final_train_loss"]
    assert (tmp_path / "run" / "summary.json").exists()


def test_two_processes_cannot_share_a_workdir(tiny_config, tmp_path, monkeypatch):
    messages = []

    def start_another():
        with pytest.raises(InputError) as refused:
            train(tiny_config, tmp_path / "run")
        messages.append(str(refused.value))

    interrupt_at(monkeypatch, 1, start_another)
    train(tiny_config, tmp_path / "run")
    assert "in use" in messages[0]


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("train", "steps", 0, "at least 1"),
        ("model", "compute_dtype", "float64", "bfloat16 or float32"),
        ("model", "kernel", "cuda", "auto or xla or triton"),
        ("model", "kernel", "triton", "needs an NVIDIA GPU; this process computes on cpu"),
        ("model", "remat", "blocks", "none or selective or block or block[+]offload or auto"),
        ("model", "attention", "flahs", "auto or xla or chunked or flash or cudnn"),
        ("model", "attention", "cudnn", "needs an NVIDIA GPU; this process computes on cpu"),
        ("model", "attention", "flash", "computes in 16 bits, and model.compute_dtype is .float32.: set model.compute"),
        ("model", "sequence_chunk", -1, "expected tokens, or 0 for off"),
        ("optimizer", "paging", "maybe", "never or always or auto"),
        ("optimizer", "schedule", "cosin", "known: constant, linear, cosine"),
        ("optimizer", "name", "adam", "known: adamw"),
        ("quant", "format", "nf5", "known: nf4, fp4, int4"),
        ("quant", "block_size", 48, "power of two"),
        ("lora", "dropout", 1.0, "probability"),
        ("mesh", "devices", 2, "takes 2 devices, and JAX sees 1 here"),
        ("model", "path", "", "model.path is empty"),
        ("data", "batches", "", "data.path is empty"),
        ("lora", "targets", ("q_porj",), "matches no linear layer"),
    ],
)
def test_bad_values_say_what_is_expected(tiny_config, tmp_path, section, key, value, message):
    tiny_config[section][key] = value
    with pytest.raises(InputError, match=message):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_killed_command_ends_with_a_bit_identical_adapter(golden, tmp_path, run_commands):
    """The command as a user runs it, killed without warning once its first checkpoint is there."""
    np.save(tmp_path / "b.npy", np.random.default_rng(1).integers(3, 96, (40, 4, 12)).astype(np.int32))
    command = [
        "experiments.train", "--config=configs/base.py", f"--config.model.path={golden / 'llama' / 'llama1'}",
        "--config.lora.rank=2", f"--config.data.batches={tmp_path / 'b.npy'}", "--config.train.batch_size=4",
        "--config.train.grad_accum=2", "--config.train.checkpoint_every=5", "--config.model.compute_dtype=float32",
        "--config.train.steps=40", "--config.lora.targets=q_proj,down_proj",
    ]  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    victim = subprocess.Popen([sys.executable, "-m", *command, f"--workdir={tmp_path / 'killed'}"], **quiet)
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while not (checkpoints.exists() and any(p.name.isdigit() for p in checkpoints.iterdir())):
        assert victim.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    for result in run_commands([[*command, f"--workdir={tmp_path / name}"] for name in ("killed", "whole")]):
        assert result["status"] == 0, result["err"]
    assert_same(adapter(tmp_path / "whole"), adapter(tmp_path / "killed"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_full_disk_is_one_line_and_keeps_the_older_checkpoints(tiny_config, tmp_path, monkeypatch):
    usage = checkpoints.shutil.disk_usage(tmp_path)

    def nearly_full():
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage._replace(free=1000))

    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, nearly_full)
        with pytest.raises(InputError, match=r"checkpoint at step 4 could not be written.*free space and run"):
            train(tiny_config, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]


def test_batch_that_cannot_be_cut_into_micro_batches(tiny_config, tmp_path):
    tiny_config.data.batches, tiny_config.data.path = "", "rows.json"
    tiny_config.train.grad_accum = 3
    with pytest.raises(InputError, match="4 cannot be cut into train.grad_accum 3"):
        train(tiny_config, tmp_path / "run")


def test_ready_batches_bring_their_own_size(tiny_config, tmp_path):
    """Micro-batches change nothing but rounding, so the recipe's 16 give way to what the file's 4 sequences allow."""
    tiny_config.train.batch_size = tiny_config.train.grad_accum = 16
    tiny_config.lora.dropout = 0.0
    said = []
    finetune(tiny_config, resolved(tiny_config), tmp_path / "recipe", said.append)
    assert any("steps of 4 sequences, as the file has them, not of 16" in line for line in said)
    assert any("4 micro-batches a step, not 16" in line for line in said)
    tiny_config.train.batch_size, tiny_config.train.grad_accum = 4, 2
    train(tiny_config, tmp_path / "fewer")
    np.testing.assert_allclose(losses(tmp_path / "recipe"), losses(tmp_path / "fewer"), rtol=1e-5)


def test_another_config_is_refused_before_anything_is_loaded(tiny_config, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(resolved(tiny_config) | {"train": {"steps": 7}}))
    monkeypatch.setattr(loop, "prepare", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(InputError, match="train.steps: 7 there, 6 here"):
        train(tiny_config, tmp_path / "run")


def test_killed_before_its_first_checkpoint_a_run_has_each_metric_once(tiny_config, tmp_path, monkeypatch):
    original = Run.evaluate
    monkeypatch.setattr(Run, "evaluate", lambda self, examples: original(self, examples) or 1.0)  # as if held out
    tiny_config.eval.every = 2

    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(tiny_config, tmp_path / "run")
    train(tiny_config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_how_long_sequences_run_is_said(tiny_config, tmp_path):
    """12 tokens: whole by default, in chunks of 5 when asked; attention that needs all queries cannot have chunks."""

    def said() -> str:
        lines: list[str] = []
        finetune(tiny_config, resolved(tiny_config), tmp_path / str(tiny_config.model.sequence_chunk), say=lines.append)
        return "\n".join(lines)

    tiny_config.train.steps = 1
    assert "attention = xla for the longest sequences, of 12 tokens" in said()
    tiny_config.model.sequence_chunk = 5
    assert "sequences over 5 tokens in chunks of at most that, attention = chunked" in said()
    tiny_config.model.attention = "xla"
    with pytest.raises(InputError, match="model.attention is 'xla'.*set model.attention=chunked, or sequence_chunk=0"):
        check_config(tiny_config)


@pytest.mark.parametrize("sequence_chunk", [0, 5])
def test_offloaded_run_equals_the_run_on_the_device_bit_for_bit(tiny_config, tmp_path, sequence_chunk):
    tiny_config.model.sequence_chunk = sequence_chunk
    for remat in ("block", "block+offload"):
        tiny_config.model.remat = remat
        train(tiny_config, tmp_path / remat)
    assert losses(tmp_path / "block") == losses(tmp_path / "block+offload")
    assert_same(adapter(tmp_path / "block"), adapter(tmp_path / "block+offload"))
