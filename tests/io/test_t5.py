"""Encoder-decoders on disk: PEFT's adapters in and out, merged, in 4 bits."""

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
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.io.merge import merge_folder
from qlora_jax.io.write import quantize_folder
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.t5.pair import Pair
from qlora_jax.quant.bitsandbytes import to_bitsandbytes
from qlora_jax.train.shapes import ModelSpec, abstract_model
from tests.t5 import FOLDERS, golden, logits_of

pytestmark = pytest.mark.quick_compile
QUANT = QuantSpec("nf4", 32, True)


@pytest.mark.parametrize("name", ["v10", "v11"])
def test_adapters_of_peft(name, tmp_path):
    """Read, written again under PEFT's own keys, and merged into a checkpoint of the family."""
    folder, found = FOLDERS / name, golden(name)
    model = load_model(folder, compute_dtype=jnp.float32)
    config = peft.load_adapter(model, folder / "adapter")

    def check(model):
        if name == "v10":  # whose merged values are seen below
            return
        logits = logits_of(model, found["tokens"], found["loss_mask"])
        np.testing.assert_allclose(logits, found["adapted"], atol=1e-4, rtol=0)

    check(model)
    peft.write_adapter(tmp_path / "ours", lora.split(model)[1], config, name, kind=model.config.kind)
    theirs, ours = (load_file(path / peft.WEIGHTS) for path in (folder / "adapter", tmp_path / "ours"))
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[key], ours[key]) for key in theirs)
    said = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    fed = ["wi_0", "wi_1"] if name == "v11" else ["wi"]
    assert said["task_type"] == "SEQ_2_SEQ_LM" and said["target_modules"] == ["k", "o", "q", "v", *fed, "wo"]

    merge_folder(folder, folder / "adapter", tmp_path / "merged", QuantSpec("none"), dtype="float32")
    merged = load_model(tmp_path / "merged", compute_dtype=jnp.float32)
    check(merged)
    for target, (a, b) in lora.adapter_arrays(lora.split(model)[1]).items():
        plain, whole = (np.asarray(lora.linear(m, target).weight.get_value(), np.float32) for m in (model, merged))
        np.testing.assert_allclose(whole, plain + config.scale * np.asarray(b) @ np.asarray(a), atol=1e-5)
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert settings["scale_decoder_outputs"] == (name == "v10")
    assert settings["tie_word_embeddings"] == (name == "v10")


def test_our_form_holds_what_is_quantized_here(tmp_path):
    name = "v11"
    here = load_model(FOLDERS / name, QUANT, jnp.float32)
    quantize_folder(FOLDERS / name, tmp_path / "native", "native", QUANT)
    there = load_model(tmp_path / "native", compute_dtype=jnp.float32)
    for a, b in zip(jax.tree.leaves(lora.split(here)[2]), jax.tree.leaves(lora.split(there)[2]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bitsandbytes_form(tmp_path):
    """transformers keeps wo in 16 bits: such a folder is read, none with wo in 4 bits is written."""
    with pytest.raises(InputError, match="of which transformers keeps wo"):
        quantize_folder(FOLDERS / "v10", tmp_path / "bnb", "bnb", QUANT)
    tensors = load_file(FOLDERS / "v10" / "model.safetensors")
    here = load_model(FOLDERS / "v10", QUANT, jnp.float32)
    for name in here.config.linears:
        stack = lora.linear(here, name).weight.get_value()
        for key, (layer,) in here.config.slots(name).items() if not name.endswith("wo") else ():
            q = jax.tree.map(lambda x: x[layer], stack)  # noqa: B023
            del tensors[key]
            tensors |= to_bitsandbytes(q, key, "bfloat16")
    save_file(tensors, tmp_path / "model.safetensors")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": None}
    raw = json.loads((FOLDERS / "v10" / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    there = load_model(tmp_path, compute_dtype=jnp.float32)
    for name in here.config.linears:
        a, b = (lora.linear(model, name).weight.get_value() for model in (here, there))
        if name.endswith("wo"):
            plain = load_file(FOLDERS / "v10" / "model.safetensors")
            for key, (layer,) in here.config.slots(name).items():
                np.testing.assert_array_equal(b[layer], plain[key])
        else:
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
                np.testing.assert_array_equal(x, y)


def test_a_plan_knows_the_same_arrays():
    model = load_model(FOLDERS / "v11", QUANT, jnp.float32)
    spec = ModelSpec(model.config, QUANT, LoRAConfig(2), "float32", "bfloat16", kernel="xla")
    lora.attach(model, spec.lora, jax.random.key(0))
    planned = abstract_model(spec)
    for a, b in zip((planned.graph, planned.adapter, planned.base), lora.split(model), strict=True):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(a)] == [(x.shape, x.dtype) for x in jax.tree.leaves(b)]


def test_some_of_the_projections_of_a_name(tmp_path):
    """Cross attention's q alone, which an expression picks: the other q have the same last name."""
    model = load_model(FOLDERS / "v11", compute_dtype=jnp.float32)
    config = LoRAConfig(2, targets=("EncDecAttention.q", "wo"))
    names = lora.attach(model, config, jax.random.key(0))
    assert [name.rpartition(".")[2] for name in names] == ["wo", "q", "wo"]
    assert names[1] == "decoder.layer.1.EncDecAttention.q"
    peft.write_adapter(tmp_path / "some", lora.split(model)[1], config, "t5", kind=model.config.kind)
    picks = json.loads((tmp_path / "some" / "adapter_config.json").read_text())["target_modules"]
    for name in model.config.linears:
        assert bool(re.fullmatch(picks, Pair.module(1, name))) == (name in names), name
    again, arrays = peft.read_adapter(model, tmp_path / "some")
    assert again.targets == tuple(arrays) == tuple(names)


def test_old_files_with_copies_of_the_embedding(tmp_path):
    """And the bias of cross attention that T5 1.0 carries and nothing reads."""
    tensors = load_file(FOLDERS / "v10" / "model.safetensors")
    tensors |= {f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in ("encoder", "decoder")}
    bias = "decoder.block.0.layer.{}Attention.relative_attention_bias.weight"
    tensors[bias.format("1.EncDec")] = tensors[bias.format("0.Self")]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FOLDERS / "v10" / "config.json").read_text())
    old, new = (load_model(folder, compute_dtype=jnp.float32) for folder in (tmp_path, FOLDERS / "v10"))
    for a, b in zip(jax.tree.leaves(lora.split(old)[2]), jax.tree.leaves(lora.split(new)[2]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_folder_of_other_sizes_or_not_finite_is_refused(tmp_path):
    tensors = load_file(FOLDERS / "v11" / "model.safetensors")
    (tmp_path / "config.json").write_text((FOLDERS / "v11" / "config.json").read_text())
    key = "decoder.block.1.layer.1.EncDecAttention.k.weight"
    save_file({name: value for name, value in tensors.items() if name != key}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"missing {key}"):
        load_model(tmp_path)
    tensors[key].reshape(-1)[3] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=key):
        load_model(tmp_path)
