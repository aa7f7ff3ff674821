"""New folders appear whole or not at all, never at the cost of other files; shards are what transformers writes."""

import errno
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from qlora_jax.errors import InputError
from qlora_jax.io import shards
from qlora_jax.io.shards import ShardWriter, copy_companions, new_folder, size_text


def fill(folder: Path, text: str = "new") -> None:
    (folder / "config.json").write_text(text)


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        fill(folder)
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_failure_and_what_stood_there_stays(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "out"
    with new_folder(out) as folder:
        fill(folder, "old")
    expected = (InputError, "No space left on device") if isinstance(error, OSError) else (KeyboardInterrupt, None)
    with pytest.raises(expected[0], match=expected[1]), new_folder(out, overwrite=True) as folder:
        fill(folder)
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "config.json").read_text() == "old"


def test_an_empty_folder_is_filled_and_a_full_one_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out) as folder:
        fill(folder, "first")
    with pytest.raises(InputError, match="--overwrite"), new_folder(out):
        pass
    with new_folder(out, overwrite=True) as folder:
        fill(folder, "second")
    assert (out / "config.json").read_text() == "second"


def test_overwriting_deletes_no_other_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="checkpoints"), new_folder(out, overwrite=True):
        pass
    (out / "checkpoints").rmdir()
    (out / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"thesis\.tex"), new_folder(out, overwrite=True):
        pass
    assert (out / "thesis.tex").exists()


def test_sources_files_and_links_are_no_targets(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    fill(source)
    with pytest.raises(InputError, match="read from"), new_folder(tmp_path / "x" / ".." / "source", True, [source]):
        pass
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(InputError, match=f"is a {name}"), new_folder(tmp_path / name, True):
            pass
    assert (source / "config.json").read_text() == "new"


def test_too_little_room_is_said_before_the_work(tmp_path: Path) -> None:
    expected = r"would take about 1073741824\.00 GiB"
    with pytest.raises(InputError, match=expected), new_folder(tmp_path / "out", needed=2**60):
        raise AssertionError("the block must not begin")
    assert not list(tmp_path.iterdir())


def test_companions_are_settings_and_vocabularies_alone(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("tokenizer.json", "generation_config.json", "modeling_llama.py", "pytorch_model.bin", "config.json"):
        (source / name).write_text(name)
    assert sorted(copy_companions(source, out)) == ["generation_config.json", "tokenizer.json"]
    assert sorted(path.name for path in out.iterdir()) == ["generation_config.json", "tokenizer.json"]
    assert (out / "tokenizer.json").read_text() == "tokenizer.json"


def some_tensors() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(5, 8, 16)).astype(ml_dtypes.bfloat16)
    groups: list[dict] = [{f"w{i}": w, f"w{i}.offset": np.array(i, np.float32)} for i, w in enumerate(weights)]
    return [*groups, {"transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T}]


@pytest.mark.parametrize("shard_bytes", [1, 600, 10**6])
def test_shards_hold_every_tensor_and_no_more_than_their_size(tmp_path: Path, shard_bytes: int) -> None:
    writer, groups = ShardWriter(tmp_path, shard_bytes), some_tensors()
    for group in groups:
        writer.add(group)
    names = writer.finish()
    index_file = tmp_path / "model.safetensors.index.json"
    assert len(names) == {1: 6, 600: 3, 10**6: 1}[shard_bytes]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == names
    assert {path.name for path in tmp_path.iterdir()} == {*names, *([index_file.name] if len(names) > 1 else [])}
    if len(names) > 1:
        assert names[0] == f"model-00001-of-0000{len(names)}.safetensors"
        index = json.loads(index_file.read_text())
        assert index["metadata"]["total_size"] == writer.total_bytes == 5 * 260 + 48
        places = index["weight_map"]
    else:
        assert names == ["model.safetensors"]
        places = {key: names[0] for group in groups for key in group}
    for group in groups:
        assert len({places[key] for key in group}) == 1
        for key, value in group.items():
            with safe_open(tmp_path / places[key], "numpy") as file:
                read = file.get_tensor(key)
                assert file.metadata()["format"] == "pt"
            assert read.dtype == value.dtype and read.shape == value.shape and np.array_equal(read, value)


def test_memory_holds_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    save = shards.save_tensors

    def measured(tensors: dict[str, np.ndarray], *rest, **named) -> None:
        sizes.append(sum(value.nbytes for value in tensors.values()))
        save(tensors, *rest, **named)

    monkeypatch.setattr(shards, "save_tensors", measured)
    writer = ShardWriter(tmp_path, 600)
    for group in some_tensors():
        writer.add(group)
        assert writer.total_bytes - sum(sizes) <= 600
    writer.finish()
    assert max(sizes) <= 600 and sum(sizes) == writer.total_bytes


def test_weight_files_are_as_readable_as_the_others(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add({"w": np.zeros(3, np.float32)})
    writer.finish()
    fill(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_sizes_are_written_in_binary_units() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 3 * 2**20, 3.2 * 2**30)] == [
        "0 bytes",
        "1023 bytes",
        "1.00 KiB",
        "3.00 MiB",
        "3.20 GiB",
    ]
