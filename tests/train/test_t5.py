"""Runs of an encoder-decoder: 4-bit training that learns, resumes bit for bit, and refuses what it has no form for."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qlora_jax.errors import InputError
from qlora_jax.io import peft
from qlora_jax.io.load import load_model
from qlora_jax.models.dropout import DropoutKey
from qlora_jax.packs.pack import train_pack
from qlora_jax.settings import resolved
from qlora_jax.train.loop import Run, finetune
from qlora_jax.train.setup import prepare
from tests.t5 import FAST, FOLDERS, golden, tiny_t5_run

pytestmark = pytest.mark.quick_compile


@pytest.fixture
def config(tmp_path):
    return tiny_t5_run(tmp_path)


def train(config, path: Path) -> list[str]:
    said: list[str] = []
    finetune(config, resolved(config), path, say=said.append)
    return said


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def adapter(path: Path) -> dict[str, np.ndarray]:
    return load_file(path / "adapter" / peft.WEIGHTS)


def test_a_run_learns_and_resumes_bit_for_bit(config, tmp_path, monkeypatch):
    said = train(config, tmp_path / "whole")
    found = losses(tmp_path / "whole")
    assert len(found) == 10 and np.mean(found[-3:]) < 0.9 * np.mean(found[:3])
    assert any("nf4 + double quantization" in line for line in said)
    original = Run._step

    def interrupted(self, index):
        if index == 6:
            raise RuntimeError("power cut")
        return original(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config, tmp_path / "cut")
    assert "run: resumed, 4 of 10 steps done" in train(config, tmp_path / "cut")
    assert losses(tmp_path / "cut") == found
    a, b = (adapter(tmp_path / name) for name in ("whole", "cut"))
    assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["final_eval_loss"] > 0 and summary["base_bits_per_param"] < 5
    model = load_model(Path(config.model.path))
    again = peft.load_adapter(model, tmp_path / "whole" / "adapter")
    assert len(again.targets) == 5 and again.targets[0] == "encoder.layer.0.SelfAttention.q"

    two = [config.copy_and_resolve_references() for _ in range(2)]
    two[1].train.seed = 5
    mine, other = train_pack(two, say=lambda line: None)
    assert [row["loss"] for row in mine.rows if "loss" in row] == pytest.approx(found, rel=1e-4)
    assert other.summary["final_train_loss"] != mine.summary["final_train_loss"]
    assert 0 < mine.summary["final_eval_accuracy"] <= 1


def test_dropout_does_not_depend_on_the_cut():
    """A step's rows in one micro-batch or in three, in whatever width: the same masks, so the same loss."""
    found = golden("v11")

    model = load_model(FOLDERS / "v11", compute_dtype=jnp.float32)
    peft.load_adapter(model, FOLDERS / "v11" / "adapter")

    state = nnx.split(model)

    @partial(jax.jit, static_argnames=("rate", "lengths"), compiler_options=FAST)
    def loss(tokens, mask, first_row, rate, lengths):
        own = nnx.merge(*state)
        own.dropout_rate, (own.source_len, own.target_len) = rate, lengths
        return own.loss(tokens, mask, dropout_key=DropoutKey(jax.random.key(7), first_row))[0]

    tokens, mask = found["tokens"], found["loss_mask"]
    whole = loss(tokens, mask, 0, 0.3, (0, 0))
    assert abs(float(whole - loss(tokens, mask, 0, 0.0, (0, 0)))) > 0.1
    tokens, mask = (np.pad(x, ((0, 0), (0, 7))) for x in (tokens, mask))
    parts = [loss(tokens[i : i + 1], mask[i : i + 1], i, 0.3, (31, 14)) for i in range(3)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)


REFUSED = {
    "model.remat": "selective", "model.attention": "chunked", "model.sequence_chunk": 512, "data.packing": True,
    "data.train_on_source": True, "data.template": "chat", "lora.modules_to_save": ("lm_head",),
    "data.added_tokens": ("<think>",), "model.router_aux_loss_coef": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_it_has_no_form_for_is_refused(config, key):
    section, name = key.split(".")
    with config.ignore_type():
        config[section][name] = REFUSED[key]
    with pytest.raises(InputError, match=rf"{section}\.{name.partition('_')[0]}"):
        prepare(config, lambda line: None, lambda done, total: None)


def test_batches_without_prompts_are_refused(config, tmp_path):
    np.save(tmp_path / "batches.npy", np.ones((2, 4, 8), np.int32))
    config.data.batches = str(tmp_path / "batches.npy")
    with pytest.raises(InputError, match="must know where a prompt ends"):
        prepare(config, lambda line: None, lambda done, total: None)
