"""The encoder against transformers: logits, losses and gradients of padded pairs, classes and numbers."""

import json
from shutil import copytree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qlora_jax import lora
from qlora_jax.data.glue.examples import as_token
from qlora_jax.errors import InputError
from qlora_jax.io.adapters.head import read_head
from qlora_jax.io.adapters.tensors import PREFIX, head_keys
from qlora_jax.io.load import load_model
from qlora_jax.io.peft import load_adapter
from qlora_jax.models.config import parse_config, read_json
from qlora_jax.models.dropout import DropoutKey
from qlora_jax.train.step import make_gradient
from tests.conftest import TESTS
from tests.roberta import FOLDERS, classes_of, golden

NAMES = ("masked", "regression")
pytestmark = pytest.mark.quick_compile


def test_logits_of_a_checkpoint_with_a_head():
    model = load_model(FOLDERS / "regression", compute_dtype=jnp.float32)
    rows = golden("regression")
    np.testing.assert_allclose(classes_of(model, rows), rows["base"], atol=1e-4, rtol=0)


def as_batch(rows, T):
    """Micro-batches [G, B, T] as row.py has them, of two rows each, wider than the rows need."""
    tokens, mask = np.zeros((4, T), np.int32), np.zeros((4, T), np.bool_)
    labels = rows["logits"].shape[1]
    for row, (length, label) in enumerate(zip(rows["lengths"], rows["labels"], strict=True)):
        tokens[row, :length] = rows["tokens"][row, :length]
        tokens[row, length], mask[row, length] = as_token(label, labels), True
    return tokens.reshape(2, 2, T), mask.reshape(2, 2, T)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_logits_and_gradients(name):
    """PEFT's adapter and head: its logits, and the gradients of both, as torch has them, from rows of a batch."""
    rows = golden(name)
    model = load_model(FOLDERS / name, compute_dtype=jnp.float32)
    config = load_adapter(model, FOLDERS / name / "adapter")
    np.testing.assert_allclose(classes_of(model, rows), rows["logits"], atol=1e-4, rtol=0)

    lora.train_head(model, read_head(model.config, FOLDERS / name / "adapter"))
    model.remat = {"masked": "block", "regression": "none"}[name]
    graph, adapter, base = lora.split(model)
    tokens, mask = as_batch(rows, 20)
    sums, metrics = jax.jit(make_gradient(graph, 64, 0.0))(adapter, base, tokens, mask, None)
    np.testing.assert_allclose(metrics.loss, rows["loss"], rtol=1e-5)
    assert metrics.target_tokens == 4
    expected = {key.removeprefix("grad "): value for key, value in rows.items() if key.startswith("grad ")}
    keys = head_keys(model.config.kind)
    found = {keys[part]: value for part, value in lora.head_arrays(sums).items()}
    for part, pair in lora.adapter_arrays(sums).items():
        for letter, stack in zip("AB", pair, strict=True):
            for index, value in enumerate(stack):
                found[f"{PREFIX}{model.config.module(index, part)}.lora_{letter}.weight"] = value
    assert found.keys() == expected.keys()
    assert len(found) == 4 + 2 * len(config.targets) * model.config.L
    for key, value in found.items():
        atol = 1e-4 * abs(expected[key]).max()
        np.testing.assert_allclose(value * metrics.factor, expected[key], atol=atol, rtol=1e-3)


def test_a_row_is_by_itself():
    """What stands behind its label, which rows stand beside it, and in which micro-batch it is, change nothing, with
    dropout; and rows without a label count for nothing."""
    rows = golden("masked")
    model = load_model(FOLDERS / "masked", compute_dtype=jnp.float32)
    load_adapter(model, FOLDERS / "masked" / "adapter")
    model.dropout_rate = 0.5
    graph, state = nnx.split(model)

    @jax.jit
    def both(tokens, mask, first):
        model = nnx.merge(graph, state)
        return model.loss(tokens, mask, DropoutKey(jax.random.key(5), first)), model.loss_and_hits(tokens, mask)

    tokens, mask = (part.reshape(4, -1) for part in as_batch(rows, 20))
    (whole, count), (without, hits, _) = both(tokens, mask, 0)
    assert count == 4 and abs(whole - without) > 1e-3
    np.testing.assert_allclose(without / 4, rows["loss"], rtol=1e-5)
    assert hits == (rows["logits"].argmax(axis=1) == rows["labels"]).sum()
    others = np.where(np.arange(20) > rows["lengths"][:, None], 7, tokens).astype(np.int32)
    np.testing.assert_allclose(both(others, mask, 0)[0][0], whole, rtol=1e-5)
    first, last = mask.copy(), mask.copy()
    first[2:], last[:2] = False, False
    (one, two), _ = both(tokens, first, 0)
    moved = both(np.roll(tokens, 2, axis=0), np.roll(last, 2, axis=0), 2)[0][0]  # the last two come first
    assert two == 2
    np.testing.assert_allclose(one + moved, whole, rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"is_decoder": True}, "is_decoder is True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"pad_token_id": None}, "pad_token_id is None; expected a token's id, 0 to 47"),
        ({"max_position_embeddings": 4}, "leaves no place after the pad token's"),
        ({"problem_type": "multi_label_classification"}, "several labels at once"),
        ({"problem_type": "single_label_classification"}, "there are 1 labels"),
        ({"architectures": ["RobertaForTokenClassification"]}, "unknown architecture RobertaForTokenClassification"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(change, message):
    raw = read_json(FOLDERS / "regression" / "config.json")
    with pytest.raises(InputError, match=message):
        parse_config(raw | change, "config.json")


def test_no_text_is_asked_of_an_encoder():
    model = load_model(FOLDERS / "masked", compute_dtype=jnp.float32)
    with pytest.raises(InputError, match="is an encoder"):
        model.new_cache(1, 64)
    with pytest.raises(InputError, match="has no head over classes"):
        model.classes(jnp.ones((1, 4), jnp.int32), None)


def test_a_decoder_takes_no_head(tmp_path):
    """Whatever else the adapter's folder says; and a folder without a head is no encoder's."""
    copytree(FOLDERS / "masked" / "adapter", tmp_path / "adapter")
    model = load_model(TESTS / "golden" / "llama" / "llama1", compute_dtype=jnp.float32)
    with pytest.raises(InputError, match="has a head over classes .* the model is a decoder"):
        load_adapter(model, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for changes in ({"modules_to_save": None}, {"task_type": None}):  # each says it alone
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(InputError, match="has a head over classes .* the model is a decoder"):
            load_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if not key.endswith("classifier.dense.bias")}
    save_file(kept, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="classifier.dense.bias is missing, expected"):
        load_adapter(load_model(FOLDERS / "masked", compute_dtype=jnp.float32), tmp_path / "adapter")
