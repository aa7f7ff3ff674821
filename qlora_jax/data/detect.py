"""Which format the rows of a data set have, found from its first rows: exactly one must read them all."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.data.fields import NoField, is_empty
from qlora_jax.data.formats import COLUMNS, FORMATS, Format
from qlora_jax.data.forms.columns import GIVEN, MEANING
from qlora_jax.data.forms.conversations import gather_messages, is_single_message
from qlora_jax.data.known import KNOWN_SETS
from qlora_jax.data.read import data_files, data_sets, stream_rows
from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError

AUTO = "auto"
_ROWS = 64  # that are looked at
_SAME = ("longform",)  # other names of a format
# a format that reads more rows than are meant for it -> those that are meant where they read the rows too
_GIVES_WAY = {
    "self-instruct": ("unnatural-instructions", "prompt-completion"),
    "text": tuple(name for name in FORMATS if name != "text"),
}


def find_format(path: str | Sequence[str], revision: str = "main") -> str:
    """The data.format of a data set, as `data_files` takes its name; of one known by name the format of its owners.
    Of a hub data set the first file is fetched.

    Of several (`data_sets`) the one that all have, or each one's, with commas between them.

    Raises:
      InputError: a data set cannot be read, no format reads its first rows, or more than one does.
    """
    found = [known_format(name) or format_of_file(*data_files(name, revision, 1)[0][::-1]) for name in data_sets(path)]
    if not found:
        raise InputError("no data set given: set data.path to a file or a hub data set's name (owner/name)")
    return found[0] if len(set(found)) == 1 else ",".join(found)


def known_format(path: str) -> str | None:
    """The format of a data set that is known by name."""
    return KNOWN_SETS[path].format if path in KNOWN_SETS and not Path(path).expanduser().exists() else None


def format_of_file(file: Path, label: str) -> str:
    """The data.format of one file; `label` is its name in errors. Raises InputError as `find_format` does."""
    headless = {format: columns for format, columns in COLUMNS.items() if ".tsv" in label.lower()}
    for format, columns in headless.items():
        try:
            rows = list(itertools.islice(stream_rows(file, label, columns), _ROWS))
        except InputError:
            continue
        if not _failure(format, rows):
            return format
    return format_of_rows(list(itertools.islice(stream_rows(file, label), _ROWS)))


def format_of_rows(rows: Sequence[Row]) -> str:
    """The data.format that reads all of some rows, the first ones of a data set, at least one.

    Raises InputError where there is none, or more than one.
    """
    if all(is_single_message(row) and "role" in row.fields for row in rows):
        gather_messages(rows)  # says what is wrong with them
        return "oasst1"
    failures = {name: _failure(name, rows) for name in FORMATS if name not in _SAME}
    fitting = [name for name, failure in failures.items() if failure is None]
    fitting = [name for name in fitting if _teaches(name, rows)] or fitting
    fitting = [name for name in fitting if not set(_GIVES_WAY.get(name, ())) & set(fitting)]
    said = {name for row in rows for name, value in row.fields.items() if not is_empty(value)}
    mine = {name: said & _columns(FORMATS[name]) for name in fitting}
    best = [name for name in fitting if not any(mine[name] < mine[other] for other in fitting)]
    if len(best) == 1:
        return best[0]
    file = rows[0].file
    if best:
        raise InputError(f"{file}: more than one format reads its rows: set data.format to {' or '.join(best)}")
    raise _nothing_fits(rows, {name: failure for name, failure in failures.items() if failure is not None})


def _nothing_fits(rows: Sequence[Row], failures: dict[str, tuple[int, InputError]]) -> InputError:
    """What the format says that comes nearest, or which fields there are and should be."""
    first = rows[0]
    near = {name: _likeness(FORMATS[name], first) for name in failures}
    nearest = max(near, key=lambda name: (failures[name][0], not isinstance(failures[name][1], NoField), near[name]))
    read, error = failures[nearest]
    if near[nearest] and (read or not isinstance(error, NoField)):
        return InputError(f"{error} (data.format={nearest} reads the most of the first rows, no format all of them)")
    found = ", ".join(str(name)[:40] for name in list(first.fields)[:12]) or "none"
    return InputError(
        f"{first.file}: no data.format reads its rows, whose fields are {found}. Name them as one does, for example "
        f"instruction, input and output (alpaca) or messages (chats); known formats: {', '.join(FORMATS)}"
    )


def _failure(name: str, rows: Sequence[Row]) -> tuple[int, InputError] | None:
    """How many rows a format reads before the first that it does not, and what it says of that; None: it reads all."""
    format = FORMATS[name]
    found = []
    for read in (format.read_chats, format.read_pairs):
        for number, row in enumerate(rows):
            try:
                read(row)
            except InputError as error:
                found.append((number, error))
                break
        else:
            return None
    return max(found, key=lambda failure: failure[0])


def _teaches(name: str, rows: Sequence[Row]) -> bool:
    format = FORMATS[name]
    for row in rows:
        for read in (format.read_chats, format.read_pairs):
            try:
                if read(row):
                    return True
            except InputError:
                continue
    return False


def _columns(format: Format) -> set[str]:
    return {*format.reads, *format.chats_read}


def _likeness(format: Format, row: Row) -> float:
    """How many of the row's fields the format reads, fewer where it knows many others."""
    own = {name for name in format.reads if name not in MEANING or name in GIVEN}
    shared = len(row.fields.keys() & own)
    return shared + shared / (1 + len(own))
