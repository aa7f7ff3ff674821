"""JSON with line numbers: where in the file every row begins, which `json.loads` does not tell. A key that stands twice
in one object is an error here: which of the two is meant nobody knows, and `json.loads` drops the first.

Three shapes are in use under the name .json: a list of objects, an object whose "data" is such a list, and one
object a line. All three are read here; the last is also what .jsonl means.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from qlora_jax.data.rows import Problems, Row
from qlora_jax.errors import InputError


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return made


_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}


class _Scanner:
    """A position in a JSON text that knows its line."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text
        self.at = 0
        self._line, self._counted = 1, 0

    def line(self) -> int:
        """The line of the present position, counted from the last one asked for: linear over the whole file."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def skip_space(self) -> str:
        """Goes to the next character that is not white space and returns it ("" at the end)."""
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
        return self.text[self.at : self.at + 1]

    def expect(self, characters: str) -> str:
        found = self.skip_space()
        if not found or found not in characters:
            wanted = " or ".join(repr(c) for c in characters)
            self.fail(f"expected {wanted}, found {repr(found) if found else 'the end of the file'}")
        self.at += 1
        return found

    def value(self) -> Any:
        try:
            decoded, self.at = _DECODER.raw_decode(self.text, self.at)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                self.at = error.pos
            self.fail(_reason(error))
        return decoded

    def end(self) -> None:
        if self.skip_space():
            self.fail("text after the end of the JSON value")

    def fail(self, reason: str) -> NoReturn:
        raise InputError(f"{self.file}, line {self.line()}: {reason}")


def loads(text: str) -> Any:
    """The value of a JSON text. Raises ValueError as json.loads does, and for a key that stands twice."""
    return _DECODER.decode(text)


def json_rows(file: str, text: str) -> list[Row]:
    """Rows of a .json text in any of the three shapes. Raises InputError naming file, line and reason."""
    scanner = _Scanner(file, text)
    first = scanner.skip_space()
    if first == "[":
        rows = _list_rows(scanner)
        scanner.end()
        return rows
    if first != "{":
        scanner.fail(f"expected a list of objects, or one object a line; found {first!r}")
    first_line, _, rest = text[scanner.at :].partition("\n")
    if rest.strip() and _is_whole_object(first_line):
        return jsonl_rows(file, text)
    return _data_rows(scanner)


def _is_whole_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _list_rows(scanner: _Scanner) -> list[Row]:
    rows: list[Row] = []
    problems = Problems()
    scanner.expect("[")
    if scanner.skip_space() == "]":
        scanner.at += 1
        return rows
    while True:
        scanner.skip_space()
        line = scanner.line()
        value = scanner.value()
        if isinstance(value, dict):
            rows.append(Row(scanner.file, line, value))
        else:
            problems.add(f"{scanner.file}, line {line}: expected an object, found {_kind(value)}")
        if scanner.expect(",]") == "]":
            break
    problems.raise_if_any()
    return rows


def _data_rows(scanner: _Scanner) -> list[Row]:
    """Rows of `{"data": [...]}`; other keys beside it are passed over."""
    rows: list[Row] | None = None
    others: dict[str, Any] = {}
    start = scanner.line()
    scanner.expect("{")
    closed = scanner.skip_space() == "}"
    scanner.at += closed
    while not closed:
        scanner.skip_space()
        key = scanner.value()
        if not isinstance(key, str):
            scanner.fail(f"expected a key in double quotes, found {_kind(key)}")
        if key in others or (key == "data" and rows is not None):
            scanner.fail(f"the key {key!r} stands twice in one object")
        scanner.expect(":")
        if key == "data" and scanner.skip_space() == "[":
            rows = _list_rows(scanner)
        else:
            scanner.skip_space()
            others[key] = scanner.value()
        closed = scanner.expect(",}") == "}"
    scanner.end()
    if rows is None:
        # One object alone: the shortest file of one object a line.
        return [Row(scanner.file, start, others)]
    return rows


def is_lines(lines: Iterable[str]) -> bool:
    """Whether a .json file is one object a line: the first line is an object, and there is a second. Reads no further.

    A single object alone is left to `json_rows`.
    """
    written = (line for line in lines if line.strip())
    first = next(written, "")
    return first.lstrip().startswith("{") and _is_whole_object(first) and next(written, None) is not None


def jsonl_rows(file: str, text: str) -> list[Row]:
    """Rows of one object a line; see `line_rows`."""
    # Not splitlines(): a JSON string may hold U+2028 and its kind unescaped.
    return list(line_rows(file, text.split("\n")))


def line_rows(file: str, lines: Iterable[str]) -> Iterator[Row]:
    """Rows of one object a line; blank lines are passed over. Raises InputError with the first bad line and a count,
    after the last."""
    problems = Problems()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = loads(line.removesuffix("\n"))
        except (ValueError, RecursionError) as error:
            problems.add(f"{file}, line {number}: {_reason(error)}")
            continue
        if isinstance(value, dict):
            yield Row(file, number, value)
        else:
            problems.add(f"{file}, line {number}: expected an object, found {_kind(value)}")
    problems.raise_if_any()


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (column {error.colno})"
    return "JSON nested too deeply to read" if isinstance(error, RecursionError) else f"not valid JSON: {error}"


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a number")
