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
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.io.peft import load_adapter, read_adapter, write_adapter
from qlora_jax.lora import LoRAConfig
from tests.llama_names import LINEARS
from tests.random_arrays import random_normal

pytestmark = pytest.mark.quick_compile

KEY = "base_model.model.model.layers.{}.{}.lora_{}.weight"
WEIGHTS = "adapter_model.safetensors"
logits_of = jax.jit(lambda model, tokens: model.logits(model(tokens)[0]))


@pytest.fixture
def model(golden):
    return load_model(golden / "llama" / "llama1", compute_dtype=jnp.float32)


@pytest.fixture
def adapter(golden, tmp_path):
    """adapter(change of tensors, changes of adapter_config.json; ... drops a key): an altered copy of PEFT's own."""

    def make(tensors=lambda t: None, **changes) -> Path:
        folder = Path(shutil.copytree(golden / "peft" / "all_linear_r4", tmp_path / "adapter"))
        config = json.loads((folder / "adapter_config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not ...}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        held = load_file(folder / "adapter_model.safetensors")
        tensors(held)
        save_file(held, folder / "adapter_model.safetensors")
        return folder

    return make


@pytest.mark.parametrize(
    ("name", "rank", "scale", "residual"),
    [
        ("all_linear_r4", 4, 2.0, ""),
        ("qv_rslora_r2", 2, 3 / np.sqrt(2), ""),
        ("patterns", 3, 3 / np.sqrt(3), ""),  # query's r 3; value's 5 / sqrt(2) goes into B
        ("expressions", 3, 1.0, ""),
        ("pissa", 3, 2.0, "pissa"),
        ("olora", 2, 1.5, "olora"),
    ],
)
def test_logits_of_peft(golden, model, name, rank, scale, residual):
    folder = golden / "peft" / name
    with np.load(folder / "logits.npz") as file:
        tokens, expected = file["tokens"], file["logits"]
    config = load_adapter(model, folder)
    np.testing.assert_allclose(logits_of(model, tokens), expected, atol=1e-4, rtol=0)
    assert (config.rank, config.residual) == (rank, residual) and config.scale == pytest.approx(scale)
    if name == "all_linear_r4":
        assert config.targets == tuple(LINEARS) and config.dropout == pytest.approx(0.1)
    if name == "qv_rslora_r2":
        assert config.targets == ("self_attn.q_proj", "self_attn.v_proj")


def test_logits_of_peft_beside_4_bits(golden):
    """PEFT dequantizes, takes OLoRA's part out and quantizes what is left; it refuses PiSSA there."""
    base, folder = golden / "llama" / "llama1", golden / "peft" / "olora"
    model = load_model(base, QuantSpec("nf4", double_quant=False), jnp.float32)
    load_adapter(model, folder)
    with np.load(folder / "logits.npz") as file:
        np.testing.assert_allclose(logits_of(model, file["tokens"]), file["logits_nf4"], atol=1e-4, rtol=0)
    with pytest.raises(InputError, match='"pissa", which peft takes out of 16- or 32-bit weights alone'):
        load_adapter(load_model(base, QuantSpec("nf4"), jnp.float32), golden / "peft" / "pissa")


def test_a_base_is_changed_once(golden, model):
    load_adapter(model, golden / "peft" / "pissa")
    for name in ("pissa", "qv_rslora_r2"):
        with pytest.raises(InputError, match="the model's weights lack what pissa took out for an adapter"):
            load_adapter(model, golden / "peft" / name)


def test_a_second_adapter_takes_the_first_ones_place(golden, model):
    for name in ("all_linear_r4", "qv_rslora_r2"):
        load_adapter(model, golden / "peft" / name)
    with np.load(golden / "peft" / "qv_rslora_r2" / "logits.npz") as file:
        np.testing.assert_allclose(logits_of(model, file["tokens"]), file["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["patterns", "expressions", "pissa", "olora"])
def test_what_is_written_of_it_is_the_same_adapter(golden, model, name, tmp_path):
    folder = golden / "peft" / name
    config = load_adapter(model, folder)
    write_adapter(tmp_path / "out", lora.split(model)[1], config, "llama1")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["init_lora_weights"] == (config.residual or True)
    again = load_model(golden / "llama" / "llama1", compute_dtype=jnp.float32)
    load_adapter(again, tmp_path / "out")
    with np.load(folder / "logits.npz") as file:
        np.testing.assert_allclose(logits_of(again, file["tokens"]), file["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj")])
def test_written_and_read_bit_for_bit(model, tmp_path, targets):
    config = LoRAConfig(rank=3, alpha=5.0, dropout=0.05, targets=targets, use_rslora=True)
    names = lora.attach(model, config, jax.random.key(0))
    for name in names:
        layer = lora.linear(model, name)
        layer.lora_b.set_value(random_normal(1, layer.lora_b.get_value().shape))
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


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"target_modules": [name.split(".")[1] for name in LINEARS], "layers_to_transform": [1, 0]},
        {"alpha_pattern": {"q_proj": 8, r".*\.down_proj": 8.0}},
        {"rank_pattern": {"lm_head": 64, "q_proj_of_another": 2}},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": None, "loftq_config": {"loftq_bits": 4}},
        {"r": 8, "rank_pattern": {"proj": 8, ".*": 4}},
        {"lora_alpha": ...},  # not there; PEFT's default is 8
        {"bias": "all", "fan_in_fan_out": True, "task_type": None, "merge_weights": False, "enable_lora": None},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    ],
)
def test_settings_that_change_nothing(golden, model, adapter, changes):
    config, arrays = read_adapter(model, golden / "peft" / "all_linear_r4")
    found, again = read_adapter(model, adapter(**changes))
    assert found == config
    for name, pair in arrays.items():
        for one, other in zip(pair, again[name], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_names_and_dtypes_of_others(golden, model, adapter, dtype):
    """A state_dict's keys have the adapter's name in them; weights may be in 16 bits."""

    def rewrite(tensors):
        for key in list(tensors):
            tensors[key.replace(".weight", ".default.weight")] = np.asarray(jnp.asarray(tensors.pop(key), dtype))

    _, arrays = read_adapter(model, golden / "peft" / "all_linear_r4")
    _, again = read_adapter(model, adapter(rewrite))
    for name, pair in arrays.items():
        for one, other in zip(pair, again[name], strict=True):
            assert other.dtype == jnp.float32
            np.testing.assert_array_equal(one.astype(dtype).astype(jnp.float32), other)


@pytest.mark.parametrize("name", ["patterns", "expressions"])
def test_no_training_from_what_stacking_changed(golden, model, name):
    with pytest.raises(InputError, match="_proj carries an adapter in 1 of 2 layers; training needs one"):
        read_adapter(model, golden / "peft" / name, to_train=True)


def test_no_training_from_ranks_of_many_kinds(model, adapter):
    def cut(tensors):
        for key in tensors:
            if "o_proj" in key:
                tensors[key] = tensors[key][:2] if "lora_A" in key else np.ascontiguousarray(tensors[key][:, :2])

    folder = adapter(cut, rank_pattern={"o_proj": 2})
    config, arrays = read_adapter(model, folder)
    assert config.scale == 2 and arrays["self_attn.o_proj"][0].shape == (2, 4, 32)
    with pytest.raises(InputError, match="r and lora_alpha are 4 and 8 here, 2 and 8 there; training needs"):
        read_adapter(model, folder, to_train=True)


def test_a_changed_base_of_ranks_of_many_kinds(model, adapter):
    with pytest.raises(InputError, match="4 and 3 there, but init_lora_weights 'pissa' is read where all are alike"):
        read_adapter(model, adapter(alpha_pattern={"up_proj": 3}, init_lora_weights="pissa"))


def test_all_tensors_that_do_not_fit_in_one_error(model, adapter):
    def damage(tensors):
        del tensors[KEY.format(1, "self_attn.q_proj", "B")]
        tensors[KEY.format(0, "mlp.up_proj", "A")] = np.zeros((3, 3), np.float32)
        tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 32), np.float32)

    with pytest.raises(InputError) as error:
        read_adapter(model, adapter(damage))
    message = str(error.value)
    assert f"missing {KEY.format(1, 'self_attn.q_proj', 'B')}" in message
    assert f"{KEY.format(0, 'mlp.up_proj', 'A')} is [3, 3], expected [4, 32]" in message
    assert "unexpected base_model.model.lm_head.lora_A.weight" in message


def test_adapter_of_another_model(model, adapter):
    with pytest.raises(InputError, match="missing .*; and 20 more"):
        read_adapter(model, adapter(lambda tensors: tensors.clear()))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_finite_is_named(model, adapter, value, dtype):
    key = KEY.format(1, "mlp.up_proj", "B")

    def damage(tensors):
        tensors[key] = np.asarray(jnp.asarray(tensors[key]).at[-1, -1].set(value).astype(dtype))

    with pytest.raises(InputError, match=f"{key} holds (NaN|inf) .*train it again"):
        read_adapter(model, adapter(damage))


def test_scales_that_overflow(model, adapter):
    with pytest.raises(InputError, match=r"lora_B of self_attn.v_proj overflows float32 with the alphas"):
        read_adapter(model, adapter(lora_alpha=1e-30, alpha_pattern={"v_proj": 1e30}))


def test_whole_numbers_are_no_adapter(model, adapter):
    key = KEY.format(0, "mlp.up_proj", "A")
    with pytest.raises(InputError, match=f"{key} is I32; expected one of float32, float16, bfloat16"):
        read_adapter(model, adapter(lambda tensors: tensors.update({key: np.zeros((4, 32), np.int32)})))


def test_a_tensor_twice(model, adapter):
    key = KEY.format(0, "mlp.up_proj", "A")

    def copy(tensors):
        tensors[key.replace(".weight", ".default.weight")] = 2 * tensors[key]

    folder = adapter(copy)
    with pytest.raises(InputError, match=f"holds {key} twice"):
        read_adapter(model, folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content.replace(b"layers.1.mlp.up_proj.lora_A", b"layers.0.mlp.up_proj.lora_A"))
    with pytest.raises(InputError, match=f"its header has {key} twice"):
        read_adapter(model, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, r"unexpected .*layers\.0\.mlp\.down_proj\.lora_A\.weight"),
        ({"layers_to_transform": [1], "target_modules": ["q_proj"]}, r"unexpected .*layers\.0\.mlp\.down_proj"),
        ({"target_modules": ["q_prj"]}, "target_modules picks no linear layer of this model"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules picks lm_head; adapters can be read on"),
        ({"target_modules": ["embed_tokens"]}, "target_modules picks model.embed_tokens; adapters can be read on"),
        ({"r": 2}, r"lora_A\.weight is \[4, 32\], expected \[2, 32\]"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj\.lora_B\.weight is \[32, 4\], expected \[32, 2\]"),
    ],
)
def test_settings_and_tensors_that_contradict_each_other(model, adapter, changes, message):
    with pytest.raises(InputError, match=message):
        read_adapter(model, adapter(**changes))


def test_missing_files(model, adapter, tmp_path):
    with pytest.raises(InputError, match="adapter_config.json is missing"):
        read_adapter(model, tmp_path)
    folder = adapter()
    (folder / WEIGHTS).write_bytes(b"12")
    with pytest.raises(InputError, match="adapter_model.safetensors is damaged or cut short"):
        read_adapter(model, folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="holds no adapter_model.safetensors$"):
        read_adapter(model, folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="adapter_model.bin is a pickle, which is never opened: load it in peft"):
        read_adapter(model, folder)
