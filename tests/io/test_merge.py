"""A merged checkpoint computes what base + adapter compute, for every way the base is stored."""

import errno
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from qlora_jax.errors import InputError
from qlora_jax.io import peft, shards
from qlora_jax.io.load import QuantSpec, load_config, load_model
from qlora_jax.io.merge import REPORT, copy_adapter, merge_folder, read_run
from qlora_jax.models.decoder import Decoder
from qlora_jax.quant.tensor import dequantize, quantize
from qlora_jax.settings import config_hash

pytestmark = pytest.mark.quick_compile

UNQUANTIZED = QuantSpec("none")


@nnx.jit
def _logits(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model.logits(model(tokens)[0])


def logits(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(_logits(model, jnp.asarray(tokens)))


def merged_logits(out: Path, tokens: np.ndarray) -> np.ndarray:
    return logits(load_model(out, UNQUANTIZED, "float32"), tokens)


def tokens_of(base: Path) -> np.ndarray:
    return np.load(base / "logits.npz")["tokens"]


def tensor(folder: Path, key: str) -> np.ndarray:
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            if key in file.keys():  # noqa: SIM118
                return file.get_tensor(key)
    raise KeyError(key)


@pytest.fixture
def adapter_for(tmp_path: Path):
    """Writes a PEFT folder of rank 3, scale 2 for a base; `size` is that of the values of B."""

    def write(base: Path, size: float = 0.3) -> Path:
        config, rng, tensors, folder = load_config(base), np.random.default_rng(1), {}, tmp_path / "adapter"
        for index in range(config.L):
            for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
                O, I = config.linears[name]
                key = f"base_model.model.model.layers.{index}.{name}.lora_"
                tensors[f"{key}A.weight"] = rng.normal(size=(3, I)).astype(np.float32) / np.float32(I**0.5)
                tensors[f"{key}B.weight"] = np.float32(size) * rng.normal(size=(O, 3)).astype(np.float32)
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / peft.WEIGHTS)
        targets = ["q_proj", "v_proj", "down_proj"]
        settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": targets, "lora_dropout": 0.1}
        (folder / peft.CONFIG).write_text(json.dumps(settings))
        return folder

    return write


@pytest.mark.parametrize("name", ["all_linear_r4", "qv_rslora_r2", "expressions", "pissa", "olora"])
def test_merged_weights_give_the_logits_of_peft(golden: Path, tmp_path: Path, name: str) -> None:
    adapter = golden / "peft" / name
    merge_folder(golden / "llama" / "llama1", adapter, tmp_path / "out", UNQUANTIZED, dtype="float32")
    with np.load(adapter / "logits.npz") as stored:
        difference = merged_logits(tmp_path / "out", stored["tokens"]) - stored["logits"]
    assert np.abs(difference).max() < 1e-4


def test_a_changed_base_is_merged_as_it_is(golden: Path, tmp_path: Path) -> None:
    """In 4 bits OLoRA's residual is quantized again before the adapter is added; PiSSA's has none there."""
    base, adapter = golden / "llama" / "llama1", golden / "peft" / "olora"
    report = merge_folder(base, adapter, tmp_path / "out", QuantSpec("nf4", double_quant=False), dtype="float32")
    with np.load(adapter / "logits.npz") as stored:
        difference = merged_logits(tmp_path / "out", stored["tokens"]) - stored["logits_nf4"]
    assert np.abs(difference).max() < 1e-4 and 0.01 < report["update"] < 1
    with pytest.raises(InputError, match='"pissa", which peft takes out of 16- or 32-bit weights alone'):
        merge_folder(base, golden / "peft" / "pissa", tmp_path / "no", QuantSpec("nf4"))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("base_name", "quant"),
    [
        ("llama/llama2", QuantSpec("nf4", 64, True)),  # in shards
        ("llama/llama3", QuantSpec("int4", 32, False)),  # tied embeddings
        ("bnb4bit/fp4", QuantSpec("fp4", 64, False)),  # quantized on disk
        ("bnb4bit/nf4_skip", QuantSpec("nf4", 64, True)),  # in part, with its head
    ],
)
def test_merging_gives_the_logits_of_base_and_adapter(
    golden: Path, tmp_path: Path, adapter_for, base_name: str, quant: QuantSpec
) -> None:
    base = golden / base_name
    adapter, tokens = adapter_for(base), tokens_of(base)
    model = load_model(base, quant, "float32")
    peft.load_adapter(model, adapter)
    trained = logits(model, tokens)
    report = merge_folder(base, adapter, tmp_path / "out", quant, dtype="float32")
    assert np.abs(merged_logits(tmp_path / "out", tokens) - trained).max() < 1e-4 and report["update"] > 0.01
    assert report["merged_into"] == str(quant) and report["merged_layers"] == 3 * model.config.L


def test_merging_into_the_original_gives_another_model(golden: Path, tmp_path: Path, adapter_for) -> None:
    base = golden / "llama" / "llama1"
    adapter, tokens = adapter_for(base), tokens_of(base)
    report = merge_folder(base, adapter, tmp_path / "original", QuantSpec(), "original", "float32")
    merge_folder(base, adapter, tmp_path / "dequantized", QuantSpec(), dtype="float32")
    original = merged_logits(tmp_path / "original", tokens)
    assert np.abs(original - merged_logits(tmp_path / "dequantized", tokens)).max() > 0.01
    assert report["merged_into"] == "original"


def test_an_adapter_of_zeros_leaves_the_dequantized_model(golden: Path, tmp_path: Path, adapter_for) -> None:
    base = golden / "bnb4bit" / "nf4"
    merge_folder(base, adapter_for(base, size=0.0), tmp_path / "out", dtype="float32")
    with np.load(base / "logits.npz") as stored:
        difference = merged_logits(tmp_path / "out", stored["tokens"]) - stored["logits"]
    assert np.abs(difference).max() < 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and "dtype" not in config and config["torch_dtype"] == "float32"


def test_sums_are_float32_and_rounded_once(golden: Path, tmp_path: Path) -> None:
    base, adapter = golden / "llama" / "llama1", golden / "peft" / "all_linear_r4"
    report = merge_folder(base, adapter, tmp_path / "out", QuantSpec())
    squares = np.zeros(3)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        key = f"model.layers.1.{name}.weight"
        w = np.asarray(dequantize(quantize(jnp.asarray(tensor(base, key))), jnp.float32)).astype(np.float64)
        a, b = (tensor(adapter, f"base_model.model.model.layers.1.{name}.lora_{x}.weight").astype(float) for x in "AB")
        exact = w + 8 / 4 * b @ a
        merged = tensor(tmp_path / "out", key)
        assert merged.dtype == ml_dtypes.bfloat16
        half_step = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 8)
        error = merged.astype(np.float64) - exact
        assert np.all(np.abs(error) <= half_step * 1.001 + 1e-7)
        squares += [(x * x).sum() for x in (w, exact - w, error)]
    w_norm, update, rounding = np.sqrt(squares)
    assert report["update"] == pytest.approx(update / w_norm, rel=0.3)  # two layers of fourteen
    assert report["rounding"] == pytest.approx(rounding / w_norm, rel=0.3)
    assert json.loads((tmp_path / "out" / REPORT).read_text()) == report


def test_large_weights_are_merged_in_parts(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = golden / "llama" / "llama1", golden / "peft" / "all_linear_r4"
    reports = []
    for name, chunk in (("whole", 2**24), ("parts", 100)):
        monkeypatch.setattr("qlora_jax.io.merge._CHUNK", chunk)
        reports.append(merge_folder(base, adapter, tmp_path / name, UNQUANTIZED, shard_bytes=chunk * 100))
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 3
    for key in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"):
        whole, parts = (tensor(tmp_path / name, key).astype(np.float32) for name in ("whole", "parts"))
        np.testing.assert_allclose(parts, whole, rtol=2**-7)
    assert reports[0]["update"] == pytest.approx(reports[1]["update"], rel=1e-4)


def test_a_value_too_large_for_float16_is_an_error(golden: Path, tmp_path: Path, adapter_for) -> None:
    base = golden / "llama" / "llama1"
    adapter = adapter_for(base, size=1e6)
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight overflows float16"):
        merge_folder(base, adapter, tmp_path / "out", UNQUANTIZED, dtype="float16")
    assert not (tmp_path / "out").exists()
    for dtype in ("bfloat16", "float32"):
        with pytest.raises(InputError, match=f"weight overflows {dtype}: the adapter adds numbers that no weight"):
            merge_folder(base, adapter_for(base, size=9e37), tmp_path / "out", UNQUANTIZED, dtype=dtype)


def test_what_does_not_fit_is_refused(golden: Path, tmp_path: Path) -> None:
    base, adapter, out = golden / "llama" / "llama1", golden / "peft" / "all_linear_r4", tmp_path / "out"
    quantized = golden / "bnb4bit" / "nf4"
    with pytest.raises(InputError, match="the original weights are not in it"):
        merge_folder(quantized, adapter, out, None, "original")
    with pytest.raises(InputError, match="the adapter was trained on int4"):
        merge_folder(quantized, adapter, out, QuantSpec("int4"))
    with pytest.raises(InputError, match=r"does not fit the base model.* is \[4, 32\], expected \[4, 48\]"):
        merge_folder(golden / "llama" / "llama2", adapter, out, QuantSpec())
    with pytest.raises(InputError, match="dtype 'float8'"):
        merge_folder(base, adapter, out, QuantSpec(), dtype="float8")
    with pytest.raises(InputError, match="merge_into 'base'"):
        merge_folder(base, adapter, out, QuantSpec(), "base")
    with pytest.raises(InputError, match="read from"):
        merge_folder(base, adapter, adapter, QuantSpec(), overwrite=True)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments, **named) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "save_tensors", full)
    with pytest.raises(InputError, match="No space left on device"):
        merge_folder(golden / "llama" / "llama1", golden / "peft" / "qv_rslora_r2", tmp_path / "out", UNQUANTIZED)
    assert not list(tmp_path.iterdir())


def test_adapters_are_copied_when_they_are_whole(golden: Path, tmp_path: Path) -> None:
    adapter, out = golden / "peft" / "qv_rslora_r2", tmp_path / "out"
    copy_adapter(adapter, out)
    names = {peft.CONFIG, peft.WEIGHTS}
    assert {path.name for path in out.iterdir()} == names  # the logits beside it are no part of an adapter
    assert all((out / name).read_bytes() == (adapter / name).read_bytes() for name in names)
    (out / peft.WEIGHTS).write_bytes((adapter / peft.WEIGHTS).read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        copy_adapter(out, tmp_path / "again")
    (out / peft.WEIGHTS).unlink()
    with pytest.raises(InputError, match="holds no adapter_model.safetensors"):
        copy_adapter(out, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_run_says_what_it_trained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        read_run(tmp_path)
    config = {
        "model": {"path": "base", "revision": "main"},
        "quant": {"format": "fp4", "block_size": 128, "double_quant": False},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="not finished"):
        read_run(tmp_path)
    (tmp_path / "adapter").mkdir()
    expected = ("base", "main", QuantSpec("fp4", 128, False), tmp_path / "adapter")
    assert read_run(tmp_path) == expected
    (tmp_path / "summary.json").write_text(json.dumps({"config_hash": config_hash(config)}))
    assert read_run(tmp_path) == expected
    other = config | {"quant": config["quant"] | {"block_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match=r"config\.json is not the config that the run ended with"):
        read_run(tmp_path)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model": config["model"]}))
    with pytest.raises(InputError, match="'quant' is missing"):
        read_run(tmp_path)
