"""Folders in 8 bits as transformers writes them (tests/golden/bnb8bit): read, written, merged; a run on such a base."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from pallas_kernels.int8_matmul import api
from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.io.load import QuantSpec, load_model, stored_quant
from qlora_jax.io.merge import merge_folder
from qlora_jax.io.write import quantize_folder
from qlora_jax.quant.tensor import QuantizedTensor
from qlora_jax.settings import resolved
from qlora_jax.train.loop import Run, finetune
from qlora_jax.train.setup import load_base
from tests.llama_names import LINEARS

pytestmark = pytest.mark.quick_compile
INT8 = QuantSpec("int8")


@jax.jit
def logits_of(model, tokens):
    hidden, _ = model(tokens)
    return model.logits(hidden)


def weight(model, name: str) -> QuantizedTensor:
    return lora.linear(model, name).weight.get_value()


def assert_same(one, other) -> None:
    for name in LINEARS:
        a, b = weight(one, name), weight(other, name)
        assert a.threshold == b.threshold and a.format == b.format == "int8"
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.absmax, b.absmax)


@pytest.fixture(scope="module")
def folder(golden) -> Path:
    return golden / "bnb8bit" / "llama"


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, compute_dtype=jnp.float32)


def test_read_bit_for_bit(folder, model):
    assert stored_quant(folder) == INT8 == QuantSpec("int8", 64, True)
    tensors = load_file_of(folder)
    for name in LINEARS:
        q = weight(model, name)
        assert q.threshold == 6.0
        for layer in range(2):
            stem = f"model.layers.{layer}.{name}"
            np.testing.assert_array_equal(q.codes[layer], tensors[f"{stem}.weight"])
            np.testing.assert_array_equal(q.absmax[layer], tensors[f"{stem}.SCB"])


def load_file_of(folder: Path) -> dict[str, np.ndarray]:
    """Arrays that NumPy has: not those in bfloat16."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys() if file.get_slice(key).get_dtype() != "BF16"}  # noqa: SIM118


def test_logits_of_transformers(folder, model, monkeypatch):
    """With the factor of bitsandbytes' CPU path, which is a misprint of 1 / 127^2, to the last digits; with ours a code
    now and then is another, by one."""
    with np.load(folder / "logits.npz") as file:
        tokens, expected, dense = file["tokens"], file["logits"], file["dense"]
    difference = np.abs(logits_of(model, tokens) - expected)
    assert difference.mean() < 0.5 * np.abs(expected - dense).mean()
    monkeypatch.setattr(api, "STEPS", 6.200124e-05)
    with_theirs = jax.jit(lambda tokens: model.logits(model(tokens)[0]))
    np.testing.assert_allclose(with_theirs(tokens), expected, atol=1e-5, rtol=0)


def test_a_folder_that_is_in_8_bits_in_part(golden):
    """Its head is in 8 bits too: ours is computed from the values that these stand for."""
    found = load_model(golden / "bnb8bit" / "skip", compute_dtype=jnp.float32)
    with np.load(golden / "bnb8bit" / "skip" / "logits.npz") as file:
        tokens, expected = file["tokens"], file["logits"]
    np.testing.assert_allclose(logits_of(found, tokens), expected, atol=0.02, rtol=0)
    assert weight(found, "self_attn.q_proj").threshold == 1.5
    assert not isinstance(weight(found, "mlp.up_proj"), QuantizedTensor)


def test_quantizing_here_gives_the_same(golden, model):
    assert_same(model, load_model(golden / "llama" / "llama2", INT8, jnp.float32))


def test_our_bitsandbytes_form_is_transformers_own(golden, folder, tmp_path):
    report = quantize_folder(golden / "llama" / "llama2", tmp_path / "bnb", "bnb", INT8)
    assert 8 < report["bits_per_weight"] < 8.7  # 48 weights a row
    ours, theirs = load_file_of(tmp_path / "bnb"), load_file_of(folder)
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
        assert (ours[key].shape, ours[key].dtype) == (theirs[key].shape, theirs[key].dtype)
    own, their = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "bnb", folder))
    settings = own["quantization_config"]
    assert settings.keys() == their["quantization_config"].keys()
    assert {k for k in settings if settings[k] != their["quantization_config"][k]} <= {"bnb_4bit_compute_dtype"}


def test_forms_there_and_back_keep_codes_and_threshold(folder, model, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["llm_int8_threshold"] = 2.5
    (source / "config.json").write_text(json.dumps(config))
    quantize_folder(source, tmp_path / "native")
    quantize_folder(tmp_path / "native", tmp_path / "bnb", "bnb")
    last = load_model(tmp_path / "bnb", compute_dtype=jnp.float32)
    assert_same(load_model(tmp_path / "native", compute_dtype=jnp.float32), last)
    np.testing.assert_array_equal(weight(last, "mlp.up_proj").codes, weight(model, "mlp.up_proj").codes)
    assert weight(last, "mlp.up_proj").threshold == 2.5
    with pytest.raises(InputError, match=r"is already quantized \(int8, a scale a row\), not nf4"):
        load_model(tmp_path / "native", QuantSpec())


@pytest.mark.parametrize("value", ["6", -1, True, float("nan")])
def test_thresholds_that_cannot_be(folder, tmp_path, value):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["llm_int8_threshold"] = value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="llm_int8_threshold is .*; expected a number"):
        load_model(copy)


def test_other_kernels_are_refused(folder, tiny_config):
    with pytest.raises(InputError, match="kernel 'scratch' is for 4-bit weights; int8 ones have XLA's product alone"):
        load_model(folder, kernel="scratch")
    load_model(folder, kernel="auto")


def test_merging(golden, tmp_path):
    base, adapter = golden / "llama" / "llama1", golden / "peft" / "all_linear_r4"
    merge_folder(base, adapter, tmp_path / "out", INT8, dtype="float32")
    merged, held = load_file_of(tmp_path / "out"), load_file_of(base)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    parts = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    w = held[f"{name}.weight"].astype(np.float16).astype(np.float32)
    absmax = np.abs(w).max(axis=1, keepdims=True)
    kept = np.rint(w * (1 / absmax * np.float32(127))) * absmax / 127
    a, b = (parts[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = kept + settings["lora_alpha"] / settings["r"] * b @ a
    np.testing.assert_allclose(merged[f"{name}.weight"], expected, atol=1e-6)


def test_a_run_resumes_and_leaves_the_base_alone(tiny_config, tmp_path, monkeypatch):
    """Ten steps on int8 by format alone; cut after four and resumed they are the same, bit for bit."""
    config = tiny_config
    config.quant.format = "int8"
    config.train.update(steps=10, checkpoint_every=4)
    config.data.batches = str(tmp_path / "ten.npy")
    np.save(config.data.batches, np.random.default_rng(0).integers(3, 96, (10, 4, 12)).astype(np.int32))
    base = load_base(config, Path(config.model.path), lambda done, total: None)
    before = {name: np.array(weight(base.model, name).codes) for name in LINEARS}

    def train(name: str) -> dict:
        return finetune(config, resolved(config), tmp_path / name, lambda line: None, base)

    summary = train("whole")
    for name in LINEARS:
        np.testing.assert_array_equal(weight(base.model, name).codes, before[name])
    assert 8 < summary["base_bits_per_param"] < 9
    step = Run._step

    def cut(self, index):
        if index == 5:
            raise RuntimeError("power cut")
        return step(self, index)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(Run, "_step", cut)
        train("cut")
    train("cut")
    whole, cut = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for key in whole:
        np.testing.assert_array_equal(whole[key], cut[key])
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in rows]
    assert losses[0] == losses[1] and len(losses[0]) == 10
