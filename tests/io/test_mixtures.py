"""Mixtures on disk: both spellings of experts, PEFT's two forms of their adapters, merged, quantized."""

import json

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
from qlora_jax.quant import bitsandbytes, mxfp4
from qlora_jax.quant.tensor import dequantize, quantize
from tests.conftest import TESTS
from tests.families import FOLDERS, logits_of

pytestmark = pytest.mark.quick_compile
MIXTURES = TESTS / "golden" / "mixtures"
ADAPTED = ["qwen3_moe_a", "mixtral_a"]


def same_base(a, b) -> None:
    for x, y in zip(jax.tree.leaves(lora.split(a)[2]), jax.tree.leaves(lora.split(b)[2]), strict=True):
        np.testing.assert_array_equal(x, y)


def fused(folder, name: str) -> None:
    """A family's checkpoint in the spelling of transformers 5 in memory (save_original_format=False)."""
    tensors = load_file(FOLDERS / name / "model.safetensors")
    config = json.loads((FOLDERS / name / "config.json").read_text())
    E = config.get("num_experts", config.get("num_local_experts"))
    stem, gate, up, down = ("block_sparse_moe", "w1", "w3", "w2") if "mixtral" in name else (
        "mlp", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        take = lambda part: np.stack([tensors.pop(f"{layer}.{stem}.experts.{e}.{part}.weight") for e in range(E)])  # noqa: E731, B023
        tensors[f"{layer}.mlp.experts.gate_up_proj"] = np.concatenate([take(gate), take(up)], axis=1)
        tensors[f"{layer}.mlp.experts.down_proj"] = take(down)
        tensors[f"{layer}.mlp.gate.weight"] = tensors.pop(f"{layer}.{stem}.gate.weight")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["qwen3_moe_b", "mixtral_a", "olmoe_a"])
def test_both_spellings_are_one_model(name, tmp_path):
    fused(tmp_path, name)
    quant = QuantSpec("nf4", 32, True)
    same_base(load_model(tmp_path, quant), load_model(FOLDERS / name, quant))


def test_a_fused_tensor_of_another_shape_is_refused(tmp_path):
    fused(tmp_path, "olmoe_a")
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.0.mlp.experts.gate_up_proj"
    save_file(tensors | {key: np.ascontiguousarray(tensors[key][:-1])}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"gate_up_proj is \[5, 48, 16\], expected \[6, 48, 16\]"):
        load_model(tmp_path)


def test_mxfp4_is_read_as_it_is(tmp_path):
    """OpenAI's form of gpt-oss: transformers' logits; the bytes stay, whatever the other weights become."""
    with np.load(MIXTURES / "mxfp4" / "logits.npz") as file:
        tokens, expected = file["tokens"], file["logits"]
    model = load_model(MIXTURES / "mxfp4", compute_dtype=jnp.float32)
    np.testing.assert_allclose(logits_of(model, tokens), expected, atol=1e-4, rtol=0)
    quant = QuantSpec("nf4", 32, True)
    here = load_model(MIXTURES / "mxfp4", quant, jnp.float32)
    formats = {name: lora.linear(here, name).weight.get_value().format for name in here.config.linears}
    assert formats == {name: "mxfp4" if "experts" in name else "nf4" for name in here.config.linears}
    gate_up = lora.linear(here, "mlp.experts.gate_up_proj").weight.get_value()
    assert gate_up.codes.shape == (2, 4, 64 * 64 // 2) and gate_up.absmax.dtype == jnp.uint8
    raw = load_file(MIXTURES / "mxfp4" / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj_scales"]
    np.testing.assert_array_equal(gate_up.absmax[1].reshape(raw.shape), raw)
    quantize_folder(MIXTURES / "mxfp4", tmp_path / "native", "native", quant)
    same_base(here, load_model(tmp_path / "native", compute_dtype=jnp.float32))


def test_every_value_of_mxfp4():
    """All codes at all scales whose values are normal float32 numbers, exact; others are refused."""
    values = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    scales = np.arange(2, 253, dtype=np.uint8)[:, None]
    blocks = np.broadcast_to((np.arange(16) | (np.arange(16)[::-1] << 4)).astype(np.uint8), (len(scales), 1, 16))
    found = dequantize(mxfp4.read(blocks, scales, "w"), jnp.float32)
    row = np.stack([values, values[::-1]], axis=1).reshape(-1)
    np.testing.assert_array_equal(found, row * np.float32(2.0) ** (scales.astype(np.float32) - 127))
    for byte, what in ((255, "NaN"), (253, "too large for float32")):
        with pytest.raises(InputError, match=f"a scale byte of {byte}, which is {what}"):
            mxfp4.read(blocks[:1], np.full((1, 1), byte, np.uint8), "w")


def test_gpt_oss_keeps_the_form_that_it_has(tmp_path):
    """Adapters as target_parameters, which are all that PEFT can say of it; merged tensors as the family's files."""
    model, config = attached("gpt_oss_a", ("all-linear",))
    peft.write_adapter(tmp_path / "out", lora.split(model)[1], config, "x", kind=model.config.kind)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert said["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"] and said["r"] == 3
    tokens = np.arange(3, 23, dtype=np.int32)[None]
    expected = logits_of(model, tokens)
    merge_folder(FOLDERS / "gpt_oss_a", tmp_path / "out", tmp_path / "merged", QuantSpec("none"), dtype="float32")
    merged = load_model(tmp_path / "merged", compute_dtype=jnp.float32)
    np.testing.assert_allclose(logits_of(merged, tokens), expected, atol=2e-4, rtol=1e-4)
    theirs, ours = (load_file(path / "model.safetensors") for path in (FOLDERS / "gpt_oss_a", tmp_path / "merged"))
    assert {key: x.shape for key, x in theirs.items()} == {key: x.shape for key, x in ours.items()}


@pytest.mark.parametrize("name", ADAPTED)
def test_target_parameters_of_peft(name, tmp_path):
    """PEFT's own adapter gives its logits; so do the forms that are written of it, and what is merged."""
    base = FOLDERS / name
    with np.load(MIXTURES / name / "logits.npz") as file:
        tokens, expected = file["tokens"], file["logits"]
    model = load_model(base, compute_dtype=jnp.float32)
    config = peft.load_adapter(model, MIXTURES / name / "adapter")
    assert config.targets == tuple(model.config.linears) and config.rank == 2
    np.testing.assert_allclose(logits_of(model, tokens), expected, atol=1e-4, rtol=0)

    peft.write_adapter(tmp_path / "each", lora.split(model)[1], config, name, kind=model.config.kind)
    again = load_model(base, compute_dtype=jnp.float32)
    peft.load_adapter(again, tmp_path / "each")
    np.testing.assert_array_equal(logits_of(again, tokens), logits_of(model, tokens))

    merge_folder(base, MIXTURES / name / "adapter", tmp_path / "merged", QuantSpec("none"), dtype="float32")
    merged = load_model(tmp_path / "merged", compute_dtype=jnp.float32)
    np.testing.assert_allclose(logits_of(merged, tokens), expected, atol=1e-4, rtol=0)
    theirs, ours = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))
    assert {key: x.shape for key, x in theirs.items()} == {key: x.shape for key, x in ours.items()}


def attached(name: str, targets, quant=None, **options):
    """A model with a random adapter of rank 3 on some projections."""
    model = load_model(FOLDERS / name, quant, jnp.float32)
    config = LoRAConfig(3, 6, 0.1, targets=targets, **options)
    rng = np.random.default_rng(3)
    for found in lora.attach(model, config, jax.random.key(1)):
        b = lora.linear(model, found).lora_b
        b.set_value(jnp.asarray(rng.standard_normal(b.get_value().shape), jnp.float32))
    return model, config


def test_per_expert_names_and_what_peft_needs_beside_them(tmp_path):
    """peft 0.21 loads these onto transformers 5 where gate and up both have one, without dropout and rslora."""
    model, config = attached("qwen3_moe_a", ("all-linear",), use_rslora=True)
    peft.write_adapter(tmp_path / "out", lora.split(model)[1], config, "x", kind=model.config.kind)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    targets = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert said["target_modules"] == targets and "target_parameters" not in said
    assert said["lora_dropout"] == 0 and not said["use_rslora"] and said["lora_alpha"] == pytest.approx(6 * 3**0.5)
    keys = load_file(tmp_path / "out" / peft.WEIGHTS)
    assert keys["base_model.model.model.layers.1.mlp.experts.5.up_proj.lora_A.weight"].shape == (3, 16)
    again, arrays = peft.read_adapter(model, tmp_path / "out", to_train=True)
    assert again.scale == pytest.approx(config.scale)
    np.testing.assert_array_equal(
        arrays["mlp.experts.down_proj"][0], lora.linear(model, "mlp.experts.down_proj").lora_a.get_value()
    )


@pytest.mark.parametrize(
    ("targets", "parameters"),
    [
        (("q_proj", "up_proj"), ["mlp.experts.gate_up_proj"]),
        (("gate_proj", "down_proj"), ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ],
)
def test_one_of_gate_and_up(targets, parameters, tmp_path):
    """Which peft refuses under the names of single experts: written as target_parameters, and read again the same."""
    model, config = attached("qwen3_moe_a", targets)
    peft.write_adapter(tmp_path / "out", lora.split(model)[1], config, "x", kind=model.config.kind)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said["target_parameters"] == parameters
    again, arrays = peft.read_adapter(model, tmp_path / "out", to_train=True)
    chosen = lora.select_targets(targets, model.config)
    assert list(arrays) == chosen and again.rank == 3 and again.scale == config.scale
    for name in chosen:
        own = lora.linear(model, name)
        np.testing.assert_array_equal(arrays[name][0], own.lora_a.get_value())
        np.testing.assert_array_equal(arrays[name][1], own.lora_b.get_value())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"target_parameters": ["mlp.gate.weight"]},
            "target_parameters has 'mlp.gate.weight'; adapters are read on those",
        ),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "unexpected .*experts.base_layer.lora_A.weight"),
        ({"rank_pattern": {"gate_up_proj": 4}}, r"lora_A.weight is \[12, 16\], expected \[24, 16\]"),
        ({"init_lora_weights": "pissa"}, "experts carry adapters, but init_lora_weights"),
        ({"target_modules": []}, "unexpected base_model.model.model.layers.0.self_attn"),
    ],
)
def test_target_parameters_refused(change, message, tmp_path):
    source = MIXTURES / "qwen3_moe_a" / "adapter"
    said = json.loads((source / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    (tmp_path / peft.WEIGHTS).write_bytes((source / peft.WEIGHTS).read_bytes())
    with pytest.raises(InputError, match=message):
        peft.read_adapter(load_model(FOLDERS / "qwen3_moe_a"), tmp_path)


def test_an_adapter_on_the_router_is_refused(tmp_path):
    source = MIXTURES / "qwen3_moe_a" / "adapter"
    (tmp_path / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    more = {f"base_model.model.model.layers.0.mlp.gate.lora_{x}.weight": np.ones((2, 2), np.float32) for x in "AB"}
    save_file(load_file(source / peft.WEIGHTS) | more, tmp_path / peft.WEIGHTS)
    with pytest.raises(InputError, match="adapts the router, which stays as it is here"):
        peft.read_adapter(load_model(FOLDERS / "qwen3_moe_a"), tmp_path)


def test_targets():
    model = load_model(FOLDERS / "qwen3_moe_a")
    select = lambda *targets: lora.select_targets(targets, model.config)  # noqa: E731
    assert select("all-linear") == list(model.config.linears)
    assert select(r".*\.mlp\.experts\.\d+\.(gate|up)_proj") == ["mlp.experts.gate_proj", "mlp.experts.up_proj"]
    with pytest.raises(InputError, match="picks mlp.experts.up_proj in 2 of 12 experts of all layers"):
        select(r".*\.mlp\.experts\.3\.up_proj")


def test_the_native_form_holds_what_is_quantized_here(tmp_path):
    here = load_model(FOLDERS / "olmoe_b", quant := QuantSpec("nf4", 32, True), jnp.float32)
    report = quantize_folder(FOLDERS / "olmoe_b", tmp_path / "native", "native", quant)
    assert report["linear_weights"] == sum(map(here.config.weights, here.config.linears))
    same_base(here, load_model(tmp_path / "native", compute_dtype=jnp.float32))
    shapes = {key: value.shape for key, value in load_file(tmp_path / "native" / "model.safetensors").items()}
    assert shapes["model.layers.mlp.experts.up_proj.weight.codes"] == (3, 6, 24 * 24 // 2)
    tokens = np.arange(3, 23, dtype=np.int32)[None]
    model, config = attached("olmoe_b", ("q_proj", "down_proj"), quant=quant)
    peft.write_adapter(tmp_path / "out", lora.split(model)[1], config, "x", kind=model.config.kind)
    merge_folder(tmp_path / "native", tmp_path / "out", tmp_path / "merged", dtype="float32")
    merged = load_model(tmp_path / "merged", compute_dtype=jnp.float32)
    np.testing.assert_allclose(logits_of(merged, tokens), logits_of(model, tokens), atol=2e-4, rtol=1e-4)
    with pytest.raises(InputError, match="is a mixture of experts, and in transformers 5 bitsandbytes keeps experts"):
        quantize_folder(FOLDERS / "olmoe_b", tmp_path / "bnb", "bnb", quant)


def test_layers_without_experts_are_refused(tmp_path):
    config = json.loads((FOLDERS / "qwen3_moe_a" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mlp_only_layers": [1]}))
    with pytest.raises(InputError, match=r"1 of 2 layers have no experts \(mlp_only_layers \[1\]"):
        load_model(tmp_path)


def test_folders_of_bitsandbytes(tmp_path):
    """Of transformers 4, where experts and router are 4-bit linear layers, read; of 5, which leaves them, refused."""
    tensors = load_file(FOLDERS / "qwen3_moe_a" / "model.safetensors")
    config = json.loads((FOLDERS / "qwen3_moe_a" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def write(is_packed) -> None:
        found = {}
        for key, value in tensors.items():
            if is_packed(key):
                q = quantize(jnp.asarray(value), "nf4", 64, True)
                found |= bitsandbytes.to_bitsandbytes(q, key)
            else:
                found[key] = value
        save_file(found, tmp_path / "model.safetensors")

    write(lambda key: "_proj.weight" in key or "mlp.gate" in key)
    here, there = load_model(FOLDERS / "qwen3_moe_a", QuantSpec()), load_model(tmp_path)
    for name in here.config.linears:
        same = jax.tree.map(np.array_equal, *(lora.linear(model, name).weight.get_value() for model in (here, there)))
        assert all(jax.tree.leaves(same))
    write(lambda key: "self_attn" in key and "_proj.weight" in key)
    with pytest.raises(InputError, match="has its experts in 16 bits and the rest in 4, as transformers 5 leaves them"):
        load_model(tmp_path)
