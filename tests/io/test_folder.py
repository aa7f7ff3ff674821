"""Checkpoint folders: found, or refused with the reason."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.errors import InputError
from qlora_jax.io.folder import TensorFiles, resolve


@pytest.fixture
def sharded(golden, tmp_path) -> Path:
    """A copy of llama2: four shards and an index."""
    return Path(shutil.copytree(golden / "llama" / "llama2", tmp_path / "llama2"))


def rewrite_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_resolve_takes_folders_and_refuses_the_rest(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "file").write_text("")
    for path, message in (
        ("", "no model was named"),
        (str(tmp_path / "file"), "is a file; expected a checkpoint folder"),
        (str(tmp_path / "absent"), "no such folder"),
        ("just-a-word", "no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            resolve(path)


def test_hub_that_does_not_answer(monkeypatch):
    import huggingface_hub

    asked = {}

    def refuse(name, **options):
        asked.update(options, name=name)
        raise OSError("no route to the hub\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match="owner/name: no such folder here.*revision 'v1': no route to the hub$"):
        resolve("owner/name", "v1")
    assert asked["name"] == "owner/name" and asked["revision"] == "v1"
    assert not any("bin" in pattern or ".py" in pattern for pattern in asked["allow_patterns"])


def test_shards_together_hold_every_tensor(sharded):
    files = TensorFiles(sharded)
    direct = {key: value for path in sorted(sharded.glob("*.safetensors")) for key, value in load_file(path).items()}
    assert files.shapes == {key: value.shape for key, value in direct.items()}
    assert set(files.dtypes.values()) == {"bfloat16"}
    for key, value in direct.items():
        np.testing.assert_array_equal(files.read(key), value)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_index_may_not_lead_out_of_the_folder(sharded, name):
    rewrite_index(sharded, lambda names: names.update({"lm_head.weight": name}))
    with pytest.raises(InputError, match="shards must lie in the folder itself"):
        TensorFiles(sharded)


def test_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(InputError, match="lacks model-00002-of-00004.safetensors"):
        TensorFiles(sharded)


@pytest.mark.parametrize("keep", [0, 5, 100, 30_000])
def test_cut_shard_is_named(sharded, keep):
    shard = sharded / "model-00003-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(InputError, match="model-00003-of-00004.safetensors is damaged or cut short"):
        TensorFiles(sharded)


def test_index_that_promises_too_much(sharded):
    rewrite_index(sharded, lambda names: names.update({"extra.weight": "model-00001-of-00004.safetensors"}))
    with pytest.raises(InputError, match="promises extra.weight, which its file does not hold"):
        TensorFiles(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}])
def test_index_without_a_map(sharded, weight_map):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="has no weight_map"):
        TensorFiles(sharded)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(InputError, match="holds no model.safetensors"):
        TensorFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pytorch_model.bin is a pickle, which is never opened"):
        TensorFiles(tmp_path)


@pytest.fixture
def both(sharded) -> Path:
    """The shards, their index, and all of it in model.safetensors too."""
    tensors = {key: value for path in sharded.glob("model-*.safetensors") for key, value in load_file(path).items()}
    save_file(tensors, sharded / "model.safetensors")
    return sharded


def change(file: Path, key: str, values=lambda value: value * 2) -> None:
    tensors = load_file(file)
    tensors[key] = values(tensors[key])
    save_file(tensors, file)


def test_two_sources_that_hold_the_same(both):
    single = {key: value for key, value in load_file(both / "model.safetensors").items()}
    files = TensorFiles(both)
    assert files.shapes == {key: value.shape for key, value in single.items()}
    assert {file for file, _ in files._places.values()} == {"model.safetensors"}
    change(both / "model.safetensors", "lm_head.weight")  # is looked at again: the file is another now
    with pytest.raises(InputError, match="two models"):
        TensorFiles(both)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("model.layers.1.mlp.down_proj.weight", lambda w: np.concatenate([w[:-1], w[-1:] + 1])),  # its last row
        ("model.norm.weight", lambda w: w[:-1]),
        ("model.norm.weight", lambda w: w.astype(np.float32) + 1),
        ("another.weight", None),
    ],
)
@pytest.mark.parametrize("changed", ["model.safetensors", "model-00004-of-00004.safetensors"])
def test_two_sources_that_differ_are_refused_by_name(both, changed, key, values):
    if values is None:
        tensors = load_file(both / changed) | {key: np.zeros(2, np.float32)}
        save_file(tensors, both / changed)
    else:
        holder = next(p for p in both.glob("model-*.safetensors") if key in load_file(p))
        change(both / "model.safetensors" if changed == "model.safetensors" else holder, key, values)
    names = r"model\.safetensors and the shards of model\.safetensors\.index\.json"
    with pytest.raises(InputError, match=f"two models, {names}, which differ in {key}:"):
        TensorFiles(both)


def test_equal_values_in_another_dtype_are_the_same(both):
    change(both / "model.safetensors", "lm_head.weight", lambda w: w.astype(np.float32))
    assert TensorFiles(both).dtypes["lm_head.weight"] == "float32"


def test_an_index_that_was_left_behind_counts_for_nothing(both):
    for path in both.glob("model-*.safetensors"):
        path.unlink()
    assert len(TensorFiles(both).shapes) == len(load_file(both / "model.safetensors"))
    rewrite_index(both, lambda names: names.update(dict.fromkeys(names, "model.safetensors")))
    assert len(TensorFiles(both).shapes) == len(load_file(both / "model.safetensors"))
