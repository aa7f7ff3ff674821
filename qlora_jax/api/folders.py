"""Where a run goes that was given no folder: runs/MODEL-DATA, or the next number where another run has that."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

from qlora_jax.data.read import data_files
from qlora_jax.errors import InputError
from qlora_jax.feed.cache import contents
from qlora_jax.models.config import read_json
from qlora_jax.settings import differing_keys, flatten
from qlora_jax.train.workdir import INPUTS

RUNS = Path("runs")
_DATA = ("data.path", "data.eval_path")
_SUFFIXES = re.compile(r"(\.(json|jsonl|csv|tsv|parquet|gz))+$", re.IGNORECASE)


def choose_workdir(config: Any, plain: dict[str, Any]) -> Path:
    """A folder for the run of `config` (`plain`: the same as plain values): one that holds this very run, which then
    goes on, or one where nothing is.

    Data counts by its content, under whatever name.
    """
    name = f"{_short(config.model.path)}-{_short(config.data.path or config.data.batches)}"
    for number in itertools.count(1):
        path = RUNS / (name if number == 1 else f"{name}-{number}")
        if _is_free(path) or _holds(path, plain):
            return path
    raise AssertionError("there are always more numbers")


def _short(path: str) -> str:
    """The last part of a path or a hub name, without what says its kind; of several, each."""
    names = [_SUFFIXES.sub("", part.rstrip("/").rpartition("/")[2]) for part in path.split(",")]
    return re.sub(r"[^\w.+-]+", "-", "+".join(names)).strip("-.") or "data"


def _is_free(path: Path) -> bool:
    try:
        return not path.exists() or (path.is_dir() and all(entry.name == ".lock" for entry in path.iterdir()))
    except OSError as error:
        raise InputError(f"workdir {path} cannot be read: {error.strerror or error}") from error


def _holds(path: Path, plain: dict[str, Any]) -> bool:
    """Whether the folder holds a run of this config on data of these contents."""
    try:
        there = read_json(path / "config.json")
    except (InputError, OSError):
        return False
    differing = {line.partition(":")[0] for line in differing_keys(there, plain)}
    if differing - set(_DATA):
        return False
    try:
        recorded = json.loads((path / INPUTS).read_bytes())
    except (OSError, ValueError):
        return not differing
    keys = flatten(plain)
    return all(_same_data(recorded.get(key), str(keys[key]), str(keys["data.revision"])) for key in _DATA if keys[key])


def _same_data(recorded: Any, path: str, revision: str) -> bool:
    try:
        before = {checksum for _, checksum in recorded["parts"]}
        return all(checksum in before for _, checksum in contents(data_files(path, revision)))
    except (TypeError, KeyError, ValueError):
        return False
