"""A config.json that ties the head to the embedding, and weights with a head of their own: they are not tied then.

So does transformers 5.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.io.load import QuantSpec, load_config, load_model
from qlora_jax.io.merge import merge_folder
from qlora_jax.io.write import quantize_folder
from qlora_jax.train.spec import read_spec
from tests import tiny_run
from tests.llama_names import EMBEDDING, HEAD

pytestmark = pytest.mark.quick_compile
logits_of = jax.jit(lambda model, tokens: model.logits(model(tokens)[0]))


def said(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


@pytest.fixture
def folder(golden, tmp_path) -> Path:
    """llama1, which has a head of its own, with a config.json that ties it. Its golden logits are those of the head."""
    folder = Path(shutil.copytree(golden / "llama" / "llama1", tmp_path / "tied"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


def set_head(folder: Path, head) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {HEAD: head(tensors)}, folder / "model.safetensors")


def test_its_logits_are_those_of_its_own_head(folder, caplog):
    with np.load(folder / "logits.npz") as file:
        tokens, expected = file["tokens"], file["logits"]
    model = load_model(folder, compute_dtype=jnp.float32)
    assert model.head is not None and not model.config.tied
    np.testing.assert_allclose(logits_of(model, tokens), expected, atol=1e-4, rtol=0)
    load_config(folder)
    assert caplog.text.count("differs from it: not tied") == 1


@pytest.mark.parametrize("form", ["native", "bnb", "merged"])
def test_what_is_written_from_it_has_the_head_and_says_so(folder, golden, tmp_path, form):
    """In config.json too: whoever reads it next must not tie."""
    out = tmp_path / "out"
    if form == "merged":
        merge_folder(folder, golden / "peft" / "all_linear_r4", out, QuantSpec(), dtype="float32")
    else:
        quantize_folder(folder, out, form)
    assert said(folder) is True and said(out) is False
    head = load_file(folder / "model.safetensors")[HEAD]
    np.testing.assert_array_equal(load_file(out / "model.safetensors")[HEAD], head)
    model = load_model(out, compute_dtype=jnp.float32)
    assert not model.config.tied
    np.testing.assert_array_equal(model.head_weight(), head)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_copy_of_the_embedding_stays_tied(folder, tmp_path, caplog, dtype):
    """Also a copy in another dtype, if no value was rounded."""
    tensors = load_file(folder / "model.safetensors")
    rounded = tensors[EMBEDDING].astype(ml_dtypes.bfloat16)
    tensors |= {EMBEDDING: rounded.astype(np.float32), HEAD: rounded.astype(dtype)}
    save_file(tensors, folder / "model.safetensors")
    model = load_model(folder, compute_dtype=jnp.float32)
    assert model.head is None and model.config.tied and "not tied" not in caplog.text
    quantize_folder(folder, tmp_path / "out")
    assert said(tmp_path / "out") is True
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")


def test_one_value_makes_the_difference_and_a_file_that_changes_is_read_again(folder):
    def almost(tensors):
        head = tensors[EMBEDDING].copy()
        head[-1, -1] += 1
        return head

    set_head(folder, lambda tensors: tensors[EMBEDDING])
    assert load_config(folder).tied
    set_head(folder, almost)
    assert not load_config(folder).tied


def test_sizes_follow(folder, golden, tmp_path):
    """A plan, and what trains whole, are those of an untied model."""
    config = tiny_run.tiny_config(golden, tmp_path)
    config.model.path, config.lora.modules_to_save = str(folder), ("lm_head",)
    spec = read_spec(config).model
    assert not spec.sizes.tied and spec.lora.modules_to_save == ("lm_head",)


def test_without_weights_the_config_has_the_word(folder):
    """Sizes can be planned for from config.json alone, or beside an index whose shards are not there yet."""
    (folder / "model.safetensors").unlink()
    assert load_config(folder).tied
    index = {"weight_map": {EMBEDDING: "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_config(folder).tied
