"""Verdicts of judges: the paper's pairwise CSV, its released rating files, and judge files of our own.

A verdict is one row: a judge saw the answers of two systems to one item, `first` before `second`, and gave a score.

    three-class  1 the first answer is better, 2 the second, 3 a tie, -1 the judge's text could not be parsed
    relative     [a, b], points of the first and of the second answer (1 to 10 in the paper); -1 or [-1, -1] unparsed

Files, told apart by their fields:

    pairwise CSV    benchmark, first, second, item_id, score (three-class)
    judge JSONL     the same five fields (question_id may stand for item_id), score of either protocol, and optionally
                    judge, category, text (what the judge wrote)
    annotations     of people: question, first, second, annotator, verdict (CSV or JSONL; system_1 and system_2 may
                    stand for first and second, question_id or item_id for question). A verdict is a three-class score,
                    one of the words first, second and tie, or the name of the better system
    ratings JSONL   as released with the paper: question_id, answer1_id, answer2_id, score. The systems stand in the
                    file's name, A-...-vs-B-...jsonl, which gives their order backwards for some files: an
                    answer id that a file of answers knows decides which of the two came first

A file of answers is JSONL with answer_id and model_id; the released ones lie in `generations` beside `ratings`.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.data.fields import number as number_of
from qlora_jax.data.read import read_rows
from qlora_jax.data.rows import Problems, Row
from qlora_jax.errors import InputError

PROTOCOLS = ("threeclass", "relative")
FIRST, SECOND, TIE, UNPARSED = 1, 2, 3, -1
ANY = "any"  # benchmark of what does not name one
COLUMNS = ("benchmark", "first", "second", "item_id", "score")
RATING_FIELDS = ("question_id", "answer1_id", "answer2_id", "score")
SUFFIXES = (".csv", ".jsonl", ".csv.gz", ".jsonl.gz")


ANNOTATION_FIELDS = ("question", "first", "second", "annotator", "verdict")
ALIASES = {"question_id": "question", "item_id": "question", "system_1": "first", "system_2": "second"}
WORDS = {"first": FIRST, "second": SECOND, "tie": TIE}


@dataclasses.dataclass(frozen=True)
class Verdict:
    benchmark: str  # ANY where a file does not name one
    first: str  # system whose answer the judge saw first
    second: str
    item: str
    score: int | tuple[float, float]  # three-class, or relative; UNPARSED in both
    protocol: str  # of the file
    judge: str = ""
    category: str = ""


@dataclasses.dataclass(frozen=True)
class Read:
    verdicts: list[Verdict]
    notes: list[str]  # what was passed over or assumed, a line each


def read_verdicts(path: Path, answers: Sequence[Path] = ()) -> Read:
    """All verdicts of a file, or of the CSV and JSONL files of a folder.

    Args:
      path: a file, or a folder; files of a folder that hold no verdicts are passed over, with a note.
      answers: files of answers, or folders of them, that tell whose answer an id is; `generations` beside the folder
        of the verdicts is read too.
    Raises:
      InputError: a missing, empty or broken file, wrong columns, an unknown score, a folder without verdicts, or a
        rating file whose order of systems cannot be known.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected verdicts as CSV or JSONL")
    files = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if _is_data(entry))
    folder = path if path.is_dir() else path.parent
    beside = folder.resolve().parent / "generations"
    owners: dict[str, str] | None = None
    verdicts: list[Verdict] = []
    notes: list[str] = []
    for file in files:
        rows = read_rows(str(file))
        fields = rows[0].fields
        if all(name in fields for name in COLUMNS if name != "item_id") and {"item_id", "question_id"} & set(fields):
            verdicts += _named_verdicts(rows)
        elif all(name in _annotation(fields) for name in ANNOTATION_FIELDS):
            verdicts += _named_verdicts([_as_judged(row) for row in rows])
        elif all(name in fields for name in RATING_FIELDS):
            if owners is None:
                owners = read_answers([*answers, *([beside] if beside.is_dir() else [])])
            found, note = _rated_verdicts(file, rows, owners)
            verdicts += found
            notes += [note] if note else []
        elif path.is_dir():
            notes.append(f"{file.name}: passed over, not a file of verdicts")
        else:
            expected = (
                f"{', '.join(COLUMNS)} (or a released rating file's {', '.join(RATING_FIELDS)}, or people's "
                f"{', '.join(ANNOTATION_FIELDS)})"
            )
            raise InputError(f"{path}: found the columns {', '.join(map(str, fields))}; expected {expected}")
    if not verdicts:
        listing = ", ".join(file.name for file in files) or "no .csv or .jsonl file"
        raise InputError(f"{path} has no file of verdicts; found {listing}; expected columns {', '.join(COLUMNS)}")
    return Read(verdicts, notes)


def read_answers(paths: Iterable[Path]) -> dict[str, str]:
    """Answer id -> model id, of files of answers and of folders of them; files without answer ids say nothing.

    Raises InputError for a path that is not there or a broken file.
    """
    owners: dict[str, str] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; expected answers as JSONL with answer_id and model_id")
        for file in [path] if path.is_file() else sorted(filter(_is_data, path.iterdir())):
            for row in read_rows(str(file)):
                if row.fields.get("answer_id") and row.fields.get("model_id"):
                    owners[str(row.fields["answer_id"])] = str(row.fields["model_id"])
    return owners


def select(verdicts: Sequence[Verdict], protocol: str, benchmark: str | None) -> list[Verdict]:
    """The verdicts of one protocol and one benchmark, unparsed ones included.

    Args:
      benchmark: None stands for the only one there is.
    Raises:
      InputError: an unknown protocol, none of that protocol or benchmark, or several benchmarks to choose from.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"--protocol={protocol}: expected one of {', '.join(PROTOCOLS)}")
    of_protocol = [verdict for verdict in verdicts if verdict.protocol == protocol]
    if not of_protocol:
        found = Counter(verdict.protocol for verdict in verdicts)
        raise InputError(
            f"no {protocol} verdicts; found {_counts(found)}: choose with --protocol "
            "(relative scores are pairs [a, b], three-class scores one of 1, 2, 3, -1)"
        )
    benchmarks = Counter(verdict.benchmark for verdict in of_protocol if verdict.benchmark != ANY)
    if benchmark is None and len(benchmarks) > 1:
        raise InputError(f"there are several benchmarks, {_counts(benchmarks)}: choose one with --benchmark")
    chosen = [v for v in of_protocol if benchmark is None or v.benchmark in (ANY, benchmark)]
    if not chosen:
        raise InputError(f"--benchmark={benchmark}: no {protocol} games; the benchmarks are {_counts(benchmarks)}")
    return chosen


def _is_data(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def _counts(found: Counter[str]) -> str:
    return ", ".join(f"{name} ({count:,} games)" for name, count in sorted(found.items()))


def _annotation(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of an annotation under the names of ANNOTATION_FIELDS."""
    return {ALIASES.get(name, name): value for name, value in fields.items()}


def _as_judged(row: Row) -> Row:
    """An annotation with the fields of a judge file; its benchmark, if it has none, is any."""
    fields = _annotation(row.fields)
    verdict = str(fields["verdict"]).strip()
    names = {str(fields["first"]): FIRST, str(fields["second"]): SECOND}
    score = names.get(verdict, WORDS.get(verdict.lower(), fields["verdict"]))
    judged = {"benchmark": ANY, "item_id": fields["question"], "score": score, "judge": fields["annotator"]}
    return dataclasses.replace(row, fields=judged | fields)


def _named_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Rows that name their systems."""
    protocol = _protocol(rows)
    verdicts, problems = [], Problems()
    for row in rows:
        fields = row.fields
        item = fields.get("item_id", fields.get("question_id"))
        values = {"benchmark": fields.get("benchmark"), "first": fields.get("first"), "second": fields.get("second")}
        missing = [name for name, value in {**values, "item_id": item}.items() if value is None or value == ""]
        score = _score(fields.get("score"), protocol)
        if missing:
            problems.add(f"{row.where}: {', '.join(missing)} missing; expected {', '.join(COLUMNS)}")
        elif values["first"] == values["second"]:
            problems.add(f"{row.where}: first and second are both {values['first']!r}; expected two systems")
        elif score is None:
            problems.add(_bad_score(row, protocol))
        else:
            names = {name: str(value) for name, value in values.items()}
            extra = {name: str(fields.get(name) or "") for name in ("judge", "category")}
            verdicts.append(Verdict(**names, item=str(item), score=score, protocol=protocol, **extra))
    problems.raise_if_any()
    return verdicts


def _rated_verdicts(file: Path, rows: Sequence[Row], owners: dict[str, str]) -> tuple[list[Verdict], str]:
    """Rows of a released rating file, and a note where the file's name alone gave the order."""
    protocol = _protocol(rows)
    stem = file.name.removesuffix(".gz").removesuffix(".jsonl")
    names = _file_systems(stem)
    if names is None:
        raise InputError(f"{file}: its rows do not name the systems; expected a file name such as A-vs-B.jsonl")
    benchmark = re.search(r"-(vicuna|oa)-", stem)
    orders = {order for row in rows if (order := _order(row, names, owners)) is not None}
    note = ""
    if len(orders) > 1:
        raise InputError(f"{file}: its answer ids put {names[0]} first in some rows and {names[1]} in others")
    if not orders:
        if protocol == "relative":
            raise InputError(
                f"{file}: the name of a relative rating file may give the order backwards, and no answer id in it is "
                "known; give --answers=FILE, JSONL with answer_id and model_id of one of the two systems"
            )
        note = f"{file.name}: no answer id is known, so {names[0]} is taken as first, as the name has it"
    first, second = orders.pop() if orders else names
    verdicts, problems = [], Problems()
    for row in rows:
        score = _score(row.fields.get("score"), protocol)
        item = row.fields.get("question_id")
        if item is None:
            problems.add(f"{row.where}: question_id missing")
        elif score is None:
            problems.add(_bad_score(row, protocol))
        else:
            judge = str(row.fields.get("judge") or "")
            verdicts.append(
                Verdict(benchmark[1] if benchmark else ANY, first, second, str(item), score, protocol, judge)
            )
    problems.raise_if_any()
    return verdicts, note


def _file_systems(stem: str) -> tuple[str, str] | None:
    """The two systems of a rating file's name, as it orders them."""
    pair = re.sub(r"-gpt-?4-reviewer.*$", "", stem).split("-vs-")
    names = [re.sub(r"^answer[-_]|-(vicuna|oa)(-generations.*)?$", "", name) for name in pair]
    return (names[0], names[1]) if len(names) == 2 and names[0] != names[1] and all(names) else None


def _order(row: Row, names: tuple[str, str], owners: dict[str, str]) -> tuple[str, str] | None:
    """(first, second) of a row by its answer ids; None where neither is known."""
    for field, place in (("answer1_id", 0), ("answer2_id", 1)):
        owner = _letters(owners.get(str(row.fields.get(field)), ""))
        mine = [name for name in names if owner and owner.startswith(_letters(name))]
        if len(mine) == 1:
            other = names[1 - names.index(mine[0])]
            return (mine[0], other) if place == 0 else (other, mine[0])
    return None


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _protocol(rows: Sequence[Row]) -> str:
    """A file has one protocol: relative where a score is a pair."""
    return "relative" if any(isinstance(row.fields.get("score"), list) for row in rows) else "threeclass"


def _score(value: Any, protocol: str) -> int | tuple[float, float] | None:
    """None for what is no score of the protocol."""
    if isinstance(value, list):
        numbers = [number_of(part) for part in value]
        if protocol != "relative" or len(numbers) != 2 or None in numbers:
            return None
        a, b = (float(number) for number in numbers if number is not None)
        return UNPARSED if UNPARSED in (a, b) else (a, b) if a >= 0 and b >= 0 else None
    number = number_of(value)
    allowed = (UNPARSED,) if protocol == "relative" else (FIRST, SECOND, TIE, UNPARSED)
    return int(number) if number in allowed and number is not None else None


def _bad_score(row: Row, protocol: str) -> str:
    pair = "a pair of points [a, b] that are not negative, or -1 where unparsed"
    expected = pair if protocol == "relative" else "1 (first wins), 2 (second wins), 3 (tie) or -1 (unparsed)"
    return f"{row.where}: score {row.fields.get('score')!r}; expected {expected}"
