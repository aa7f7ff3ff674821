"""Quantized folders: bitsandbytes' form is what transformers saves, and checksums; loading one equals quantizing."""

import errno
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from qlora_jax import checksums
from qlora_jax.errors import InputError
from qlora_jax.io import shards
from qlora_jax.io.load import QuantSpec, load_config, load_model, stored_quant
from qlora_jax.io.write import QUANTS, REPORT, choose_quant, quant_spec, quantize_folder

pytestmark = pytest.mark.quick_compile

GOLDEN_QUANT = {"nf4": "nf4", "fp4": "fp4", "nf4_dq": "nf4+dq"}  # folder of transformers' making -> our name


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Tensor name -> dtype, shape and bytes, over all files of a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            for key in file.keys():  # noqa: SIM118
                value = file.get_tensor(key)
                found[key] = (value.dtype.name, value.shape, value.tobytes())
    return found


def assert_same_model(folder: Path, source: Path, quant: QuantSpec | None) -> None:
    """Every array of the model loaded from `folder` equals, bit for bit, that of `source` quantized while loading."""
    left, right = (nnx.state(load_model(f, q, "float32")) for f, q in ((folder, None), (source, quant)))
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def parts_of(file: Path) -> tuple[dict, bytes]:
    """The header of a safetensors file, and the bytes after it."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def rewritten(source: Path, out: Path, change) -> Path:
    """A copy of a folder as one file, its tensors passed through change(key, value)."""
    out.mkdir()
    shutil.copyfile(source / "config.json", out / "config.json")
    save_file({key: change(key, value) for key, value in tensors_of(source).items()}, out / "model.safetensors")
    return out


@pytest.mark.parametrize("name", GOLDEN_QUANT)
def test_bitsandbytes_form_is_what_transformers_writes(golden: Path, tmp_path: Path, name: str) -> None:
    theirs = golden / "bnb4bit" / name
    quantize_folder(golden / "llama" / "llama2", tmp_path / "out", "bnb", quant_spec(GOLDEN_QUANT[name]))
    assert contents(tmp_path / "out") == contents(theirs)
    headers, data = zip(*(parts_of(folder / "model.safetensors") for folder in (tmp_path / "out", theirs)), strict=True)
    assert data[0] == data[1] and headers[1].pop("__metadata__") == {"format": "pt"}
    assert headers[0].pop("__metadata__").keys() == {"format", checksums.KEY} and headers[0] == headers[1]
    ours, golden_config = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", theirs))
    assert ours["quantization_config"] == golden_config["quantization_config"]
    assert ours["torch_dtype"] == golden_config["dtype"]


@pytest.mark.parametrize(
    ("form", "name", "block_size"),
    [("native", "nf4+dq", 64), ("native", "int4", 32), ("bnb", "nf4+dq", 128), ("bnb", "fp4", 64)],
)
def test_a_written_folder_loads_as_its_source_quantized_at_load(
    golden: Path, tmp_path: Path, form: str, name: str, block_size: int
) -> None:
    source, quant = golden / "llama" / "llama3", quant_spec(name, block_size)  # tied embeddings, 3 heads share 1
    quantize_folder(source, tmp_path / "out", form, quant)
    assert stored_quant(tmp_path / "out") == quant
    assert_same_model(tmp_path / "out", source, quant)


def test_many_shards_hold_whole_weights_and_load_the_same(golden: Path, tmp_path: Path) -> None:
    source, done = golden / "llama" / "llama2", []
    quantize_folder(source, tmp_path / "out", "bnb", shard_bytes=20_000, progress=lambda *step: done.append(step))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    for key in index:
        if key.endswith(".quant_map"):
            weight = key.removesuffix(".quant_map")
            assert len({file for part, file in index.items() if part.startswith(weight)}) == 1
    assert_same_model(tmp_path / "out", source, QuantSpec())
    assert done == [(i + 1, len(done)) for i in range(len(done))]


def test_float32_weights_are_quantized_as_they_are_and_the_rest_is_copied(golden: Path, tmp_path: Path) -> None:
    def noisy(key: str, value: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(len(key)).normal(size=value.shape)
        return (value.astype(np.float32) + 1e-4 * noise).astype(np.float32)

    source = rewritten(golden / "llama" / "llama2", tmp_path / "source", noisy)
    for form in ("native", "bnb"):
        quantize_folder(source, tmp_path / form, form, quant_spec("nf4"))
        assert_same_model(tmp_path / form, source, quant_spec("nf4"))
        before, after = contents(source), contents(tmp_path / form)
        for key in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
            assert after[key] == before[key] and after[key][0] == "float32"


def test_changing_the_form_changes_no_bit(golden: Path, tmp_path: Path) -> None:
    theirs = golden / "bnb4bit" / "nf4_dq"
    quantize_folder(theirs, tmp_path / "native", "native")
    quantize_folder(tmp_path / "native", tmp_path / "bnb", "bnb")
    assert contents(tmp_path / "bnb") == contents(theirs)
    quantize_folder(tmp_path / "bnb", tmp_path / "again", "native")
    assert contents(tmp_path / "again") == contents(tmp_path / "native")


def test_quantizing_twice_to_something_else_is_refused(golden: Path, tmp_path: Path) -> None:
    stored = stored_quant(golden / "bnb4bit" / "nf4_dq")
    assert stored == QuantSpec("nf4", 64, True)
    assert choose_quant(stored, None, None, tmp_path) == choose_quant(stored, "nf4+dq", 64, tmp_path) == stored
    for name, block_size in (("nf4", None), ("fp4+dq", None), (None, 128)):
        with pytest.raises(InputError, match="already quantized"):
            choose_quant(stored, name, block_size, tmp_path)


def test_names_of_formats() -> None:
    assert [str(quant_spec(name, 128)) for name in ("nf4", "int4+dq")] == [
        "nf4, blocks of 128",
        "int4 + double quantization, blocks of 128",
    ]
    assert quant_spec("none").format == "none"
    assert {quant_spec(name) for name in QUANTS} == {
        *(QuantSpec(format, 64, dq) for format in ("nf4", "fp4", "int4", "fp4-e3m0") for dq in (False, True)),
        QuantSpec("int8", 0, False),
    }
    assert str(quant_spec("int8")) == "int8, a scale a row"
    with pytest.raises(InputError, match="--block_size=128, but int8 has no blocks"):
        choose_quant(None, "int8", 128, Path())
    assert choose_quant(None, None, None, Path()) == QuantSpec("nf4", 64, True)
    for bad in ("nf5", "nf4+", "none", ""):
        with pytest.raises(InputError, match="expected one of nf4, "):
            choose_quant(None, bad, None, Path())
    with pytest.raises(InputError, match="block_size is 0"):
        choose_quant(None, "nf4", 0, Path())


def test_the_report_counts_what_is_on_disk(golden: Path, tmp_path: Path) -> None:
    source, out = golden / "llama" / "llama2", tmp_path / "out"
    report = quantize_folder(source, out, "native", quant_spec("nf4"))
    assert report == json.loads((out / REPORT).read_text())
    sizes = [{key: len(data) for key, (*_, data) in contents(folder).items()} for folder in (source, out)]
    assert [sum(size.values()) for size in sizes] == [report["bytes_before"], report["bytes_after"]]
    config = load_config(source)
    attention = 2 * config.D * config.H * (config.N + config.K)
    assert report["linear_weights"] == config.L * (attention + 3 * config.D * config.F)
    assert report["linear_bytes_before"] == 2 * report["linear_weights"]
    assert report["bits_per_weight"] == pytest.approx(4.5, abs=0.01)  # 4 + 32 / 64, and the ragged blocks' scales
    assert report["other_bytes"] == report["bytes_before"] - report["linear_bytes_before"]


def test_settings_go_along_but_no_code(golden: Path, tmp_path: Path) -> None:
    source = rewritten(golden / "llama" / "llama1", tmp_path / "source", lambda key, value: value)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling.Model"}}))
    for name in ("tokenizer.json", "tokenizer.model", "modeling.py", "README.md"):
        (source / name).write_text(name)
    quantize_folder(source, tmp_path / "out")
    names = {"config.json", "model.safetensors", REPORT, "tokenizer.json", "tokenizer.model"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = {"quant_method": "qlora_jax", "layout": 2, "format": "nf4", "block_size": 64, "double_quant": True}
    assert written == config | {"torch_dtype": written["torch_dtype"], "quantization_config": quantization}


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(golden: Path, tmp_path: Path) -> None:
    bad = "model.layers.1.mlp.up_proj.weight"

    def spoil(key: str, value: np.ndarray) -> np.ndarray:
        value = value.copy()
        value[:1] = np.nan if key == bad else value[:1]
        return value

    source = rewritten(golden / "llama" / "llama1", tmp_path / "source", spoil)
    with pytest.raises(InputError, match=f"{bad} holds NaN"):
        quantize_folder(source, tmp_path / "out", shard_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_one_line_and_nothing_is_left(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = shards.save_tensors, []

    def full(*arguments, **named) -> None:
        calls.append(arguments)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments, **named)

    monkeypatch.setattr(shards, "save_tensors", full)
    with pytest.raises(InputError, match="out was not written.*No space left on device"):
        quantize_folder(golden / "llama" / "llama2", tmp_path / "out", "bnb", shard_bytes=10_000)
    assert len(calls) == 3 and not list(tmp_path.iterdir())


def test_bitsandbytes_has_no_int4(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bitsandbytes has nf4, fp4, int8, not int4"):
        quantize_folder(golden / "llama" / "llama1", tmp_path / "out", "bnb", quant_spec("int4"))
    with pytest.raises(InputError, match="expected one of native, bnb"):
        quantize_folder(golden / "llama" / "llama1", tmp_path / "out", "gguf")
    assert not list(tmp_path.iterdir())


def test_real_weights(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "stories260K"
    report = quantize_folder(source, tmp_path / "out")
    assert report["bits_per_weight"] == pytest.approx(4.127, abs=0.02)
    assert report["linear_bytes_before"] == 4 * report["linear_weights"]
    assert_same_model(tmp_path / "out", source, QuantSpec())
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


def test_half_precision_names_itself(golden: Path, tmp_path: Path) -> None:
    source = rewritten(golden / "llama" / "llama1", tmp_path / "source", lambda key, value: value.astype(np.float16))
    config = json.loads((source / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (source / "config.json").write_text(json.dumps(config))
    quantize_folder(source, tmp_path / "out", "bnb")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == written["quantization_config"]["bnb_4bit_compute_dtype"] == "float16"
    states = [value for key, value in tensors_of(tmp_path / "out").items() if ".quant_state." in key]
    assert {json.loads(state.tobytes())["dtype"] for state in states} == {"float16"}
    assert ml_dtypes.bfloat16 not in {value.dtype for value in tensors_of(tmp_path / "out").values()}
