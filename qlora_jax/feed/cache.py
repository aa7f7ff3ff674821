"""Tokenized data sets on disk, each under the hash of everything it was made from: made once, whole or not at all.

An entry is a folder named by its key: examples.arrow (feed/store.py) and entry.json, which is written last and has the
checksum of both: what is not what was written is built again. It is built beside its place and renamed into it, under a
lock that dies with its process: what a killed process left is cleared by the next, and of two that want the same entry
one waits for the other.

Entries are in $QLORA_JAX_CACHE, or qlora_jax/data in $XDG_CACHE_HOME or ~/.cache. Nothing deletes them; anyone may.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_jax import checksums
from qlora_jax.checksums import Input
from qlora_jax.errors import InputError
from qlora_jax.feed.store import ExampleStore
from qlora_jax.files import write_json

_LIBRARIES = ("tokenizers", "sentencepiece", "jinja2", "pyarrow")
_ROOMS = ("text", "data", "feed")  # of the package: where reading and tokenizing is written
_EXAMPLES, _ENTRY = "examples.arrow", "entry.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """`facts`: what the builder said of the examples, as plain JSON."""

    store: ExampleStore
    facts: dict[str, Any]
    folder: Path
    is_new: bool
    parts: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # that they were made of: name, checksum

    @property
    def input(self) -> Input:
        return Input(self.facts["content"], self.parts)


def cache_folder() -> Path:
    """Where entries are kept."""
    if own := os.environ.get("QLORA_JAX_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "qlora_jax" / "data"


def contents(files: list[tuple[str, Path]]) -> list[tuple[str, str]]:
    """(name, checksum of its bytes) of the files of a data set. Raises InputError when one cannot be read."""
    found = []
    for label, path in files:
        try:
            found.append((label, checksums.of_file(path)))
        except OSError as error:
            raise InputError(f"{label}: cannot be read: {error.strerror or error}") from error
    return found


def key_of(files: list[tuple[str, str]], tokenizer: bytes, settings: dict[str, Any]) -> str:
    """Hash of all that decides the examples: the files' names and contents, tokenizer, settings, and the code that
    reads and tokenizes with the versions of its libraries."""
    total = hashlib.blake2b(digest_size=16)

    def add(*parts: bytes) -> None:
        for part in parts:
            total.update(len(part).to_bytes(8, "little") + part)

    for label, content in files:
        add(label.encode("utf-8", "surrogateescape"), content.encode())
    add(tokenizer, json.dumps(settings, sort_keys=True).encode())
    for room in _ROOMS:
        for source in sorted((Path(__file__).parents[1] / room).rglob("*.py")):
            add(f"{room}/{source.parent.name}/{source.name}".encode(), source.read_bytes())
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            add(library.encode(), importlib.metadata.version(library).encode())
    return total.hexdigest()


def cached(key: str, build: Callable[[Path], dict[str, Any]]) -> Entry:
    """The entry of a key, built where there is none, or none that is whole.

    Args:
      build: writes the examples to a path and returns facts; facts["places"] are the store's. What it raises leaves
        nothing behind.

    Raises:
      InputError: the cache cannot be written; or what `build` raises.
    """
    root = cache_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        if (entry := _open(root / key)) is not None:
            return entry
        with _lock(root / f"{key}.lock"):
            return _open(root / key) or _build(root / key, build)
    except OSError as error:
        raise _not_kept(error) from error


def remembered(name: str, ask: Callable[[], Any], unreachable: type[Exception]) -> tuple[Any, bool]:
    """What `ask` says, plain JSON, and whether that is old: where it raises `unreachable`, it is what it said the last
    time that this was asked. Raises `unreachable` where there is no last time."""
    root = cache_folder() / "asked"
    file = root / f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.json"
    try:
        said = ask()
    except unreachable:
        try:
            return json.loads(file.read_text(encoding="utf-8")), True
        except (OSError, ValueError):
            pass
        raise
    try:
        root.mkdir(parents=True, exist_ok=True)
        write_json(file, said)
    except OSError as error:
        raise _not_kept(error) from error
    return said, False


def _not_kept(error: OSError) -> InputError:
    return InputError(
        f"the tokenized data cannot be kept in {cache_folder()}: {error.strerror or error}; free space there, or set "
        "QLORA_JAX_CACHE to a folder with room"
    )


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> Entry:
    """The caller holds the lock: no living process writes here."""
    building = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # there and not whole
    building.mkdir()
    try:
        facts = build(building / _EXAMPLES)
        checksum = _checksum(building / _EXAMPLES, facts)
        with (building / _ENTRY).open("w", encoding="utf-8") as file:
            json.dump({"checksum": checksum, "facts": facts}, file)
            file.flush()
            os.fsync(file.fileno())
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    entry = _open(folder)
    if entry is None:
        raise OSError(f"{folder} could not be read back")
    return dataclasses.replace(entry, is_new=True)


def _open(folder: Path) -> Entry | None:
    """None where there is no entry, or one that is not whole."""
    try:
        entry = json.loads((folder / _ENTRY).read_text(encoding="utf-8"))
        file, facts = folder / _EXAMPLES, entry["facts"]
        if entry["checksum"] != _checksum(file, facts):
            return None
        return Entry(ExampleStore.open(file, facts["places"]), facts, folder, False)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checksum(file: Path, facts: dict[str, Any]) -> str:
    return checksums.of(checksums.of_file(file), json.dumps(facts, sort_keys=True))


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Waits for other processes that hold it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
