"""Adapters of families with other names than Llama's: PEFT's in and out, merged, quantized."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.io import peft
from qlora_jax.io.load import QuantSpec, load_config, load_model
from qlora_jax.io.merge import merge_folder
from qlora_jax.io.write import quantize_folder
from qlora_jax.lora import LoRAConfig
from tests.families import FOLDERS, logits_of

pytestmark = pytest.mark.quick_compile

ADAPTED = sorted(path.parent.name for path in FOLDERS.glob("*/adapter"))


def golden(name: str) -> tuple[np.ndarray, np.ndarray]:
    """tokens, and logits with the adapter."""
    with np.load(FOLDERS / name / "logits.npz") as file:
        return file["tokens"], file["adapted"]


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_of_peft(name, tmp_path):
    """Read, written again under PEFT's own keys, and merged into a checkpoint of the family."""
    folder, (tokens, expected) = FOLDERS / name, golden(name)
    model = load_model(folder, compute_dtype=jnp.float32)
    config = peft.load_adapter(model, folder / "adapter")
    assert config.targets == tuple(model.config.linears)
    np.testing.assert_allclose(logits_of(model, tokens), expected, atol=1e-4, rtol=0)

    peft.write_adapter(tmp_path / "ours", lora.split(model)[1], config, name, kind=model.config.kind)
    theirs, ours = (load_file(path / peft.WEIGHTS) for path in (folder / "adapter", tmp_path / "ours"))
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[key], ours[key]) for key in theirs)
    said = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert said["fan_in_fan_out"] == name.startswith("gpt2")

    merge_folder(folder, folder / "adapter", tmp_path / "merged", QuantSpec("none"), dtype="float32")
    merged = load_model(tmp_path / "merged", compute_dtype=jnp.float32)
    np.testing.assert_allclose(logits_of(merged, tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2_a", "phi3_a", "stablelm_heads_a", "qwen2_5_vl_b"])
def test_both_quantized_forms_hold_what_is_quantized_here(name, tmp_path):
    here = load_model(FOLDERS / name, quant := QuantSpec("nf4", 32, True), jnp.float32)
    for form in ("native", "bnb"):
        quantize_folder(FOLDERS / name, tmp_path / form, form, quant)
        there = load_model(tmp_path / form, compute_dtype=jnp.float32)
        for a, b in zip(jax.tree.leaves(lora.split(here)[2]), jax.tree.leaves(lora.split(there)[2]), strict=True):
            np.testing.assert_array_equal(a, b)
    whole = {key for key in load_file(FOLDERS / name / "model.safetensors") if "_proj." not in key and "c_" not in key}
    assert whole <= load_file(tmp_path / "bnb" / "model.safetensors").keys()  # under the names that the source has


@pytest.mark.parametrize(("name", "prefix"), [("gpt2_a", "transformer."), ("opt_a", "model.")])
def test_old_files_without_a_prefix(name, prefix, tmp_path):
    """Of the time when a base model was saved, with the masks that GPT-2 kept in its file."""
    tensors = load_file(FOLDERS / name / "model.safetensors")
    tensors = {key if key.startswith("lm_head") else key.removeprefix(prefix): value for key, value in tensors.items()}
    if name == "gpt2_a":
        tensors["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FOLDERS / name / "config.json").read_text())
    old, new = (load_model(folder, compute_dtype=jnp.float32) for folder in (tmp_path, FOLDERS / name))
    for a, b in zip(jax.tree.leaves(lora.split(old)[2]), jax.tree.leaves(lora.split(new)[2]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_of_two_projections_of_a_name(tmp_path):
    """GPT-2 has a c_proj in attention and another behind it: an adapter on the one is not one on both."""
    model = load_model(FOLDERS / "gpt2_a", compute_dtype=jnp.float32)
    config = LoRAConfig(2, targets=("attn.c_proj",))
    assert lora.attach(model, config, jax.random.key(0)) == ["attn.c_proj"]
    peft.write_adapter(tmp_path / "one", lora.split(model)[1], config, "gpt2", kind=model.config.kind)
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"] == ["attn.c_proj"]
    again, arrays = peft.read_adapter(model, tmp_path / "one")
    assert again.targets == tuple(arrays) == ("attn.c_proj",)


def test_what_does_not_train_is_refused():
    model = load_model(FOLDERS / "phi_a", compute_dtype=jnp.float32)
    with pytest.raises(InputError, match="a head with a bias does not train whole"):
        lora.attach(model, LoRAConfig(2, modules_to_save=("lm_head",)), jax.random.key(0))


def test_targets_have_the_names_of_the_family():
    config = load_config(FOLDERS / "gpt_neox_a")
    assert lora.select_targets(["dense"], config) == ["attention.dense"]
    found = lora.select_targets([r"gpt_neox\.layers\.\d+\.mlp\..*"], config)
    assert found == ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    with pytest.raises(InputError, match="'q_proj' matches no linear layer; known: query_key_value, dense, dense_h"):
        lora.select_targets(["q_proj"], config)


def test_what_stands_beside_the_decoder_goes_along(tmp_path):
    """An encoder of images: in every folder made of the model, unchanged, under the names that its source has."""
    source = FOLDERS / "gemma3_images_b"
    here = load_model(source, quant := QuantSpec("nf4", 32, True), jnp.float32)
    theirs = load_file(source / "model.safetensors")
    beside = {key: value for key, value in theirs.items() if not key.startswith("language_model.")}
    assert len(beside) > 10
    new_names = {key.replace("language_model.model.", "model.language_model."): value for key, value in theirs.items()}
    (tmp_path / "new").mkdir()
    save_file(new_names, tmp_path / "new" / "model.safetensors")
    (tmp_path / "new" / "config.json").write_text((source / "config.json").read_text())
    for out, form, made_of in (
        ("native", "native", source), ("bnb", "bnb", source), ("again", "bnb", tmp_path / "native"),
        ("newer", "bnb", tmp_path / "new"),
    ):  # fmt: skip
        quantize_folder(made_of, tmp_path / out, form, quant)
        there = load_model(tmp_path / out, compute_dtype=jnp.float32)
        for a, b in zip(jax.tree.leaves(lora.split(here)[2]), jax.tree.leaves(lora.split(there)[2]), strict=True):
            np.testing.assert_array_equal(a, b)
        ours = load_file(tmp_path / out / "model.safetensors")
        assert all(np.array_equal(ours[key], value) for key, value in beside.items())
        embedding = "model.language_model" if out == "newer" else "language_model.model"
        assert f"{embedding}.embed_tokens.weight" in ours
    skipped = json.loads((tmp_path / "bnb" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert {"vision_tower", "model.multi_modal_projector", "lm_head"} <= {*skipped}
    merge_folder(source, source / "adapter", tmp_path / "merged", QuantSpec("none"), dtype="float32")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == theirs.keys() and all(np.array_equal(merged[key], value) for key, value in beside.items())


def test_an_adapter_leaves_the_encoder_alone(tmp_path):
    model = load_model(FOLDERS / "gemma3_images_b", compute_dtype=jnp.float32)
    config = LoRAConfig(2, targets=("self_attn.q_proj", "mlp.up_proj"))
    lora.attach(model, config, jax.random.key(0))
    peft.write_adapter(tmp_path / "ours", lora.split(model)[1], config, "base", kind=model.config.kind)
    picks = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["target_modules"]
    for name, wanted in (
        ("model.language_model.layers.0.self_attn.q_proj", True),
        ("model.language_model.layers.11.mlp.up_proj", True),
        ("language_model.model.layers.0.self_attn.q_proj", True),
        ("model.language_model.layers.0.mlp.down_proj", False),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", False),
    ):
        assert bool(re.fullmatch(picks, name)) == wanted, name
    again, arrays = peft.read_adapter(model, tmp_path / "ours")
    assert again.targets == tuple(arrays) == config.targets
    file = tmp_path / "ours" / "adapter_model.safetensors"
    more = {"base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 8))}
    save_file(load_file(file) | more, file)
    with pytest.raises(InputError, match="vision_tower"):
        peft.read_adapter(model, tmp_path / "ours")
