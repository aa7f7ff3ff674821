"""What a row becomes, and reading its fields: every mistake is one line with file, line and what was found."""

import dataclasses
import math
from typing import Any, NamedTuple, NoReturn

from qlora_jax.data.json_text import loads
from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError

_KINDS = {
    str: "text", list: "a list", dict: "an object", bool: "true or false", type(None): "null", bytes: "bytes",
}  # fmt: skip


class NoField(InputError):
    """A field that a row does not have."""


class Pair(NamedTuple):
    """An example as text: what is given, and what is learned. `target` is never blank. `message`: what a user would
    say in a chat, where `source` puts a prompt around it; None where `source` is that itself. `given`: the characters
    [begin, end) of `target` that are not learned all the same, rising; its last character is. `shorter`: what stands
    in place of `source` where it is too long, the longest first."""

    source: str
    target: str
    message: str | None = None
    given: tuple[tuple[int, int], ...] = ()
    shorter: tuple[str, ...] = ()


def number(value: Any) -> float | None:
    """A finite number, or text that is one; None for anything else, true and false among it."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


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
    if isinstance(value, bytes):
        mend = 'write the column as text (pyarrow: column.cast("string"))'
        bad(row, field, f"expected text in the field {field}, found bytes, as a binary column has them: {mend}")
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


def answered(source: str, answer: str, message: str | None = None) -> list[Pair]:
    """The pair, or none where the answer is blank: a row without an answer has nothing to learn."""
    return [Pair(source, answer, message)] if answer.strip() else []


def items(row: Row, field: str) -> list[Any]:
    """A list, or the list that is written in the field as JSON text; null and blank text are an empty one.

    Raises:
      InputError: the field is missing, or no list.
    """
    if field not in row.fields:
        bad(row, field, f'no field "{field}"')
    values = row.fields[field] or []
    if isinstance(values, str):
        values = parsed(row, field, values) if values.strip().startswith(("[", "{")) else values.strip() or []
    if values and not isinstance(values, list):
        bad(row, field, f"expected a list in the field {field}, found {kind(values)}")
    return values or []


def objects(row: Row, field: str) -> list[Row]:
    """The objects of a list (`items`), each as a row at the place of its own.

    Raises:
      InputError: the field is missing, no list, or holds something else than objects.
    """
    values = items(row, field)
    for value in values:
        if not isinstance(value, dict):
            bad(row, field, f"expected objects in the list {field}, found {kind(value)}")
    return [dataclasses.replace(row, fields=value) for value in values]


def parsed(row: Row, field: str, value: str) -> Any:
    """What a text in the field says as JSON. Raises InputError where it is none."""
    try:
        return loads(value)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        bad(row, field, f"expected JSON in the field {field}, found {value[:40]!r}: {reason}")


def is_empty(value: Any) -> bool:
    """Whether a field says nothing: null, blank text, an empty list or object."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or value == {}


def bad(row: Row, field: str, reason: str) -> NoReturn:
    """Raises InputError with the row's place; the fields found are named where `field` is missing."""
    # Of a file without a header the first row's texts are the names: each is cut and kept on one line.
    found = ", ".join(" ".join(str(name).split())[:40] for name in list(row.fields)[:12]) or "none"
    missing = field not in row.fields
    if missing:
        raise NoField(f"{row.where}: {reason}; fields found: {found}")
    raise InputError(f"{row.where}: {reason}")


def kind(value: Any) -> str:
    """The kind of a JSON value, for errors."""
    return _KINDS.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
