"""What a row becomes, and reading its fields: every mistake is one line with file, line and what was found."""

import dataclasses
from typing import Any, NamedTuple, NoReturn

from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError

_KINDS = {str: "text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}


class Pair(NamedTuple):
    """An example as text: what is given, and what is learned. `target` is never blank. `message`: what a user would
    say in a chat, where `source` puts a prompt around it; None where `source` is that itself."""

    source: str
    target: str
    message: str | None = None


def text(row: Row, field: str, optional: bool = False, blank: bool = False) -> str:
    """The text of a field. `optional`: missing, null and blank give ""; `blank`: it must be there but may be blank.

    Raises:
      InputError: the field is missing, not text, blank, or not valid Unicode.
    """
    value = row.fields.get(field)
    if optional and value is None:
        return ""
    if field not in row.fields:
        bad(row, field, f'no field "{field}"')
    if not isinstance(value, str):
        bad(row, field, f"expected text in the field {field}, found {kind(value)}")
    if not value.strip() and not optional and not blank:
        bad(row, field, f"the field {field} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        bad(row, field, f"half a surrogate pair (U+{code:04X}) in the field {field}: not valid Unicode")
    return value


def objects(row: Row, field: str) -> list[Row]:
    """The objects of a list, each as a row at the place of its own; null is an empty list.

    Raises:
      InputError: the field is missing, no list, or holds something else than objects.
    """
    if field not in row.fields:
        bad(row, field, f'no field "{field}"')
    values = row.fields[field] or []
    if not isinstance(values, list):
        bad(row, field, f"expected a list in the field {field}, found {kind(values)}")
    for value in values:
        if not isinstance(value, dict):
            bad(row, field, f"expected objects in the list {field}, found {kind(value)}")
    return [dataclasses.replace(row, fields=value) for value in values]


def bad(row: Row, field: str, reason: str) -> NoReturn:
    """Raises InputError with the row's place; the fields found are named where `field` is missing."""
    # Of a file without a header the first row's texts are the names: each is cut and kept on one line.
    found = ", ".join(" ".join(str(name).split())[:40] for name in list(row.fields)[:12]) or "none"
    missing = field not in row.fields
    raise InputError(f"{row.where}: {reason}" + (f"; fields found: {found}" if missing else ""))


def kind(value: Any) -> str:
    """The kind of a JSON value, for errors."""
    return _KINDS.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
