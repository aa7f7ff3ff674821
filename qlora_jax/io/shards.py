"""Writing a new Hugging Face folder piece by piece: whole or not at all, in shards that go to disk as they fill."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from qlora_jax.errors import InputError
from qlora_jax.io.export import atomic_folder, save_tensors, write_json

SHARD_BYTES = 2 * 2**30
# What goes along with the weights: settings and vocabularies, never code.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
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
    _check_room(out, needed)
    try:
        with atomic_folder(out) as folder:
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


def _check_room(out: Path, needed: int) -> None:
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
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
    names = [name for name in _COMPANIONS if (source / name).is_file()]
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
        count = len(self._shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        weight_map: dict[str, str] = {}
        for name, (path, keys) in zip(names, self._shards, strict=True):
            path.rename(self.folder / name)
            weight_map |= dict.fromkeys(keys, name)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / "model.safetensors.index.json", index)
        return names

    def _flush(self) -> None:
        path = self.folder / f"shard-{len(self._shards) + 1}.partial"
        save_tensors(self._pending, path)
        self._shards.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0
