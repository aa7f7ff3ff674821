"""A config as plain values: for JSON, for its hash, and for naming what differs between two."""

import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from qlora_jax.errors import InputError

AUTO = "auto"  # a value that is chosen by what else is known
NUMBERS_OR_AUTO = ("train.grad_accum",)  # keys of whole numbers that may also be AUTO
SECTIONS = ("model", "quant", "lora", "data", "optimizer", "train", "mesh", "eval")
# Keys that are gone, each with the value under which a run is the same without it. They count where they are missing,
# so that folders, packs and ledgers from before keep their hashes and go on.
GONE = {"model.compute": "full", "model.fuse_lora": False}
# Keys that came since, each with the value under which a run is the same as before. With it they do not count, for the
# same reason.
CAME = {"model.router_aux_loss_coef": 0.0, "data.task": ""}
# Where a run computes, not what: its devices divide the same work, so that it may go on with others.
_WHERE = {"mesh": {"devices": 1}}


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON has it: dicts in the order of SECTIONS, lists for tuples.

    Raises:
      InputError: a value that JSON has no form for, such as NaN.
    """
    plain = {name: _plain(value, name) for name, value in config.to_dict().items()}
    return {name: plain[name] for name in (*SECTIONS, *plain) if name in plain}


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner, f"{path}.{name}") for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item, path) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"config key {path} is {value}; expected a finite number")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(f"config key {path}: a {type(value).__name__} cannot be written as JSON; use numbers and strings")


def config_hash(plain: dict[str, Any]) -> str:
    """SHA-256, in hex, of `plain` as JSON with sorted keys and no spaces: equal for equal values in any order.

    Keys that are gone (GONE) count as if they stood in the section, keys that came (CAME) as if they were not there,
    and those of `mesh` not at all.
    """
    return hashlib.sha256(_canonical(_as_ever(plain)).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _as_ever(plain: dict[str, Any]) -> dict[str, Any]:
    """The config with the keys that are gone, in every section of theirs that has keys, without those that came and
    change nothing, and as on one device."""
    whole = dict(plain)
    for key, value in GONE.items():
        section, _, name = key.partition(".")
        if isinstance(found := whole.get(section), dict) and found:
            whole[section] = {name: value} | found
    for key, value in CAME.items():
        section, _, name = key.partition(".")
        if isinstance(found := whole.get(section), dict) and found.get(name) == value:
            whole[section] = {other: kept for other, kept in found.items() if other != name}
    return whole | {section: value for section, value in _WHERE.items() if section in whole}


def differing_keys(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between two resolved configs, a line a key: "train.steps: 10 there, 20 here".

    Empty exactly if their hashes are equal.
    """
    a = {key: _canonical(value) for key, value in flatten(_as_ever(there)).items()}
    b = {key: _canonical(value) for key, value in flatten(_as_ever(here)).items()}
    keys = [key for key in (*a, *(key for key in b if key not in a)) if a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key, 'missing')} there, {b.get(key, 'missing')} here" for key in keys]


def flatten(config: Any, path: str = "") -> dict[str, Any]:
    """Values by key path, in the order of SECTIONS; `config` is a ConfigDict or a dict of dicts."""
    flat: dict[str, Any] = {}
    names = config if path else sorted(config, key=lambda name: (*SECTIONS, name).index(name))
    for name in names:
        value = config[name]
        if isinstance(value, ConfigDict | dict) and len(value):
            flat |= flatten(value, f"{path}{name}.")
        else:
            flat[f"{path}{name}"] = value
    return flat


def nearest(key: str, known: Sequence[str]) -> list[str]:
    """At most three of the paths `known` that `key` may have meant, same last part first, in any section."""
    section, _, last = key.rpartition(".")
    names = {path: path.rpartition(".")[2] for path in known}
    found = [path for path, name in names.items() if last in (name, _initials(name))]
    if not found:
        close = difflib.get_close_matches(last, set(names.values()), n=1, cutoff=0.7)
        found = [path for path, name in names.items() if name in close]
    same_section = [path for path in found if path.rpartition(".")[0] == section]
    return (same_section or found or difflib.get_close_matches(key, known, n=1, cutoff=0.7))[:3]


def _initials(name: str) -> str:
    """Of "learning_rate", "lr"; of a single word, nothing."""
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""
