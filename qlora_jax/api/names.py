"""Keys of a config by short names: steps for train.steps, rank for lora.rank; and values as Python has them."""

import difflib
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.settings import AUTO, GONE, NUMBERS_OR_AUTO, flatten, nearest

# What a short name means where several sections have it.
_PREFERRED = {"batch_size": "train.batch_size", "format": "data.format", "max_examples": "data.max_examples"}


def key_of(name: str, known: list[str]) -> str:
    """The key that a name stands for: the key itself, or its last part where no other key has that.

    Raises InputError for a name of none, or of several.
    """
    if name in known:
        return name
    if name in GONE:
        raise InputError(f"{name}: this key is gone, and every run is as with {GONE[name]!r}; leave it out")
    if name in _PREFERRED and _PREFERRED[name] in known:
        return _PREFERRED[name]
    found = [key for key in known if key.rpartition(".")[2] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{name}: there are {' and '.join(found)}; say which, as **{{{found[0]!r}: ...}}")
    short = {key.rpartition(".")[2]: key for key in known}
    near = nearest(name, known) or [short[last] for last in difflib.get_close_matches(name, short, n=1, cutoff=0.6)]
    if near:
        raise InputError(f"{name}: no such setting; did you mean {' or '.join(near)}?")
    raise InputError(f"{name}: no such setting; qlora_jax/base.py has all keys of a config, with their units")


def set_keys(config: Any, settings: Mapping[str, Any]) -> set[str]:
    """Sets keys of a ConfigDict in place, by name; returns the keys.

    Raises InputError for an unknown name, a key that is given twice, or a value of another kind than the key's.
    """
    values = flatten(config)
    given: dict[str, Any] = {}
    for name, value in settings.items():
        key = key_of(name, list(values))
        if key in given:
            raise InputError(f"{name}: {key} is given twice")
        given[key] = as_kind(key, value, values[key])
    with config.ignore_type():  # kinds are right, and a number may become "auto"
        config.update_from_flattened_dict(given)
    return set(given)


def as_kind(key: str, value: Any, old: Any) -> Any:
    """A value as the kind that its key has. Raises InputError where it is another."""
    if hasattr(value, "item") and not isinstance(value, str | bytes) and getattr(value, "ndim", None) == 0:
        value = value.item()  # a number of numpy or JAX
    if isinstance(old, bool):
        fits, kind = isinstance(value, bool), "True or False"
    elif key in NUMBERS_OR_AUTO:
        fits, kind = value == AUTO or type(value) is int, f"a whole number, or {AUTO}"
    elif isinstance(old, int):
        fits, kind = isinstance(value, int) and not isinstance(value, bool), f"a whole number, as {old}"
    elif isinstance(old, float):
        fits, kind = isinstance(value, int | float) and not isinstance(value, bool), f"a number, as {old}"
        value = float(value) if fits else value
    elif isinstance(old, tuple):
        value = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
        fits, kind = isinstance(value, tuple), "a list"
    else:
        value = str(value) if hasattr(value, "__fspath__") else value
        fits, kind = isinstance(value, str), "text"
    if not fits:
        raise InputError(f"{key} is {value!r}; expected {kind}")
    return value
