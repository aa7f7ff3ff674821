"""The export command, run as a user does, on a run's folder as the train command leaves it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from qlora_jax.io import peft
from qlora_jax.io.load import QuantSpec, load_model

pytestmark = pytest.mark.quick_compile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def run(golden: Path, folder: Path) -> Path:
    """A finished run on llama1 in nf4 + double quantization; `unfinished` beside it has no adapter."""
    base = golden / "llama" / "llama1"
    config = {
        "model": {"path": str(base), "revision": "main", "compute_dtype": "float32"},
        "quant": {"format": "nf4", "block_size": 64, "double_quant": True},
    }
    for name in ("run", "unfinished", "moved"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    shutil.copytree(golden / "train" / "nf4_dq", folder / "run" / "adapter")
    shutil.copytree(golden / "train" / "nf4_dq", folder / "moved" / "adapter")
    gone = config | {"model": {"path": str(folder / "gone"), "revision": "main"}}
    (folder / "moved" / "config.json").write_text(json.dumps(gone))
    return folder / "run"


@pytest.fixture(scope="module")
def results(run_commands, golden: Path, folder: Path, run: Path) -> dict[str, dict]:
    """All commands of this file, run one after the other: name -> status, out, err."""
    workdir, moved = f"--workdir={run}", f"--workdir={folder / 'moved'}"
    base, adapter = f"--model={golden / 'llama' / 'llama1'}", f"--adapter={run / 'adapter'}"
    no = f"--out={folder / 'no'}"
    arguments = {
        "adapter": [workdir, f"--out={folder / 'adapter'}"],
        "merged": [workdir, f"--out={folder / 'merged'}", "--merge", "--dtype=float32"],
        "original": [workdir, f"--out={folder / 'original'}", "--merge", "--merge_into=original"],
        "by hand": [base, adapter, "--quant=nf4+dq", f"--out={folder / 'hand'}", "--merge", "--dtype=float32"],
        "found again": [moved, base, f"--out={folder / 'found'}", "--merge", "--dtype=float32"],
        "moved": [moved, no, "--merge"],
        "again": [workdir, f"--out={folder / 'adapter'}"],
        "unfinished": [f"--workdir={folder / 'unfinished'}", no],
        "no run": [f"--workdir={folder / 'absent'}", no],
        "nothing named": [no, "--merge"],
        "no base": [adapter, no, "--merge"],
        "two adapters": [workdir, adapter, no],
        "two quants": [workdir, "--quant=nf4", no, "--merge"],
        "no quant": [base, adapter, no, "--merge"],
        "bad dtype": [workdir, no, "--merge", "--dtype=int8"],
        "bad quant": [base, adapter, no, "--merge", "--quant=nf5"],
        "not an original": [
            f"--model={golden / 'bnb4bit' / 'nf4_dq'}", adapter, no, "--merge", "--merge_into=original",
        ],
    }  # fmt: skip
    results = run_commands([["experiments.export", *words] for words in arguments.values()])
    return dict(zip(arguments, results, strict=True))


def test_the_adapter_is_handed_out(results: dict, folder: Path, run: Path) -> None:
    assert results["adapter"]["status"] == 0, results["adapter"]["err"]
    for name in (peft.CONFIG, peft.WEIGHTS):
        assert (folder / "adapter" / name).read_bytes() == (run / "adapter" / name).read_bytes()


def test_a_merged_run_is_the_model_that_was_trained(results: dict, golden: Path, folder: Path, run: Path) -> None:
    merged = results["merged"]
    assert merged["status"] == 0, merged["err"]
    assert "merged into the dequantized weights (nf4 + double quantization, blocks of 64)" in merged["out"]
    base = golden / "llama" / "llama1"
    tokens = np.load(base / "logits.npz")["tokens"]
    trained = load_model(base, QuantSpec(), "float32")
    peft.load_adapter(trained, run / "adapter")
    expected, actual = (
        np.asarray(nnx.jit(lambda model, tokens: model.logits(model(tokens)[0]))(model, tokens))
        for model in (trained, load_model(folder / "merged", None, "float32"))
    )
    assert np.abs(actual - expected).max() < 1e-4
    report = json.loads((folder / "merged" / "qlora_jax_export.json").read_text())
    assert report["dtype"] == "float32" and report["rounding"] == 0 < report["update"]


@pytest.mark.parametrize(("name", "out"), [("by hand", "hand"), ("found again", "found")])
def test_other_ways_to_name_the_same_give_the_same(results: dict, folder: Path, name: str, out: str) -> None:
    assert results[name]["status"] == 0, results[name]["err"]
    weights = [(folder / f / "model.safetensors").read_bytes() for f in ("merged", out)]
    assert weights[0] == weights[1]


def test_merging_into_the_original_says_what_that_means(results: dict, folder: Path) -> None:
    original = results["original"]
    assert original["status"] == 0, original["err"]
    assert "outputs differ from training's" in original["out"]
    key = "model.layers.0.mlp.up_proj.weight"
    values = []
    for name in ("merged", "original"):
        with safe_open(folder / name / "model.safetensors", "numpy") as file:
            values.append(file.get_tensor(key))
    assert [value.dtype.name for value in values] == ["float32", "bfloat16"]
    assert np.abs(values[0] - values[1].astype(np.float32)).max() > 0.01


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("moved", "--model=DIR says where the base is now"),
        ("again", "--overwrite"),
        ("unfinished", "not finished"),
        ("no run", "holds no run"),
        ("nothing named", "missing flag --workdir=RUN"),
        ("no base", "missing flag --model=DIR"),
        ("two adapters", "do not go together"),
        ("two quants", "do not go together"),
        ("no quant", "say how it was"),
        ("bad dtype", "--dtype=int8"),
        ("bad quant", "'nf5'"),
        ("not an original", "the original weights are not in it"),
    ],
)
def test_mistakes_are_one_line(results: dict, folder: Path, name: str, reason: str) -> None:
    result = results[name]
    assert result["status"] == 2 and reason in result["err"], result["err"]
    assert len(result["err"].strip().splitlines()) == 1
    assert not (folder / "no").exists()
