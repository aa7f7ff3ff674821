"""From the rows of a data set to texts: what is given, and what is learned.

A format is one function of a row that gives its examples, entered in FORMATS by its name in the config. It raises
InputError naming file, line and field when the row is not of the format, and gives none for a row that rightly has
nothing to learn.
"""

import dataclasses
from collections.abc import Callable, Sequence

from qlora_jax.data import conversations, instructions
from qlora_jax.data.fields import Pair
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
    check_format(format)
    texts: list[Text] = []
    left_out = 0
    problems = Problems()
    first_bad: Row | None = None
    for row in _GATHER.get(format, list)(rows):
        try:
            pairs = FORMATS[format](row)
        except InputError as error:
            problems.add(str(error))
            first_bad = first_bad or row
            continue
        left_out += not pairs
        texts.extend(Text(pair.source, pair.target, row.where) for pair in pairs)
    problems.raise_if_any(_fitting(first_bad) if first_bad else "")
    return texts, left_out


def _fitting(row: Row) -> str:
    """The formats that read a row, as the end of an error."""
    names = [name for name, read in FORMATS.items() if name != "longform" and _reads(read, row)]
    return f"; data.format={' or '.join(names)} reads it" if names else ""


def _reads(read: Callable[[Row], list[Pair]], row: Row) -> bool:
    try:
        return bool(read(row))
    except InputError:
        return False
