"""A run on packed rows: resumed bit for bit, evaluated as the unpacked one, refused where it cannot be."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import base
from qlora_jax.errors import InputError
from qlora_jax.planning import program
from qlora_jax.settings import resolved
from qlora_jax.train import loop, shapes
from qlora_jax.train.checks import check_values
from qlora_jax.train.loop import Run, finetune
from qlora_jax.train.spec import read_spec
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.quick_compile


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    rows = [{"input": "a b " * (n % 4), "output": f"number {n}"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = base.get_config()
    c.model.path = str(write_tiny_checkpoint(folder / "model"))
    c.model.compute_dtype = "float32"
    c.lora.rank, c.lora.dropout, c.lora.targets = 2, 0.0, ("q_proj", "down_proj")
    c.data.path, c.data.format = str(folder / "rows.jsonl"), "input-output"
    c.data.max_source_len, c.data.max_target_len, c.data.pad_to_multiple_of = 20, 20, 8
    c.data.packing, c.data.eval_examples = True, 7
    c.optimizer.learning_rate = 1e-2
    c.train.steps, c.train.batch_size, c.train.grad_accum, c.train.checkpoint_every = 5, 4, 2, 2
    c.eval.batch_size = 2
    return c


def train(config, path):
    said = []
    summary = finetune(config, resolved(config), path, said.append)
    return summary, "\n".join(said), load_file(path / "adapter" / "adapter_model.safetensors")


def test_resumed_is_uninterrupted_bit_for_bit_and_evaluates_as_unpacked(config, tmp_path, monkeypatch):
    summary, said, whole = train(config, tmp_path / "whole")
    assert "packed rows of" in said and "batches are 40 tokens long" in said
    shapes = {json.loads(line)["tokens"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()}
    assert shapes == {4 * 40}
    original = Run._step

    def interrupted(self, step):
        if step == 3:
            raise RuntimeError("power cut")
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", interrupted)
        with pytest.raises(RuntimeError):
            train(config, tmp_path / "cut")
    resumed, said, adapter = train(config, tmp_path / "cut")
    assert "resumed, 2 of 5 steps" in said
    for name, array in whole.items():
        np.testing.assert_array_equal(array, adapter[name])
    rows = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "cut")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in rows]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    assert resumed["final_eval_loss"] == summary["final_eval_loss"]

    unpacked = config.copy_and_resolve_references()
    unpacked.data.packing = False
    unpacked.lora.init_from = str(tmp_path / "whole" / "adapter")
    unpacked.train.steps, unpacked.optimizer.learning_rate = 1, 1e-30
    np.testing.assert_allclose(
        train(unpacked, tmp_path / "unpacked")[0]["final_eval_loss"], summary["final_eval_loss"], rtol=1e-6
    )


def test_what_is_compiled_for_the_largest_batch_is_what_runs(config, tmp_path, monkeypatch):
    """The program that paging is decided by has segments too: no other is compiled for the first step."""
    compiled = []
    original = loop.Program.compile

    def noting(self, *arguments):
        compiled.append(len(arguments))
        return original(self, *arguments)

    monkeypatch.setattr(loop.Program, "compile", noting)
    monkeypatch.setattr(loop, "memory_limit", lambda: 2**40)
    short = config.copy_and_resolve_references()
    short.train.steps = 1
    train(short, tmp_path / "run")
    assert compiled[:2] == [6, 5]


def test_a_plan_has_segments(config, monkeypatch):
    config = config.copy_and_resolve_references()
    config.data.pack_length = 128
    spec = read_spec(config)
    assert (spec.batch.T, spec.batch.packed, spec.evaluation.T, spec.evaluation.packed) == (128, True, 128, True)
    taken = []
    monkeypatch.setattr(program, "on_gpu", lambda gpu, arguments: arguments)
    monkeypatch.setattr(program, "compile_for", lambda gpu, function, *arguments, **_: taken.append(arguments))
    model = shapes.abstract_model(spec.model)
    program.compile_gradient(None, model, spec.batch, dropout=False)
    program.compile_evaluation(None, model, spec.evaluation)
    assert [(arguments[-1].shape, arguments[-1].dtype) for arguments in taken] == [
        ((2, 2, 128), np.int32), ((2, 128), np.int32),
    ]  # fmt: skip
    config.data.packing = False
    spec = read_spec(config)
    assert (spec.batch.T, spec.batch.packed) == (40, False)
    program.compile_gradient(None, model, spec.batch, dropout=False)
    assert taken[-1][-1] is None


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "attention", "cudnn", "data.packing needs attention that stays within an example"),
        ("data", "batches", "b.npy", "data.batches is a file of ready rows"),
    ],
)
def test_what_does_not_go_together(config, section, key, value, message):
    config = config.copy_and_resolve_references()
    config[section][key] = value
    with pytest.raises(InputError, match=message):
        check_values(config, "gpu")


def test_rows_that_are_too_short(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.data.pack_length = 8
    with pytest.raises(InputError, match=r"rows.jsonl, line \d+: \d+ tokens do not fit into packed rows of 8"):
        train(config, tmp_path / "run")
