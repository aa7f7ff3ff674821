"""A file that we wrote is read as it was written, or refused, whichever byte is damaged."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qlora_jax import checksums
from qlora_jax.errors import InputError
from qlora_jax.files import save_tensors
from qlora_jax.io.folder import TensorFiles
from qlora_jax.io.shards import StackWriter


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "codes": rng.integers(0, 256, (3, 5), np.uint8),
        "norm": rng.standard_normal(4).astype(np.float32),
        "embedding": rng.standard_normal((3, 2)).astype(ml_dtypes.bfloat16),
        "scale": np.array(3.0, np.float32),
    }


def write_whole(folder: Path) -> None:
    save_tensors(tensors(), folder / "model.safetensors")


def write_in_pieces(folder: Path) -> None:
    shapes = {key: (value.dtype.name, value.shape) for key, value in tensors().items()}
    with StackWriter(folder, [shapes], 2**20) as writer:
        for key, value in reversed(tensors().items()):
            for place, piece in enumerate(value.reshape(-1)):
                writer.write(key, place, piece.reshape(1))
        writer.finish()


def read(folder: Path) -> dict[str, bytes]:
    """As a model is loaded: shapes and dtypes are checked first (io/load.check_tensors)."""
    files = TensorFiles(folder)
    if sorted(map(str, files.dtypes.values())) != sorted(value.dtype.name for value in tensors().values()):
        raise InputError("damaged: another dtype")
    return {key: files.read(key).tobytes() for key in files.shapes}


@pytest.mark.parametrize("write", [write_whole, write_in_pieces])
def test_each_byte_counts(tmp_path, write):
    """One bit of each byte in turn: what is read is what was written, or an error says that the file is damaged."""
    write(tmp_path)
    file, expected = tmp_path / "model.safetensors", {key: x.tobytes() for key, x in tensors().items()}
    assert read(tmp_path) == expected == {key: x.tobytes() for key, x in load_file(file).items()}
    content, data_begins, refused = file.read_bytes(), 8 + int.from_bytes(file.read_bytes()[:8], "little"), 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            found = read(tmp_path)
        except InputError as error:
            refused += 1
            assert "damaged" in str(error) and len(str(error).splitlines()) == 1
        else:  # of the header: a name, a space, or the name under which checksums stand
            assert place < data_begins and sorted(found.values()) == sorted(expected.values())
    assert refused > len(content) - 100


def test_a_tensor_is_checked_however_it_is_read(tmp_path):
    """Whole, in pieces, or entry by entry; in pieces the error comes at its end."""
    write_whole(tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    place = content.index(tensors()["codes"].tobytes())
    ways = {
        "whole": lambda files: [files.read("codes")],
        "pieces": lambda files: [piece.copy() for _, piece in files.pieces("codes", 4)],
        "entries": lambda files: [files.read("codes", (index,)) for index in range(3)],
    }
    for read_it in ways.values():
        assert (
            np.concatenate([x.reshape(-1) for x in read_it(TensorFiles(tmp_path))]).tobytes()
            == content[place : place + 15]
        )
    content[place + 14] ^= 4
    file.write_bytes(content)
    for read_it in ways.values():
        files = TensorFiles(tmp_path)
        with pytest.raises(InputError, match=r"model.safetensors is damaged: codes is not what was written"):
            read_it(files)
        assert files.read("norm").tobytes() == tensors()["norm"].tobytes()


def test_checksums_are_of_the_content_alone(tmp_path):
    """Those of files in which the same tensors lie elsewhere are the same; dtype, shape and each value count."""
    write_whole(tmp_path)
    (tmp_path / "other").mkdir()
    write_in_pieces(tmp_path / "other")
    sums = []
    for folder in (tmp_path, tmp_path / "other"):
        files = TensorFiles(folder)
        for key in files.shapes:
            files.read(key)
        sums.append(files.checksums)
    assert sums[0] == sums[1] == {key: checksums.of_array(value) for key, value in tensors().items()}
    codes = tensors()["codes"]
    others = [codes.reshape(5, 3), codes.view(np.int8), codes[:, ::-1], codes[:2]]
    assert len({checksums.of_array(x) for x in (codes, *others)}) == 5
    assert checksums.of(b"ab", "c") != checksums.of("a", b"bc")


def test_files_without_checksums_are_read_as_before(tmp_path):
    save_file({"a": np.arange(4, dtype=np.float32)}, tmp_path / "model.safetensors")
    assert TensorFiles(tmp_path).read("a").tolist() == [0, 1, 2, 3]
    save_tensors({"a": np.arange(4, dtype=np.float32)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata().keys() == {"format", checksums.KEY}


def test_equal_tensors_are_equal_files(tmp_path):
    """safetensors itself shuffles the metadata."""
    files = [tmp_path / str(number) for number in range(6)]
    for file in files:
        save_tensors(tensors(), file)
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "numpy") as file:
        assert file.metadata()["format"] == "pt" and set(file.keys()) == set(tensors())


def test_values_out_of_order_are_no_tensor(tmp_path):
    refused = pytest.raises(ValueError, match="values of a from 2 on, but 0 bytes of it are written")
    with StackWriter(tmp_path, [{"a": ("float32", (4,))}], 100) as writer, refused:
        writer.write("a", 2, np.zeros(2, np.float32))
