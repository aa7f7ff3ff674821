"""Folders and JSON files are replaced whole; a written checkpoint reads back as the model it came from."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from qlora_jax.errors import InputError
from qlora_jax.files import atomic_folder, write_json
from qlora_jax.io.export import write_checkpoint
from qlora_jax.io.load import QuantSpec, load_model

pytestmark = pytest.mark.quick_compile
UNQUANTIZED = QuantSpec("none")


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    for text in ("first", "second"):
        with atomic_folder(out) as folder:
            assert folder.parent == out.parent and not list(folder.iterdir())
            (folder / text).touch()
        assert [path.name for path in out.iterdir()] == [text]
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as folder:
        (folder / "old").touch()
    with pytest.raises(error), atomic_folder(out) as folder:
        (folder / "new").touch()
        raise error
    assert list(tmp_path.iterdir()) == [out] and [path.name for path in out.iterdir()] == ["old"]


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    for name in (".out.partial", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    with atomic_folder(tmp_path / "out") as folder:
        assert not list(folder.iterdir())
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "dtype"), [("llama2", "bfloat16"), ("llama3", "float32")])  # llama3: tied embeddings
def test_a_checkpoint_reads_back(golden: Path, tmp_path: Path, name: str, dtype: str) -> None:
    source = golden / "llama" / name
    hf_config = json.loads((source / "config.json").read_text())
    model = load_model(source, UNQUANTIZED, "float32")
    write_checkpoint(tmp_path / "out", hf_config, model, dtype)
    again = load_model(tmp_path / "out", UNQUANTIZED, "float32")
    before, after = (jax.tree.leaves(nnx.state(m)) for m in (model, again))
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        assert np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == hf_config | {"torch_dtype": dtype}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


def test_an_unknown_dtype_is_refused(golden: Path, tmp_path: Path) -> None:
    model = load_model(golden / "llama" / "llama1", UNQUANTIZED)
    with pytest.raises(InputError, match="dtype 'int8'; expected one of float32, float16, bfloat16"):
        write_checkpoint(tmp_path / "out", {}, model, "int8")
    assert not (tmp_path / "out").exists()
