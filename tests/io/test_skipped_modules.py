"""bnb-4bit folders that keep some linear layers in 16 bits (llm_int8_skip_modules), and a head in 4.

That such a folder gives transformers' logits is in tests/models/test_llama.py, that it is merged in test_merge.py.
"""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.io.load import QuantSpec, load_config, load_model, skipped_linears, stored_quant
from qlora_jax.io.write import quantize_folder
from qlora_jax.quant.tensor import QuantizedTensor
from qlora_jax.train.spec import read_spec
from tests import tiny_run
from tests.llama_names import LINEARS

MIXED = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}  # 16 bits in the last layer alone


@pytest.fixture
def folder(golden) -> Path:
    return golden / "bnb4bit" / "nf4_skip"


@pytest.fixture
def changed(folder, tmp_path):
    def make(names) -> Path:
        copy = Path(shutil.copytree(folder, tmp_path / "changed"))
        config = json.loads((copy / "config.json").read_text())
        config["quantization_config"]["llm_int8_skip_modules"] = names
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    return make


def test_what_is_held_how(folder, caplog):
    model = load_model(folder)
    assert stored_quant(folder) == QuantSpec("nf4", 64, True)
    kept = {name for name in LINEARS if not isinstance(lora.linear(model, name).weight.get_value(), QuantizedTensor)}
    assert kept == MIXED | {"self_attn.o_proj"}
    assert all(lora.linear(model, name).weight.get_value().dtype == jnp.bfloat16 for name in kept)
    assert model.head.get_value().dtype == jnp.bfloat16
    assert caplog.text.count("keeps mlp.gate_proj, mlp.up_proj, mlp.down_proj unquantized in some layers") == 1


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("lm_head", 0), ("o_proj", 2), ("model.layers.1", 7), ("model.layers", 14), ("layers.1.mlp", 0),
        ("model.layers.1.mlp.", 3), ("1.mlp.up_proj", 1), ("model.layers.1.ml", 0), ("q_proj", 2),
        ("model.layers.11", 0),
    ],
)  # fmt: skip
def test_names_mean_what_they_mean_to_transformers(changed, name, count):
    """By its `should_convert_module`: from the start up to a dot, or as the end."""
    copy = changed([name])
    assert len(skipped_linears(copy, load_config(copy))) == count


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["self_attn.o_proj"], r"model\.layers\.1\.mlp\.up_proj\.weight.*quantized"),
        (["self_attn.o_proj", "model.layers.1.mlp", "q_proj"], r"layers\.0\.self_attn\.q_proj\.weight is \[.*, 1\]"),
        ([r"model.layers.\d+.mlp"], r"llm_int8_skip_modules has 'model\.layers.*', a regular expression"),
        ("o_proj", r"llm_int8_skip_modules is 'o_proj'; expected a list"),
    ],
)
def test_a_list_that_does_not_fit_the_weights(changed, names, message):
    with pytest.raises(InputError, match=message):
        load_model(changed(names))


def test_what_knows_all_layers_in_one_form_says_so(folder, golden, tmp_path):
    for form in ("native", "bnb"):
        with pytest.raises(InputError, match="llm_int8_skip_modules"):
            quantize_folder(folder, tmp_path / "out", form)
    config = tiny_run.tiny_config(golden, tmp_path)
    config.model.path = str(folder)
    with pytest.raises(InputError, match="llm_int8_skip_modules keeps some linear layers"):
        read_spec(config)


def test_nothing_is_quantized_though_config_says_so(changed, golden):
    copy = changed(["model.layers", "lm_head"])
    shutil.copy(golden / "llama" / "llama1" / "model.safetensors", copy / "model.safetensors")
    with pytest.raises(InputError, match="no tensor is quantized"):
        load_model(copy)


def test_a_head_of_another_size_is_named(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    state = json.loads(tensors["lm_head.weight.quant_state.bitsandbytes__nf4"].tobytes())
    swapped = json.dumps(state | {"shape": state["shape"][::-1]}).encode()
    tensors["lm_head.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(swapped, np.uint8)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\.weight is \[48, 96\] once unpacked, expected \[96, 48\]"):
        load_model(copy)
