"""Data that a Python process has, as a file that a run can name: the rows are written once, under their checksum."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_jax import checksums
from qlora_jax.errors import InputError


def data_path(data: Any, folder: Path) -> str:
    """The data.path of what a user gave: a path or name as it is, several as a list with commas; rows as the name of a
    file in `folder`, which is made.

    Args:
      data: a path, the name of a data set, a list of these; or rows: any iterable of dicts (a list, a data set of the
        `datasets` library, a generator).
    Raises:
      InputError: no rows, a row that is no dict or that JSON has no form for, or the file cannot be written.
    """
    if isinstance(data, str | os.PathLike):
        return str(data)
    if isinstance(data, list | tuple) and data and all(isinstance(item, str | os.PathLike) for item in data):
        return ",".join(map(str, data))
    if isinstance(data, Mapping):
        names = ", ".join(map(repr, list(data)[:8]))
        raise InputError(f"data is a mapping of {names}; expected rows: give one of its parts, as data['train']")
    if hasattr(data, "to_dict") and hasattr(data, "iloc"):
        raise InputError("data is a table of pandas; expected rows: give data.to_dict('records')")
    if not isinstance(data, Iterable):
        raise InputError(f"data is {type(data).__name__}; expected rows (dicts), or the path of a file")
    return _written(data, folder)


def _written(rows: Iterable[Any], folder: Path) -> str:
    partial = folder / f".rows-{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        count = 0
        with partial.open("wb") as file:
            for count, row in enumerate(rows, 1):
                file.write(_line(row, count))
        if not count:
            raise InputError("data has no rows")
        path = folder / f"rows-{checksums.of_file(partial)[:12]}.jsonl"
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"the rows cannot be written to {folder}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return str(path)


def _line(row: Any, number: int) -> bytes:
    if not isinstance(row, Mapping):
        raise InputError(f"row {number} of data is {type(row).__name__}; expected a dict, as {{'instruction': ...}}")
    try:
        return (json.dumps(dict(row), ensure_ascii=False, allow_nan=False, default=_plain) + "\n").encode()
    except (TypeError, ValueError) as error:
        bad = next((name for name, value in row.items() if not _has_form(value)), "?")
        raise InputError(f"row {number} of data: JSON has no form for the field {bad}: {error}") from error


def _plain(value: Any) -> Any:
    """Arrays and numbers of numpy as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is no text, number, list or object")


def _has_form(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain).encode()
    except (TypeError, ValueError):
        return False
    return True
