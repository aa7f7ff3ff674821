"""Where a run goes that was given no folder: runs/MODEL-DATA, or the next number where another run has that."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

from qlora_jax.data.read import data_files, data_sets, is_on_hub
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
    data = "+".join(map(_short, data_sets(config.data.path))) or _short(config.data.batches)
    name = f"{_short(config.model.path)}-{data}"
    for number in itertools.count(1):
        path = RUNS / (name if number == 1 else f"{name}-{number}")
        if _is_free(path) or _holds(path, plain):
            return path
    raise AssertionError("there are always more numbers")


def _short(path: str) -> str:
    """The last part of a path or a hub name, without what says its kind."""
    name = _SUFFIXES.sub("", path.rstrip("/").rpartition("/")[2])
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"


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
    return all(_same_data(recorded.get(key), keys[key], keys["data.revision"]) for key in _DATA if keys[key])


def _same_data(recorded: Any, path: Any, revision: str) -> bool:
    try:
        before = {checksum for _, checksum in recorded["parts"]}
        here = [name for name in data_sets(path) if not is_on_hub(name)]  # the hub's are not fetched for this
        return all(checksum in before for name in here for _, checksum in contents(data_files(name, revision)))
    except (TypeError, KeyError, ValueError):
        return False
