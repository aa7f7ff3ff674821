"""PEFT's adapters read here give PEFT's logits; what is written here is read back bit for bit."""

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
from qlora_jax.io.load import load_model
from qlora_jax.io.peft import load_adapter, read_adapter, read_config, write_adapter
from qlora_jax.lora import LoRAConfig

KEY = "base_model.model.model.layers.{}.{}.lora_{}.weight"


@pytest.fixture
def model(golden):
    return load_model(golden / "llama" / "llama1", compute_dtype=jnp.float32)


@pytest.fixture
def adapter(golden, tmp_path):
    """adapter(changes of adapter_config.json, change of tensors): an altered copy of PEFT's own."""

    def make(tensors=lambda t: None, **changes) -> Path:
        folder = Path(shutil.copytree(golden / "peft" / "all_linear_r4", tmp_path / "adapter"))
        config = json.loads((folder / "adapter_config.json").read_text()) | changes
        (folder / "adapter_config.json").write_text(json.dumps(config))
        held = load_file(folder / "adapter_model.safetensors")
        tensors(held)
        save_file(held, folder / "adapter_model.safetensors")
        return folder

    return make


@pytest.mark.parametrize("name", ["all_linear_r4", "qv_rslora_r2"])
def test_logits_of_peft(golden, model, name):
    folder = golden / "peft" / name
    with np.load(folder / "logits.npz") as file:
        tokens, expected = file["tokens"], file["logits"]
    config = load_adapter(model, folder)
    found = jax.jit(lambda m, t: m.logits(m(t)[0]))(model, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    if name == "qv_rslora_r2":
        assert config.scale == pytest.approx(3 / np.sqrt(2))
        assert config.targets == ("self_attn.q_proj", "self_attn.v_proj")
    else:
        assert config.scale == 2 and config.targets == tuple(lora.LINEARS) and config.dropout == pytest.approx(0.1)


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj")])
def test_written_and_read_bit_for_bit(model, tmp_path, targets):
    config = LoRAConfig(rank=3, alpha=5.0, dropout=0.05, targets=targets, use_rslora=True)
    names = lora.attach(model, config, jax.random.key(0))
    for name in names:
        layer = lora.linear(model, name)
        layer.lora_b.set_value(jax.random.normal(jax.random.key(1), layer.lora_b.get_value().shape))
    _, adapter, _ = lora.split(model)
    write_adapter(tmp_path / "out", adapter, config, "some/base")
    arrays = lora.adapter_arrays(adapter)
    found, again = read_adapter(model, tmp_path / "out")
    assert list(again) == names and arrays.keys() == again.keys()
    assert found == LoRAConfig(3, 5.0, 0.05, tuple(names), True)
    for name in names:
        for a, b in zip(arrays[name], again[name], strict=True):
            assert b.dtype == jnp.float32
            np.testing.assert_array_equal(a, b)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(stored) == 2 * 2 * len(names)
    np.testing.assert_array_equal(stored[KEY.format(1, "mlp.down_proj", "A")], arrays["mlp.down_proj"][0][1])
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["base_model_name_or_path"] == "some/base"
    assert sorted(settings["target_modules"]) == sorted(name.split(".")[1] for name in names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # nothing half-written beside it


def test_what_peft_wrote_is_written_again_alike(golden, model, tmp_path):
    folder = golden / "peft" / "all_linear_r4"
    config = load_adapter(model, folder)
    write_adapter(tmp_path / "out", lora.split(model)[1], config, "llama1")
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "out"))
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(value, ours[key])


def test_all_tensors_that_do_not_fit_in_one_error(model, adapter):
    def damage(tensors):
        del tensors[KEY.format(1, "self_attn.q_proj", "B")]
        tensors[KEY.format(0, "mlp.up_proj", "A")] = np.zeros((3, 3), np.float32)
        tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 32), np.float32)

    with pytest.raises(InputError) as error:
        read_adapter(model, adapter(damage))
    message = str(error.value)
    assert f"missing {KEY.format(1, 'self_attn.q_proj', 'B')}" in message and "all 2 or none" in message
    assert f"{KEY.format(0, 'mlp.up_proj', 'A')} is [3, 3], expected [4, 32]" in message
    assert "unexpected base_model.model.lm_head.lora_A.weight" in message


def test_adapter_of_another_model(model, adapter):
    with pytest.raises(InputError, match="no LoRA tensor of this model"):
        read_adapter(model, adapter(lambda tensors: tensors.clear()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"rank_pattern": {"q_proj": 8}, "use_qalora": True}, "rank_pattern=.*, use_qalora="),
        ({"modules_to_save": ["lm_head", "score"]}, "has 'score'; readable are embed_tokens and lm_head"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"r": "4"}, "r is '4' and lora_alpha 8"),
        ({"lora_alpha": None}, "lora_alpha None"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(adapter, changes, message):
    with pytest.raises(InputError, match=message):
        read_config(adapter(**changes))


def test_missing_files(model, adapter, tmp_path):
    with pytest.raises(InputError, match="adapter_config.json is missing"):
        read_adapter(model, tmp_path)
    folder = adapter()
    (folder / "adapter_model.safetensors").write_bytes(b"12")
    with pytest.raises(InputError, match="adapter_model.safetensors is missing or damaged"):
        read_adapter(model, folder)
