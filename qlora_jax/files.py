"""Writing files so that each is there whole or not at all, whatever ends the process."""

import errno
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from qlora_jax import checksums
from qlora_jax.errors import InputError
from qlora_jax.finite import check_finite

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
MOST_BYTES = 100_000_000  # of a file that is read whole: what safetensors allows its headers; a tokenizer takes a third


def read_whole(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a stranger's file: a pipe or a device, which never ends, is refused, as is a file of over `most`.

    Raises InputError for these, and OSError where it cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # the second: a pipe is not waited for
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} is no file, but a folder, a pipe or a device")
        if found.st_size > most:
            raise InputError(f"{path} has {found.st_size:,} bytes; expected {most:,} at most")
        with open(handle, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(handle)


def loads(data: bytes) -> Any:
    """A stranger's JSON, UTF-8. Raises ValueError for whatever is none, also for nesting that is too deep and for texts
    that are no Unicode."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if _SURROGATE.search(data):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it has half a surrogate pair, which no text has") from error
    return value


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well; otherwise nothing is left behind.

    What a killed process left is cleared by the next call: `.out.partial`, and `.out.old`, which is put back where it
    was killed between the two renames. Raises InputError when a process that is alive writes to the same place.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    building, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    building.mkdir(exist_ok=True)
    lock = os.open(building, os.O_RDONLY)  # a lock goes with the process that holds it, however that ends
    try:
        if not take_lock(lock, building):
            raise InputError(f"{out} is being written by another process: wait for it, or choose another folder")
        try:
            if old.exists() and not out.exists():
                old.rename(out)
            shutil.rmtree(old, ignore_errors=True)
            for entry in building.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            yield building
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        if out.exists():
            out.rename(old)
        building.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(lock)


def take_lock(handle: int, path: Path) -> bool:
    """Takes the lock of an open file or folder; false where another process has it, or `path` is no longer it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return True  # a network disk without locks: two writers at once are not told apart there


def hold_folder(path: Path, other: str) -> TextIO:
    """Makes a workdir where there is none and holds it, by its file .lock, until what is returned is closed or this
    process ends, however that happens.

    Raises InputError where it cannot be made, or another process (`other` is what users call it) holds it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("w")
        is_ours = take_lock(lock.fileno(), path / ".lock")
    except OSError as error:
        raise InputError(f"workdir {path} cannot be used: {error.strerror}") from error
    if not is_ours:
        lock.close()
        raise InputError(f"workdir {path} is in use by another {other}; wait, or choose another --workdir")
    return lock


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """A safetensors file with a checksum for each tensor in its metadata.

    In the mode of the user's umask: safetensors makes files that only their owner can read. Raises InputError, and
    writes nothing, where a value is not finite.
    """
    for key, values in tensors.items():
        check_finite(values, key, "such a tensor is not written")
    sums = checksums.as_metadata({name: checksums.of_array(value) for name, value in tensors.items()})
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt", **sums})
    except SafetensorError as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error
    _sort_metadata(path)
    path.chmod(mode)


def _sort_metadata(path: Path) -> None:
    """safetensors writes the entries in a random order: equal tensors shall be equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"the header of {path} cannot be put in order")
        file.seek(8)
        file.write(text.ljust(length))


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: written beside and renamed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """As write_text. Raises ValueError for NaN and infinity, which JSON has not."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
