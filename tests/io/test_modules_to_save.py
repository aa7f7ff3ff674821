"""Adapters with whole embedding and head: PEFT's give PEFT's logits; ours are PEFT's, merge, and refuse misfits."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.io.load import QuantSpec, load_config, load_model
from qlora_jax.io.merge import copy_adapter, merge_folder
from qlora_jax.io.peft import load_adapter, matrix_shapes, read_matrices, write_adapter
from qlora_jax.models.kind import LLAMA

pytestmark = pytest.mark.quick_compile

EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
CASES = {"modules_to_save": "llama1", "modules_to_save_tied": "llama3"}
logits_of = jax.jit(lambda model, tokens: model.logits(model(tokens)[0]))


def model_of(golden, name, dtype=jnp.float32, quant=None):
    return load_model(golden / "llama" / CASES[name], quant, dtype)


@pytest.fixture
def altered(golden, tmp_path):
    """altered(name, change of tensors, changes of adapter_config.json): a copy of PEFT's own folder."""

    def make(name="modules_to_save", tensors=lambda t: None, **changes) -> Path:
        folder = Path(shutil.copytree(golden / "peft" / name, tmp_path / "adapter"))
        config = json.loads((folder / "adapter_config.json").read_text()) | changes
        (folder / "adapter_config.json").write_text(json.dumps(config))
        held = load_file(folder / "adapter_model.safetensors")
        tensors(held)
        save_file(held, folder / "adapter_model.safetensors")
        return folder

    return make


@pytest.mark.parametrize("name", CASES)
def test_logits_of_peft_from_its_folder_from_ours_and_merged(golden, name, tmp_path):
    folder, model = golden / "peft" / name, model_of(golden, name)
    with np.load(folder / "logits.npz") as file:
        tokens, expected = file["tokens"], file["logits"]
    config = load_adapter(model, folder)
    assert config.modules_to_save == (("embed_tokens", "lm_head") if name == "modules_to_save" else ("embed_tokens",))
    found = logits_of(model, tokens)
    assert found.shape == expected.shape == (2, 24, 98) and model.config.V == 98
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)

    for module in lora.MODULES:  # as a run has it
        lora.train_whole(model, module)
    _, adapter, _ = lora.split(model)
    both = lora.select_modules(("lm_head", "embed_tokens"), True, False)
    write_adapter(tmp_path / "ours", adapter, lora.LoRAConfig(2, 3.0, 0.0, config.targets, False, both), CASES[name])
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "ours"))
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(value, ours[key])
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert settings["ensure_weight_tying"] == (name == "modules_to_save_tied")

    base = golden / "llama" / CASES[name]
    merge_folder(base, tmp_path / "ours", tmp_path / "merged", dtype="float32")
    assert load_config(tmp_path / "merged").V == 98
    merged = load_model(tmp_path / "merged", compute_dtype=jnp.float32)
    np.testing.assert_allclose(logits_of(merged, tokens), expected, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(merged.head_weight(), ours[HEAD])
    np.testing.assert_array_equal(merged.embedding.get_value(), ours[EMBEDDING])


def test_16_bit_merge_holds_what_16_bit_training_used(golden, tmp_path):
    """In bfloat16 the loaded matrices are the merged ones, bit for bit."""
    folder, quant = golden / "peft" / "modules_to_save", QuantSpec("nf4")
    merge_folder(golden / "llama" / "llama1", folder, tmp_path / "merged", quant)
    merged, model = load_model(tmp_path / "merged"), model_of(golden, "modules_to_save", jnp.bfloat16, quant)
    load_adapter(model, folder)
    for ours, theirs in ((merged.embedding, model.embedding), (merged.head, model.head)):
        assert ours.get_value().dtype == theirs.get_value().dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours.get_value(), theirs.get_value())


def test_copied_with_the_tokenizer(golden, tmp_path, altered):
    folder = altered()
    shutil.copyfile(golden / "tokenizer" / "tokenizer.json", folder / "tokenizer.json")
    names = copy_adapter(folder, tmp_path / "out")
    assert sorted(names) == ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert matrix_shapes(tmp_path / "out", LLAMA) == {"embed_tokens": (98, 32), "lm_head": (98, 32)}


def drop(key):
    return lambda tensors: tensors.pop(key)


def put(key, *shape):
    return lambda tensors: tensors.update({key: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("name", "tensors", "changes", "message"),
    [
        ("modules_to_save", drop(HEAD), {}, r"missing base_model.model.lm_head.weight \(modules_to_save\)"),
        ("modules_to_save", drop(HEAD), {"modules_to_save": ["embed_tokens"]}, "would have 96 and 98 rows"),
        ("modules_to_save", put(HEAD, 98, 16), {}, r"lm_head.weight is \[98, 16\], expected \[96 or more, 32\]"),
        ("modules_to_save", put(EMBEDDING, 90, 32), {}, r"embed_tokens.weight is \[90, 32\], expected \[96 or more"),
        ("modules_to_save_tied", put(HEAD, 98, 32), {}, "embed_tokens and lm_head differ.* base model ties them"),
        ("modules_to_save_tied", drop(HEAD), {}, "would have 96 and 98 rows"),
    ],
)
def test_what_does_not_fit_is_one_line(golden, altered, name, tensors, changes, message):
    folder = altered(name, tensors, **changes)
    with pytest.raises(InputError, match=message):
        read_matrices(model_of(golden, name), folder)


def test_matrices_without_modules_to_save_are_those_of_a_resized_base(golden, altered):
    """PEFT writes them so where the vocabulary grew and did not train; they are read all the same."""
    model = model_of(golden, "modules_to_save")
    assert load_adapter(model, altered(modules_to_save=None)).modules_to_save == ()
    assert model.config.V == 98 and model.embedding.get_value().shape == (98, 32)
