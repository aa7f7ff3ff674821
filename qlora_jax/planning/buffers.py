"""XLA's buffer assignment of a compiled program, read from the text that XLA dumps when asked to.

    allocation 42: size 1390980376, preallocated-temp:
     value: <9276 loop_broadcast_fusion.11 @0> (size=90177536,offset=0): f32[32,64,11008]{2,1,0}

Values of one allocation may share a place; two that do never live at the same time.
"""

import math
import re
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

_ALLOCATION = re.compile(r"allocation (\d+): size (\d+), (.*):$")
_VALUE = re.compile(r"\s*value: <\d+ (\S+).* @\d+> \(size=(\d+),offset=(\d+)\): (\w+)\[([\d,]*)\]")


class Value(NamedTuple):
    """One array of the program, and where it lies."""

    name: str  # of the instruction that makes it
    allocation: int
    is_parameter: bool
    offset: int
    bytes: int
    dtype: str  # XLA's: f32, bf16, u8, ...
    shape: tuple[int, ...]


def compile_with_values(compile: Callable[[dict[str, str]], Any]) -> tuple[Any, list[Value]]:
    """Calls `compile` with compiler options that make XLA dump; returns its result and the program's values."""
    with tempfile.TemporaryDirectory(prefix="xla-dump-") as folder:
        compiled = compile({"xla_dump_to": folder})
        texts = [path.read_text() for path in Path(folder).glob("*after_optimizations-buffer-assignment.txt")]
    if len(texts) != 1:
        raise RuntimeError(f"XLA wrote {len(texts)} buffer assignments for one program, expected 1")
    return compiled, read_values(texts[0])


def read_values(text: str) -> list[Value]:
    """Every value of a buffer assignment's dump."""
    values, allocation, is_parameter = [], -1, False
    for line in text.splitlines():
        if match := _ALLOCATION.match(line):
            allocation, is_parameter = int(match[1]), "parameter" in match[3]
        elif match := _VALUE.match(line):
            shape = tuple(int(size) for size in match[5].split(",") if size)
            values.append(Value(match[1], allocation, is_parameter, int(match[3]), int(match[2]), match[4], shape))
    return values


def largest_scores(values: list[Value], T: int) -> int:
    """Bytes of the largest array that has a row's T queries and its T keys; 0 where there is none."""
    return max((value.bytes for value in values if not value.is_parameter and value.shape.count(T) > 1), default=0)


def most_bytes_at_once(values: list[Value], dtype: str, elements: Collection[int]) -> int:
    """What arrays of this dtype, of one of these sizes, may take at once besides the program's parameters.

    Arrays whose places overlap never live together; so it is the most bytes of places that are apart from each other.
    """
    places = {
        (value.allocation, value.offset + value.bytes, value.bytes)
        for value in values
        if not value.is_parameter and value.dtype == dtype and math.prod(value.shape) in elements
    }
    most = [((-1, 0), 0)]  # (allocation, end): the most bytes of places that end there or before
    for allocation, end, size in sorted(places):
        before = max(bytes for place, bytes in most if place <= (allocation, end - size))
        most.append(((allocation, end), max(most[-1][1], before + size)))
    return most[-1][1]
