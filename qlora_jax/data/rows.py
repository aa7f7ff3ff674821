"""One row of a data file with the place it came from, and the collecting of what is wrong with rows.

A run must not start on a broken file, and a broken file often has more than one bad line: so the reading goes on
after the first and the error says how many there are.
"""

import dataclasses
from typing import Any

from qlora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a data set. `number` counts from 1: the line where the row begins, or the row of a Parquet file."""

    file: str
    number: int
    fields: dict[str, Any]
    unit: str = "line"  # what `number` counts: "line" or "row"

    @property
    def where(self) -> str:
        """The place as errors name it: `FILE, line N`."""
        return f"{self.file}, {self.unit} {self.number}"


class Problems:
    """Keeps the first bad line and counts the rest."""

    def __init__(self) -> None:
        self.first = ""
        self.count = 0

    def add(self, message: str) -> None:
        """`message` is a whole line: `FILE, line N: reason`."""
        self.first = self.first or message
        self.count += 1

    def raise_if_any(self, hint: str = "") -> None:
        """Raises InputError with the first message, `hint` and the number of others."""
        if self.count > 1:
            more = self.count - 1
            rows = "row" if more == 1 else "rows"
            raise InputError(f"{self.first}{hint} (and {more} more bad {rows} in this data set)")
        if self.count:
            raise InputError(self.first + hint)
