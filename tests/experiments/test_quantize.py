"""The quantize command, run as a user does."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from qlora_jax.io.load import QuantSpec, load_model, stored_quant

pytestmark = pytest.mark.quick_compile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantize")


@pytest.fixture(scope="module")
def results(run_commands, golden: Path, folder: Path) -> dict[str, dict]:
    """All commands of this file, run one after the other: name -> status, out, err."""
    model = f"--model={golden / 'llama' / 'llama2'}"
    arguments = {
        "native": [model, f"--out={folder / 'native'}"],
        "bnb": [model, f"--out={folder / 'bnb'}", "--format=bnb", "--quant=fp4", "--block_size=128"],
        "again": [model, f"--out={folder / 'bnb'}", "--format=bnb"],
        "converted": [f"--model={folder / 'bnb'}", f"--out={folder / 'converted'}"],
        "requantized": [f"--model={folder / 'bnb'}", f"--out={folder / 'no'}", "--quant=nf4"],
        "int4": [model, f"--out={folder / 'no'}", "--format=bnb", "--quant=int4"],
        "unknown quant": [model, f"--out={folder / 'no'}", "--quant=nf5"],
        "unknown form": [model, f"--out={folder / 'no'}", "--format=gguf"],
        "block size": [model, f"--out={folder / 'no'}", "--block_size=48"],
        "no out": [model],
        "no model": [f"--model={folder / 'absent'}", f"--out={folder / 'no'}"],
        "in place": [f"--model={folder / 'native'}", f"--out={folder / 'native'}", "--overwrite"],
        "overwrite": [model, f"--out={folder / 'native'}", "--overwrite", "--quant=int4"],
    }
    results = run_commands([["experiments.quantize", *words] for words in arguments.values()])
    return dict(zip(arguments, results, strict=True))


def test_it_says_what_it_does_and_did(results: dict, folder: Path) -> None:
    native = results["native"]
    assert native["status"] == 0, native["err"]
    lines = native["out"].splitlines()
    assert lines[0].startswith("quantize: ") and "nf4 + double quantization, blocks of 64" in lines[0]
    (bits,) = (line.split() for line in lines if "bits a weight" in line)
    assert float(bits[-2]) == 16 and 4.1 < float(bits[-1]) < 4.2
    assert lines[-1].startswith(f"written: {folder / 'native'}")


def test_bnb_folder_has_what_was_asked(results: dict, folder: Path) -> None:
    assert results["bnb"]["status"] == 0, results["bnb"]["err"]
    assert stored_quant(folder / "bnb") == QuantSpec("fp4", 128, False)
    report = json.loads((folder / "bnb" / "qlora_jax_quantize.json").read_text())
    assert (report["form"], report["format"], report["block_size"]) == ("bnb", "fp4", 128)


def test_a_quantized_folder_changes_its_form(results: dict, folder: Path) -> None:
    assert results["converted"]["status"] == 0, results["converted"]["err"]
    config = json.loads((folder / "converted" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "qlora_jax"
    states = [nnx.state(load_model(folder / name, None, "float32")) for name in ("bnb", "converted")]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("again", "--overwrite"),
        ("requantized", "already quantized"),
        ("int4", "bitsandbytes has nf4, fp4, int8, not int4"),
        ("unknown quant", "'nf5'"),
        ("unknown form", "--format=gguf"),
        ("block size", "power of two"),
        ("no out", "missing flag --out"),
        ("no model", "no such folder"),
        ("in place", "read from"),
    ],
)
def test_mistakes_are_one_line(results: dict, folder: Path, name: str, reason: str) -> None:
    result = results[name]
    assert result["status"] == 2 and reason in result["err"]
    assert len(result["err"].strip().splitlines()) == 1
    assert not (folder / "no").exists()


def test_overwrite_replaces(results: dict, folder: Path) -> None:
    assert results["overwrite"]["status"] == 0, results["overwrite"]["err"]
    assert stored_quant(folder / "native") == QuantSpec("int4", 64, False)
    assert {path.name for path in folder.iterdir()} == {"native", "bnb", "converted"}
