"""Runs of encoders: RoBERTa in 4 bits on rows with labels, from the owners' files to folders that others read.

tests/packs/test_encoders.py has a regression.
"""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import base
from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.io.merge import merge_folder
from qlora_jax.io.peft import load_adapter
from qlora_jax.io.write import quantize_folder
from qlora_jax.settings import resolved
from qlora_jax.train import setup
from qlora_jax.train.loop import Run, finetune
from qlora_jax.train.spec import read_spec
from tests.conftest import TESTS
from tests.roberta import classes_of, write_glue, write_tiny_roberta

pytestmark = pytest.mark.quick_compile
ROWS = os.environ.get("QLORA_JAX_ROBERTA_ROWS")  # a folder that tests/golden/check_roberta.py is to read


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = Path(ROWS) if ROWS else tmp_path_factory.mktemp("encoders")
    write_tiny_roberta(folder / "model")
    write_glue(folder / "glue")
    return folder


def config_of(place: Path, name: str, **changes):
    """Ten steps of eight rows, cut into two micro-batches."""
    c = base.get_config()
    c.model.path, c.model.compute_dtype = str(place / "model"), "float32"
    c.lora.rank, c.lora.alpha, c.lora.targets = 2, 4.0, ("output.dense",)  # of attention and feed-forward
    c.data.path, c.data.format = str(place / "glue" / name / "train.tsv"), "glue"
    c.data.max_examples, c.data.eval_examples = 16, 8  # every step has the same eight rows
    c.optimizer.learning_rate, c.optimizer.max_grad_norm = 2e-2, 1.0
    c.train.steps, c.train.batch_size, c.train.grad_accum, c.train.checkpoint_every = 10, 8, 2, 5
    c.update_from_flattened_dict(changes)
    return c


def train(config, path: Path) -> dict:
    return finetune(config, resolved(config), path, say=lambda line: None)


def losses(path: Path) -> list[float]:
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def trained(place) -> Path:
    train(config_of(place, "CoLA"), place / "run")
    return place / "run"


def test_classes_are_learned_and_a_run_goes_on_bit_for_bit(place, trained, monkeypatch):
    found = losses(trained)
    assert len(found) == 10 and found[-1] < 0.7 * found[0]
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["labels"] == 2 and 0 < summary["final_eval_loss"] < 1
    assert 4 < summary["base_bits_per_param"] < 4.3

    def fail(self, index):
        if index == 7:
            raise KeyboardInterrupt
        return original(self, index)

    original = Run._step
    monkeypatch.setattr(Run, "_step", fail)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(place, "CoLA"), place / "again")
    monkeypatch.setattr(Run, "_step", original)
    train(config_of(place, "CoLA"), place / "again")
    whole, again = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (trained, place / "again"))
    assert whole.keys() == again.keys() and len(whole) == 4 + 2 * 2 * 2
    for key, value in whole.items():
        np.testing.assert_array_equal(value, again[key], err_msg=key)
    assert losses(place / "again") == found


def rows_of(logits_of) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    rows = {"tokens": rng.integers(3, 400, (3, 16)).astype(np.int32), "lengths": np.array([16, 5, 9], np.int32)}
    rows["tokens"][:, 0] = 1
    return rows | {"logits": logits_of(rows)}


def test_what_a_run_wrote_is_read_again(place, trained, tmp_path):
    """The adapter on the base quantized as it is loaded, or on disk; and merged into the 4-bit values, read as a
    checkpoint with a head of its own."""
    quant = QuantSpec("nf4", 64, True)
    model = load_model(place / "model", quant, jnp.float32)
    load_adapter(model, trained / "adapter")
    rows = rows_of(lambda rows: classes_of(model, rows))
    merge_folder(place / "model", trained / "adapter", place / "merged", quant, dtype="float32")
    merged = load_model(place / "merged", compute_dtype=jnp.float32)
    np.testing.assert_allclose(classes_of(merged, rows), rows["logits"], atol=1e-4)
    quantize_folder(place / "model", tmp_path / "native", quant=quant)
    native = load_model(tmp_path / "native", compute_dtype=jnp.float32)
    load_adapter(native, trained / "adapter")
    np.testing.assert_array_equal(classes_of(native, rows), rows["logits"])
    with pytest.raises(InputError, match="use --format=native"):
        quantize_folder(place / "model", tmp_path / "bnb", "bnb", quant)
    settings = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"] == ["classifier"]
    if ROWS:
        np.savez(place / "merged.npz", **rows)
        plain = load_model(place / "model", QuantSpec("none"), jnp.float32)
        load_adapter(plain, trained / "adapter")
        np.savez(place / "adapter.npz", **rows_of(lambda rows: classes_of(plain, rows)))


def test_a_run_begins_with_an_adapters_head(place, trained):
    """Of the same labels; a head of others is refused, for it is no start."""
    config = config_of(place, "CoLA", **{"lora.init_from": str(trained / "adapter")})
    prepared = setup.prepare(config, lambda line: None, lambda done, total: None)
    wanted = load_file(trained / "adapter" / "adapter_model.safetensors")
    for name, value in lora.head_arrays(prepared.adapter).items():
        np.testing.assert_array_equal(value, wanted[f"base_model.model.classifier.{name}"])
    config = config_of(place, "STS-B", **{"lora.init_from": str(trained / "adapter")})
    with pytest.raises(InputError, match="its head has 2 labels, the data have 1"):
        setup.prepare(config, lambda line: None, lambda done, total: None)


def test_a_plan_knows_the_head(place):
    spec = read_spec(config_of(place, "RTE", **{"data.max_source_len": 20}))
    assert spec.model.lora.labels == 2 and spec.batch.T == 64
    assert read_spec(config_of(place, "STS-B")).model.lora.labels == 1


LLAMA = str(TESTS / "golden" / "llama" / "llama1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.packing": True}, "data.packing is True, and the model is an encoder"),
        ({"model.attention": "chunked"}, "model.attention is 'chunked', and the model is an encoder"),
        ({"model.sequence_chunk": 16}, "model.sequence_chunk is 16"),
        ({"model.remat": "selective"}, "model.remat is 'selective'"),
        ({"data.template": "chat"}, "rows with labels have no chat template"),
        ({"data.added_tokens": ("<x>",)}, "no tokens are added for an encoder"),
        ({"eval.mmlu_data": "cais/mmlu"}, "an encoder answers no questions"),
        ({"lora.modules_to_save": ("embed_tokens",)}, "the head trains whole, and nothing else"),
        ({"data.format": "alpaca"}, "learns rows with labels, and data.format is 'alpaca': set data.format=glue"),
        ({"data.batches": "rows.npy"}, "data.batches is a file of ready rows"),
        ({"data.task": "colla"}, r"data.task is 'colla', no task of GLUE \(did you mean cola\?\)"),
        ({"data.task": "rte"}, "line 1: expected a header of distinct field names, found gj04"),
        ({"data.max_source_len": 64}, "data.max_source_len is 64, but the model takes 48 tokens"),
        ({"data.max_target_len": 8}, "a row of GLUE has a label and no answer"),
        ({"model.path": LLAMA}, "the model is a decoder: name an encoder such as RoBERTa"),
        ({"model.path": LLAMA, "data.format": "alpaca", "data.task": "rte"}, "data.task is 'rte', which is for"),
    ],
)
def test_what_goes_with_decoders_alone_is_refused(place, changes, message):
    with pytest.raises(InputError, match=message) as error:
        setup.prepare(config_of(place, "CoLA", **changes), lambda line: None, lambda done, total: None)
    assert "\n" not in str(error.value)
