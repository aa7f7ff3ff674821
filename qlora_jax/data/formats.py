"""From the rows of a data set to texts: what is given, and what is learned.

A format is one function of a row that gives its examples, entered in FORMATS by its name in the config. It raises
InputError naming file, line and field when the row is not of the format, and gives none for a row that rightly has
nothing to learn.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from qlora_jax.data import chats, conversations, instructions
from qlora_jax.data.fields import Chat, Pair
from qlora_jax.data.rows import Problems, Row
from qlora_jax.errors import InputError

FORMATS: dict[str, Callable[[Row], list[Pair]]] = {
    "alpaca": instructions.alpaca,
    "input-output": instructions.input_output,
    "oasst1": conversations.oasst1,
    "hh-rlhf": conversations.hh_rlhf,
    "self-instruct": instructions.self_instruct,
    "unnatural-instructions": instructions.unnatural_instructions,
    "flan-v2": instructions.flan_v2,
    "chip2": instructions.chip2,
    "longform": instructions.input_output,
    "dolly": instructions.dolly,
    "messages": conversations.messages,
    "sharegpt": conversations.sharegpt,
}

# The formats that are conversations, for a chat template; the others give a question and its answer.
_CHATS: dict[str, Callable[[Row], list[Chat]]] = {
    "oasst1": chats.oasst1,
    "hh-rlhf": chats.hh_rlhf,
    "messages": chats.messages,
    "sharegpt": chats.sharegpt,
}

# Columns of .tsv files that come without a header, by format.
COLUMNS: dict[str, tuple[str, ...]] = {"flan-v2": instructions.FLAN_COLUMNS}

# What is done to all rows of a data set before its format reads them one by one.
_GATHER: dict[str, Callable[[Sequence[Row]], list[Row]]] = {"oasst1": conversations.gather_messages}


@dataclasses.dataclass(frozen=True)
class Text:
    """A pair and the place of its row."""

    source: str
    target: str
    where: str


def check_format(format: str) -> None:
    """Raises InputError when there is no such format."""
    if format not in FORMATS:
        raise InputError(f"unknown data.format {format!r}; known formats: {', '.join(FORMATS)}")


def format_rows(rows: Sequence[Row], format: str) -> tuple[list[Text], int]:
    """Every example of every row as text, and the number of rows left out because they have nothing to learn.

    Raises:
      InputError: an unknown format, or the first bad row (file, line, reason) with the count of the others, and the
        formats that can read that row.
    """
    found, left_out = _read_all(rows, format, FORMATS)
    return [Text(pair.source, pair.target, row.where) for row, pairs in found for pair in pairs], left_out


def format_chats(rows: Sequence[Row], format: str) -> tuple[list[Chat], int]:
    """Every conversation of every row, for a chat template; see `format_rows`."""
    readers = {name: _CHATS.get(name) or chats.from_pairs(read) for name, read in FORMATS.items()}
    found, left_out = _read_all(rows, format, readers)
    return [chat for _, made in found for chat in made], left_out


def _read_all(
    rows: Sequence[Row], format: str, readers: dict[str, Callable[[Row], Any]]
) -> tuple[list[tuple[Row, Any]], int]:
    check_format(format)
    found = []
    left_out = 0
    problems = Problems()
    first_bad: Row | None = None
    for row in _GATHER.get(format, list)(rows):
        try:
            made = readers[format](row)
        except InputError as error:
            problems.add(str(error))
            first_bad = first_bad or row
            continue
        left_out += not made
        found.append((row, made))
    problems.raise_if_any(_fitting(first_bad, readers) if first_bad else "")
    return found, left_out


def _fitting(row: Row, readers: dict[str, Callable[[Row], Any]]) -> str:
    """The formats that read a row, as the end of an error."""
    names = [name for name, read in readers.items() if name != "longform" and _reads(read, row)]
    return f"; data.format={' or '.join(names)} reads it" if names else ""


def _reads(read: Callable[[Row], Any], row: Row) -> bool:
    try:
        return bool(read(row))
    except InputError:
        return False
