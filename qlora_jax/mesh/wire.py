"""Bytes that a compiled program of several devices sends between them, read from XLA's text of it.

    all-gather       a device receives the parts of the others: (n - 1) / n of what it gives
    reduce-scatter   the same of what it takes
    all-reduce       twice that: scattered, then gathered
"""

import math
import re
from collections import Counter

ENTRY = "ENTRY "
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(r"= (.*?) (all-gather|reduce-scatter|all-reduce)(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[(\d+),(\d+)\]|mesh\[([^\]]*)\] \{([^}]*)\})")
_LOOP = re.compile(r' while\(.*body=%?([\w.\-]+)')
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations)=\{?(%?[\w.\-]+(?:, ?%?[\w.\-]+)*)")
_BITS = {"pred": 8, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32,
         "s64": 64, "u64": 64, "f64": 64}  # fmt: skip


def wire_bytes(text: str) -> Counter[str]:
    """Bytes that one device receives in a run of the program, by XLA's operation and the dtype of what travels.

    Loops count by the turns that XLA knows; one whose length the data decide counts as one turn.

    Args:
      text: `as_text()` of a compiled program.
    """
    lines, found = computations(text), Counter[str]()

    def add(name: str, times: int) -> None:
        for line in lines.get(name, ()):
            if match := _COLLECTIVE.search(line):
                for dtype, size in _received(match, line).items():
                    found[f"{match[2]} {dtype}"] += times * size
            if match := _LOOP.search(line):
                turns = _TURNS.search(line)
                add(match[1], times * (int(turns[1]) if turns else 1))
            elif match := _CALLED.search(line):
                for called in match[1].split(","):
                    add(called.strip().lstrip("%"), times)

    add(next(name for name in lines if name.startswith(ENTRY)), 1)
    return found


def computations(text: str) -> dict[str, list[str]]:
    """The lines of each of a program's computations by its name, before which ENTRY stands where it begins."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = found[(ENTRY if line.startswith(ENTRY) else "") + match[1]] = []
        else:
            current.append(line)
    return found


def _received(match: re.Match[str], line: str) -> Counter[str]:
    """dtype -> bytes of one execution of a collective."""
    n = _group_size(line)
    result, kind, is_start = match[1], match[2], match[3]
    arrays = _ARRAY.findall(result)
    if is_start and (kind != "all-reduce" or result.startswith("((")):
        arrays = arrays[len(arrays) // 2 :]  # it lists what it takes, and then what it will give
    sizes: Counter[str] = Counter()
    for dtype, shape in arrays:
        size = math.prod(int(d) for d in shape.split(",") if d) * _BITS.get(dtype, 32) // 8
        whole = size * n if kind == "reduce-scatter" else size
        sizes[dtype] += whole * (n - 1) // n * (2 if kind == "all-reduce" else 1)
    return sizes


def _group_size(line: str) -> int:
    """Devices among which a collective goes, in any of the forms in which XLA writes its groups."""
    groups = _GROUPS.search(line)
    if groups is None:
        return 1
    if groups[1]:
        return len(groups[1].split(","))
    if groups[3]:
        return int(groups[3])
    sizes = dict(part.split("=") for part in groups[4].split(","))
    return math.prod(int(sizes[name]) for name in groups[5].split(","))
