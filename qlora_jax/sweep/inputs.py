"""What a sweep's configs stand for: checksums of the files they name, so that a ledger holds results of one content.

The driver reads what lies on its machine: data files whole, of weights what io/fingerprint reads (settings, names,
sizes, both ends of each file). Names of the hub and addresses of stores are taken at their word. A worker that goes on
from a pack's checkpoint compares everything (train/workdir).
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qlora_jax import checksums
from qlora_jax.data.read import data_sets
from qlora_jax.embedded import DATA, MODELS, located
from qlora_jax.errors import InputError
from qlora_jax.io.fingerprint import fingerprint
from qlora_jax.io.folder import COMPANIONS
from qlora_jax.sweep.ledger import Ledger

_FILES = (("data", "path"), ("data", "eval_path"), ("data", "batches"), ("eval", "mmlu_data"))
_MODELS = (("model", "path"), ("lora", "init_from"))
_SETS = (("data", "path"), ("data", "eval_path"))  # which may name several
_META = "inputs"


def check_inputs(ledger: Ledger, configs: Iterable[dict[str, Any]], say: Callable[[str], None] = print) -> None:
    """Notes in the ledger what the configs of a sweep stand for.

    Raises InputError where points are done with another content of a file that the configs name.
    """
    now, done = contents(configs), ledger.configs("done")
    noted = ledger.meta(_META)
    before = {} if noted is None else json.loads(noted)
    if noted is None and done:
        say("ledger: an older version began this sweep: whether data and weights are what they were cannot be checked")
    used = Counter(name for config in done for name in _names(config))
    for name, checksum in now.items():
        if used[name] and before.get(name, checksum) != checksum:
            raise InputError(
                f"{name}: it changed since this sweep began to train with it (points done: {used[name]:,}). Put it "
                "back as it was, or start anew in another --workdir"
            )
    ledger.set_meta({_META: before | now})


def contents(configs: Iterable[dict[str, Any]]) -> dict[str, str]:
    """ "KEY=NAME" of all files and folders on this machine that configs (settings.resolved) name -> checksum.

    Raises InputError for one that cannot be read.
    """
    places = {name: place for config in configs for name, place in _names(config).items()}
    try:
        return {name: checksum for name, (path, kind) in places.items() if (checksum := _checksum(path, kind))}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror or error}") from error


def _names(config: dict[str, Any]) -> dict[str, tuple[Path, str]]:
    return {
        f"{section}.{key}={name}": (located(name, MODELS if kind == "model" else DATA), kind)
        for kind, keys in (("files", _FILES), ("model", _MODELS))
        for section, key in keys
        if (value := config[section][key])
        for name in (data_sets(value) if (section, key) in _SETS else (value,))
    }


def _checksum(path: Path, kind: str) -> str:
    """ "" for what is not on this machine."""
    if path.is_file():
        return checksums.of_file(path)
    if not path.is_dir():
        return ""
    if kind == "model":
        beside = [path / name for name in COMPANIONS if (path / name).is_file()]
        return checksums.of(fingerprint(path), *_all(path, beside))
    return checksums.of(*_all(path, sorted(file for file in path.rglob("*") if file.is_file())))


def _all(folder: Path, files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        yield f"{file.relative_to(folder)} {checksums.of_file(file)}"
