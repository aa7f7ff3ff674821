"""Which data sets a config names, each with its format and its share of what is drawn."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from qlora_jax.data.detect import AUTO
from qlora_jax.data.formats import check_format
from qlora_jax.data.read import data_sets
from qlora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set. `format`: one of FORMATS, or AUTO: found from its rows. `weight`: its share of the examples that are
    drawn, in ratio to the other weights; None: each of its examples once an epoch."""

    path: str
    format: str
    weight: float | None = None


def sources_of(data: Any) -> list[Source]:
    """The data sets of data.path, by the config's `data` section, in its order.

    Raises:
      InputError: no name, an unknown format, or formats or weights of another number than data sets.
    """
    paths = data_sets(data.path)
    if not paths:
        raise InputError("no data set given: set data.path to a file or a hub data set's name (owner/name)")
    formats = _each(_formats(data), paths, "data.format")
    weights: list[float | None] = [_weight(weight) for weight in data.weights]
    if weights and len(weights) != len(paths):
        raise InputError(
            f"data.weights has {len(weights)} weights and data.path {len(paths)} data sets ({', '.join(paths)}); give "
            "one for each, or none: then every example comes once an epoch"
        )
    found = zip(paths, formats, weights or [None] * len(paths), strict=True)
    return [Source(path, format, weight) for path, format, weight in found]


def heldout_sources(data: Any) -> list[Source]:
    """The data sets of data.eval_path: in the format of data.path; where that has several, each in the one at its place
    if there are as many, else in that which its rows have. Raises InputError as `sources_of` does."""
    paths, formats = data_sets(data.eval_path), _formats(data)
    if len(formats) > 1 and len(formats) != len(paths):
        formats = (AUTO,)
    return [Source(path, format) for path, format in zip(paths, _each(formats, paths, "data.format"), strict=True)]


def _formats(data: Any) -> tuple[str, ...]:
    given = data.format.split(",") if isinstance(data.format, str) else data.format
    formats = tuple(str(format).strip() for format in (given if isinstance(given, list | tuple) else [given]))
    for format in formats:
        if format != AUTO:
            check_format(format)
    return formats


def _each(formats: Sequence[str], paths: Sequence[str], key: str) -> Sequence[str]:
    if len(formats) == 1:
        return list(formats) * len(paths)
    if len(formats) != len(paths):
        raise InputError(
            f"{key} has {len(formats)} formats ({', '.join(formats)}) and data.path {len(paths)} data sets "
            f"({', '.join(paths)}); give one for all, or one for each"
        )
    return formats


def _weight(value: Any) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = float("nan")
    if not 0 < weight < float("inf"):
        raise InputError(f"data.weights has {value!r}, expected numbers above 0, as 0.7,0.3")
    return weight
