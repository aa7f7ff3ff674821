"""Writing a new Hugging Face folder piece by piece: whole or not at all, in shards.

ShardWriter takes whole tensors as they come and writes what transformers writes; StackWriter knows all shapes
beforehand and puts parts of tensors at their places, so that memory holds a part only.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from qlora_jax import checksums
from qlora_jax.errors import InputError
from qlora_jax.files import atomic_folder, save_tensors, write_json
from qlora_jax.io.folder import COMPANIONS
from qlora_jax.io.header import Place, make_header

SHARD_BYTES = 2 * 2**30
_REPLACEABLE = (".json", ".safetensors", ".model", ".jinja", ".txt")


@contextmanager
def new_folder(out: Path, overwrite: bool = False, sources: Sequence[Path] = (), needed: int = 0) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, and is gone otherwise.

    Args:
      out: must not exist, or be empty, unless overwrite is given.
      overwrite: replace a folder that holds files of a checkpoint and nothing else.
      sources: folders that are read and so must not be replaced.
      needed: bytes that will be written, about.
    Raises:
      InputError: `out` cannot be taken, the disk has too little room, or writing fails.
    """
    _check_target(out, overwrite, sources)
    try:
        with atomic_folder(out) as folder:  # clears, or puts back, what a killed run left: so look again
            _check_target(out, overwrite, sources)
            _check_room(folder, out, needed)
            yield folder
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InputError(f"{out} was not written, and nothing is left half-written: {reason}") from error


def _check_target(out: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out} is {'a link' if out.is_symlink() else 'a file'}; expected the name of a new folder")
    for source in sources:
        if out.resolve() == source.resolve():
            raise InputError(f"{out} is read from and cannot be written to as well; choose another --out")
    entries = sorted(out.iterdir()) if out.exists() else []
    if entries and not overwrite:
        raise InputError(f"{out} exists and is not empty; choose another --out, or replace it with --overwrite")
    foreign = [entry.name for entry in entries if entry.is_dir() or not entry.name.endswith(_REPLACEABLE)]
    if foreign:
        raise InputError(
            f"{out} holds {foreign[0]!r}, which is no file of a checkpoint and would be deleted: choose another --out"
        )


def _check_room(folder: Path, out: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{out} would take about {size_text(needed)}, its disk has {size_text(free)} left: choose another --out"
        )


def size_text(count: float) -> str:
    """3435973837 -> "3.20 GiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"


def copy_companions(source: Path, out: Path) -> list[str]:
    """Copies tokenizer and generation settings that stand beside a checkpoint; returns their names."""
    names = [name for name in COMPANIONS if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, out / name)
    return names


class ShardWriter:
    """Takes tensors one by one; memory holds one shard at most, which goes to disk when the next tensor would not fit.

    The result is `model.safetensors`, or `model-00001-of-0000N.safetensors` and an index: what transformers writes.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.total_bytes = 0
        self._pending: dict[str, np.ndarray] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Adds tensors that stay together in one shard, as the parts of a quantized weight must."""
        size = sum(value.nbytes for value in tensors.values())
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending |= {key: np.asarray(value, order="C") for key, value in tensors.items()}
        self._pending_bytes += size
        self.total_bytes += size

    def finish(self) -> list[str]:
        """Writes what is left, and the index where there are several shards; returns the names of the weight files."""
        self._flush()
        names = _file_names(len(self._shards))
        for name, (path, _) in zip(names, self._shards, strict=True):
            path.rename(self.folder / name)
        _write_index(self.folder, self.total_bytes, dict(zip(names, (keys for _, keys in self._shards), strict=True)))
        return names

    def _flush(self) -> None:
        path = self.folder / f"shard-{len(self._shards) + 1}.partial"
        save_tensors(self._pending, path)
        self._shards.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0


class StackWriter:
    """Files of tensors whose shapes are known; every byte must be written once, those of a tensor in their order.

    The headers come first and are written again at the end, with the checksums of what was written.

    Args:
      folder: where they are made.
      groups: tensors that stay together in a file, name -> (dtype, shape).
      shard_bytes: of a file at most, unless one group alone is larger.
    """

    def __init__(self, folder: Path, groups: Sequence[Mapping[str, tuple[str, tuple[int, ...]]]], shard_bytes: int):
        self.folder = folder
        shards: list[dict[str, tuple[str, tuple[int, ...]]]] = []
        room = 0
        for group in groups:
            size = sum(place.stop - place.start for place in make_header(group)[1].values())
            if not shards or size > room:
                shards.append({})
                room = shard_bytes
            shards[-1] |= group
            room -= size
        self.names = _file_names(len(shards))
        self._places: dict[str, tuple[int, Place]] = {}
        self._running: dict[str, checksums.Running] = {}
        self._written: dict[str, int] = {}  # bytes of each tensor
        self._handles = [os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666) for name in self.names]
        self._shards = shards
        for handle, tensors in zip(self._handles, shards, strict=True):
            header, places = make_header(tensors, dict.fromkeys(tensors, checksums.UNKNOWN))
            _write_all(handle, header, 0)
            self._places |= {key: (handle, place) for key, place in places.items()}
            self._running |= {key: checksums.Running(*of) for key, of in tensors.items()}
            self._written |= dict.fromkeys(tensors, 0)
        self.total_bytes = self._missing = sum(place.stop - place.start for _, place in self._places.values())

    def write(self, key: str, first: int, values: np.ndarray) -> None:
        """Puts values at the tensor's value number `first` and after it: those that follow what was written of it."""
        handle, place = self._places[key]
        start = place.start + first * values.itemsize
        if values.dtype.name != place.dtype or start + values.nbytes > place.stop:
            raise ValueError(f"{values.size} values of {values.dtype} from {first} on do not fit {key}: {place}")
        if start - place.start != self._written[key]:
            raise ValueError(f"values of {key} from {first} on, but {self._written[key]} bytes of it are written")
        _write_all(handle, np.ascontiguousarray(values).reshape(-1).view(np.uint8), start)
        self._running[key].update(values)
        self._written[key] += values.nbytes
        self._missing -= values.nbytes

    def finish(self) -> list[str]:
        """Everything onto the disk, and the index where there are several files; returns the names of the files."""
        if self._missing:
            raise ValueError(f"{self._missing} bytes of {self.folder} were never written")
        for handle, tensors in zip(self._handles, self._shards, strict=True):
            _write_all(handle, make_header(tensors, {key: self._running[key].result() for key in tensors})[0], 0)
            os.fsync(handle)  # a disk may say only now that it is full
        self.close()
        keys = {name: list(tensors) for name, tensors in zip(self.names, self._shards, strict=True)}
        _write_index(self.folder, self.total_bytes, keys)
        return self.names

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.pop())

    def __enter__(self) -> "StackWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _write_all(handle: int, data: bytes | np.ndarray, start: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, start)
        view, start = view[count:], start + count


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _write_index(folder: Path, total_bytes: int, keys: Mapping[str, Sequence[str]]) -> None:
    """The index of several files, name -> its keys; one file needs none."""
    if len(keys) > 1:
        weight_map = {key: name for name, held in keys.items() for key in held}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
