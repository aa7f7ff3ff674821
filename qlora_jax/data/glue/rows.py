"""Rows of GLUE as texts and a label, from the owners' .tsv files, the hub's Parquet or JSON.

In the owners' files a quotation mark is a letter: nothing is quoted. A label is a class's name or number; the hub
writes -1, and the owners nothing, where a test set's labels are hidden.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.data import fields
from qlora_jax.data.glue.tasks import Task
from qlora_jax.data.read import stream_rows
from qlora_jax.data.rows import Problems, Row
from qlora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Labelled:
    """One or two texts, and a class's number, or for a regression the number itself."""

    texts: tuple[str, ...]
    label: float
    where: str


def read_rows(task: Task, files: Sequence[tuple[str, Path]], torn: list[str], most: int = 0) -> Iterator[Labelled]:
    """All rows of files as `data_files` gives them, the first `most` (0: all).

    torn: gets the places of lines that are torn apart, for tasks whose files have such.

    Raises:
      InputError: the first row that is wrong with the count of the others, once all were read.
    """
    problems, found = Problems(), 0
    for label, file in files:
        lines = torn if task.torn_lines else None
        for row in stream_rows(file, label, task.headless if _is_tsv(label) else (), quoted=False, torn=lines):
            try:
                made = _labelled(task, row)
            except InputError as error:
                problems.add(str(error))
                continue
            if not problems.count:
                yield made
            found += 1
            if found == most:
                break
        if found == most > 0:
            break
    problems.raise_if_any()


def _is_tsv(label: str) -> bool:
    return label.lower().removesuffix(".gz").endswith((".tsv", ".txt"))


def _labelled(task: Task, row: Row) -> Labelled:
    whole = [form for form in task.forms if {*form[0]} <= row.fields.keys()]
    both = [form for form in whole if form[1] in row.fields]
    if not both:
        texts, label = (whole or task.forms)[0]
        missing = next(name for name in (*texts, label) if name not in row.fields)
        have = ", ".join(str(name)[:40] for name in list(row.fields)[:16])
        hidden = " (a test set, whose labels are hidden, has none)" if missing == label else ""
        raise InputError(
            f"{row.where}: no column {missing!r}{hidden}; rows of {task.name} have {', '.join((*texts, label))}, this "
            f"one has {have}"
        )
    columns, column = both[0]
    texts = tuple(fields.text(row, name) for name in columns)
    return Labelled(texts, _label(task, row, column), row.where)


def _label(task: Task, row: Row, column: str) -> float:
    """Raises InputError for what is no label of the task."""
    value: Any = row.fields[column]
    number = fields.number(value)
    if number == -1:
        raise InputError(
            f"{row.where}: {column} is -1, a hidden label of a test set: nothing is learned or measured from it; take "
            "the training or validation rows"
        )
    if not task.labels:
        if number is None:
            raise InputError(f"{row.where}: {column} is {value!r}; expected a number ({task.name} is a regression)")
        return number
    if isinstance(value, str) and value in task.labels:
        return task.labels.index(value)
    if number is None or number not in range(len(task.labels)):
        named = ", ".join(f"{name} ({place})" for place, name in enumerate(task.labels))
        raise InputError(f"{row.where}: {column} is {value!r}; labels of {task.name} are {named}")
    return int(number)
