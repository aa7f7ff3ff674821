"""Nothing that is not finite is read: any tensor of any form of folder, named with its file; nor a negative scale."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qlora_jax import checksums
from qlora_jax.errors import InputError
from qlora_jax.io.folder import TensorFiles
from qlora_jax.io.header import numpy_dtype, read_header
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.io.merge import copy_adapter, merge_folder
from qlora_jax.io.peft import WEIGHTS, read_adapter, read_matrices
from qlora_jax.io.source import LocalSource
from qlora_jax.io.write import quantize_folder
from tests.llama_names import EMBEDDING, FINAL_NORM, HEAD, LAYER
from tests.not_finite import DTYPES, not_finite

DOWN, NORM = LAYER.format(1, "mlp.down_proj"), LAYER.format(1, "input_layernorm")


def put(folder: Path, file: str, key: str, place: int, value) -> None:
    """Writes a value over one of a safetensors file, in place, as if it had been written so."""
    where = read_header(lambda start, out: LocalSource(folder).read(file, start, out))[key]
    dtype = numpy_dtype(where.dtype)
    with open(folder / file, "r+b") as handle:
        handle.seek(where.start + place * dtype.itemsize)
        handle.write(np.asarray(value, dtype).tobytes())
    text = (folder / file).read_bytes()
    (folder / file).write_bytes(text.replace(checksums.KEY.encode(), b"no_sums_"))


def file_of(folder: Path, key: str) -> str:
    index = folder / "model.safetensors.index.json"
    return json.loads(index.read_text())["weight_map"][key] if index.exists() else "model.safetensors"


@pytest.fixture(scope="module")
def forms(golden, tmp_path_factory) -> Callable[[str], Path]:
    """Folders by the form of their weights; not to be changed."""
    made = tmp_path_factory.mktemp("forms")
    base = golden / "llama" / "llama1"
    quantize_folder(base, made / "native", "native", QuantSpec("nf4", 64, False), shard_bytes=20_000)
    quantize_folder(base, made / "native_dq", "native", QuantSpec("int4", 64, True))
    folders = {"shards": golden / "llama" / "llama2", "single": base, "bnb": golden / "bnb4bit" / "nf4"}
    folders |= {"bnb_dq": golden / "bnb4bit" / "nf4_dq"}
    return lambda name: folders.get(name, made / name)


@pytest.fixture
def spoiled(forms, tmp_path) -> Callable[..., tuple[Path, str]]:
    """spoiled(form, key, place, value): a copy of a folder with one value changed, and the file that it is in."""

    def make(form: str, key: str, place: int, value) -> tuple[Path, str]:
        folder = tmp_path / "spoiled"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(forms(form), folder)
        file = file_of(folder, key)
        put(folder, file, key, place, value)
        return folder, file

    return make


@pytest.mark.parametrize("form", ["shards", "single", "bnb", "bnb_dq", "native", "native_dq"])
def test_every_float_of_every_tensor(forms, spoiled, form):
    """At its first, its last and another place, whole and piece by piece, and no other tensor suffers."""
    files = TensorFiles(forms(form))
    floats = [key for key in files.shapes if files.dtypes[key] in DTYPES]
    rng = np.random.default_rng(0)
    for number, key in enumerate(floats):
        patterns, size = list(not_finite(files.dtypes[key]).values()), int(np.prod(files.shapes[key]))
        place = (0, size - 1, int(rng.integers(size)))[number % 3]
        value = patterns[number % len(patterns)]
        folder, file = spoiled(form, key, place, value)
        kind = "NaN" if np.isnan(np.float32(value)) else "inf"
        message = rf"^{folder}/{file}: {key} holds {kind} \(value {place + 1:,} of {size:,}\): no model"
        broken = TensorFiles(folder)
        with pytest.raises(InputError, match=message):
            broken.read(key)
        with pytest.raises(InputError, match=message):
            for _ in broken.pieces(key, piece_bytes=100):
                pass
        other = floats[number - 1]
        np.testing.assert_array_equal(broken.read(other), files.read(other))


@pytest.mark.parametrize("key", [EMBEDDING, FINAL_NORM, HEAD, DOWN, NORM])
def test_neither_loaded_nor_quantized_nor_merged(spoiled, golden, tmp_path, key):
    folder, file = spoiled("single", key, 5, not_finite("float32")["-signalling"])
    message = f"{folder}/{file}: {key} holds NaN"
    for quant in (QuantSpec(), QuantSpec("none")):
        with pytest.raises(InputError, match=message):
            load_model(folder, quant)
    for form in ("native", "bnb"):
        with pytest.raises(InputError, match=message):
            quantize_folder(folder, tmp_path / "out", form)
    with pytest.raises(InputError, match=message):
        merge_folder(folder, golden / "peft" / "all_linear_r4", tmp_path / "out", QuantSpec())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("form", "key"),
    [
        ("bnb", f"{DOWN}.absmax"),
        ("bnb_dq", f"{DOWN}.nested_absmax"),
        ("native", "model.layers.mlp.down_proj.weight.absmax"),
        ("native_dq", "model.layers.mlp.down_proj.weight.nested_absmax"),
        ("native_dq", "model.layers.mlp.down_proj.weight.offset"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -0.25])
def test_scales_that_no_weight_can_have(spoiled, tmp_path, form, key, value):
    folder, file = spoiled(form, key, 1 if "offset" in key else 0, value)
    said = {"nan": "holds NaN", "inf": "holds inf"}.get(str(value), r"holds -0\.25, a negative scale")
    with pytest.raises(InputError, match=f"{folder}/{file}: {key} {said}"):
        load_model(folder)
    with pytest.raises(InputError, match=f"{key} {said}"):
        quantize_folder(folder, tmp_path / "out", "bnb" if form == "native" else "native")


@pytest.mark.parametrize("key", ["lora_A", "lora_B", "embed_tokens", "lm_head"])
def test_an_adapter_that_is_not_finite_is_named(golden, tmp_path, key):
    base, whole = golden / "llama" / "llama1", "lora" not in key
    source = golden / "peft" / ("modules_to_save" if whole else "all_linear_r4")
    folder = Path(shutil.copytree(source, tmp_path / "adapter"))
    places = read_header(lambda start, out: LocalSource(folder).read(WEIGHTS, start, out))
    key = [name for name in places if key in name][-1]
    put(folder, WEIGHTS, key, 7, np.nan)
    model = load_model(base)
    with pytest.raises(InputError, match=rf"{WEIGHTS}: {key} holds NaN \(value 8 of"):
        (read_matrices if whole else read_adapter)(model, folder)
    with pytest.raises(InputError, match=f"{WEIGHTS}: {key} holds NaN"):
        merge_folder(base, folder, tmp_path / "out", QuantSpec("none"))
    with pytest.raises(InputError, match=f"{WEIGHTS}: {key} holds NaN"):
        copy_adapter(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
