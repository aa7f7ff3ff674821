"""From the rows of a data set to texts: what is given, and what is learned.

A format is one function of a row that gives its examples, entered in FORMATS by its name in the config. It raises
InputError naming file, line and field when the row is not of the format, and gives none for a row that rightly has
nothing to learn.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from qlora_jax.data import chats, conversations, instructions
from qlora_jax.data.fields import Pair
from qlora_jax.data.rows import Problems, Row
from qlora_jax.errors import InputError
from qlora_jax.text.chat import Chat

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


def format_rows(rows: Iterable[Row], format: str) -> tuple[list[Text], int]:
    """Every example of every row as text, and the number of rows left out because they have nothing to learn.

    Raises InputError as `stream_texts` does.
    """
    texts = list(stream_texts(rows, format))
    return [text for of_row in texts for text in of_row], sum(not of_row for of_row in texts)


def stream_texts(rows: Iterable[Row], format: str) -> Iterator[list[Text]]:
    """The examples of each row, none for a row that has nothing to learn; nothing more comes after a bad row.

    No more than a row is held, but for formats that gather the rows of one conversation (oasst1).

    Raises:
      InputError: an unknown format, or the first bad row (file, line, reason) with the count of the others, and the
        formats that can read that row, when all rows were read.
    """
    for row, pairs in _read_all(rows, format, FORMATS):
        yield [Text(pair.source, pair.target, row.where) for pair in pairs]


def stream_chats(rows: Iterable[Row], format: str) -> Iterator[list[Chat]]:
    """The conversations of each row, for a chat template; see `stream_texts`."""
    readers = {name: _CHATS.get(name) or chats.from_pairs(read) for name, read in FORMATS.items()}
    return (made for _, made in _read_all(rows, format, readers))


def _read_all(rows: Iterable[Row], format: str, readers: dict[str, Callable[[Row], Any]]) -> Iterator[tuple[Row, Any]]:
    check_format(format)
    problems = Problems()
    first_bad: Row | None = None
    for row in _GATHER[format](list(rows)) if format in _GATHER else rows:
        try:
            made = readers[format](row)
        except InputError as error:
            problems.add(str(error))
            first_bad = first_bad or row
            continue
        if first_bad is None:
            yield row, made
    problems.raise_if_any(_fitting(first_bad, readers) if first_bad else "")


def _fitting(row: Row, readers: dict[str, Callable[[Row], Any]]) -> str:
    """The formats that read a row, as the end of an error."""
    names = [name for name, read in readers.items() if name != "longform" and _reads(read, row)]
    return f"; data.format={' or '.join(names)} reads it" if names else ""


def _reads(read: Callable[[Row], Any], row: Row) -> bool:
    try:
        return bool(read(row))
    except InputError:
        return False
