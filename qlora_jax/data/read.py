"""Rows of a data set: a local file (.json, .jsonl, .csv, .tsv, .parquet, the text ones also .gz) or a hub data set.

Everything is read and checked before anything is trained: a bad line found at step 900 is dearer than the seconds of
reading them all. Rows come one by one, and no more of a file than a line, or a thousand rows of Parquet, is in memory;
a .json file that is one list, or one object, is the exception: it is read whole.
"""

import csv
import difflib
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qlora_jax.data import hub
from qlora_jax.data.json_text import is_lines, json_rows, line_rows
from qlora_jax.data.known import KNOWN_SETS
from qlora_jax.data.rows import Problems, Row
from qlora_jax.data.task_lists import is_task_list, lists_in, task_files
from qlora_jax.embedded import DATA, located
from qlora_jax.errors import InputError

TEXT_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", *(suffix + ".gz" for suffix in TEXT_SUFFIXES))


_PARQUET_ROWS = 1024  # that are Python objects at a time


def read_rows(path: str, revision: str = "main", columns: Sequence[str] = ()) -> list[Row]:
    """All rows of a data set, in file order, each with its place; see `stream_rows`."""
    return [row for label, file in data_files(path, revision) for row in stream_rows(file, label, columns)]


def data_sets(paths: str | Sequence[str]) -> tuple[str, ...]:
    """The names of the data sets that data.path gives: one, several with commas between them, or a list of them.

    Raises InputError for a name that is empty, or no text.
    """
    if not isinstance(paths, str | list | tuple) or not all(isinstance(path, str) for path in paths):
        raise InputError(f"{paths!r} names no data set; expected text, names with commas, or a list of names")
    if isinstance(paths, str):
        if not paths.strip() or os.path.isfile(os.path.expanduser(paths)):  # a file's name may have commas
            return (paths,) if paths.strip() else ()
        paths = paths.split(",")
    names = tuple(path.strip() for path in paths)
    if "" in names:
        raise InputError(f"an empty name among the data sets {', '.join(names)}; expected names with commas, as a,b")
    return names


def data_files(path: str, revision: str = "main", most: int | None = None) -> list[tuple[str, Path]]:
    """The files of a data set, each with its name in errors (a hub file's path in the cache would say nothing).

    Args:
      path: a local file, a list of tasks (data/task_lists), a hub data set as `owner/name` (its train split) or
        `owner/name:file` (that file, or those of a pattern as `data/*.parquet`), or a name of KNOWN_SETS.
      revision: branch, tag or commit of a hub data set; without meaning for a local file.
      most: of a hub data set no more than the first `most` files are fetched.

    Raises:
      InputError: the file is missing, or the hub has no such data set.
    """
    if not str(path).strip():
        raise InputError("no data set given: set data.path to a file or a hub data set's name (owner/name)")
    local = located(str(path), DATA)
    if local.is_file():
        return task_files(local, str(path)) if is_task_list(str(path)) else [(str(path), local)]
    if local.is_dir():
        raise InputError(f"{path} is a folder, expected a file{lists_in(local) or _listing(local)}")
    if path in KNOWN_SETS:
        return [file for name in KNOWN_SETS[path].names(path) for file in data_files(name, revision)]
    if is_on_hub(path):
        return list(hub.dataset_files(path, revision, SUFFIXES, most))
    known = f"; data sets known by name: {', '.join(KNOWN_SETS)}" if "/" not in path and "." not in path else ""
    raise InputError(f"{path}: no such file{_near_names(local)}{known}")


def data_shards(path: str, revision: str = "main") -> list[hub.Shard]:
    """The files of a data set for which `is_on_hub` holds, none of them fetched. Raises InputError as `data_files`."""
    names = KNOWN_SETS[path].names(path) if path in KNOWN_SETS else (path,)
    return [shard for name in names for shard in hub.shards(name, revision, SUFFIXES)]


def is_on_hub(path: str) -> bool:
    """Whether a name stands for a data set of the hub, or of one known by name, and not for a file."""
    if Path(path).expanduser().exists():
        return False
    is_file = path.lower().endswith(SUFFIXES) and ":" not in path
    return path in KNOWN_SETS or (hub.looks_like_dataset(path) and not is_file)


def stream_rows(
    path: Path, label: str, columns: Sequence[str] = (), quoted: bool = True, torn: list[str] | None = None
) -> Iterator[Row]:
    """Rows of one file, one after the other.

    Args:
      path, label: of `data_files`.
      columns: names of the columns of .tsv files that have neither header nor quoting; () where they have a header.
      quoted: False: in .tsv files that have a header a quotation mark is a letter too, and .txt files are such.
      torn: takes the places of lines of a .tsv file without quoting that have another number of fields; None: these
        are errors.

    Raises:
      InputError: the file is empty, of an unknown kind, cut off, not UTF-8, or has a bad line: then at the end of the
        file, with the number of bad lines.
    """
    suffixes = (*SUFFIXES, ".txt") if not quoted else SUFFIXES
    kind = next((name for name in (label.lower(), path.name.lower()) if name.endswith(suffixes)), "")
    suffix = next((s for s in suffixes if kind.removesuffix(".gz").endswith(s)), "").replace(".txt", ".tsv")
    if not suffix:
        raise InputError(f"{label}: unknown kind of file, expected one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise InputError(f"{label} is empty (0 bytes)")
    is_parquet = suffix == ".parquet"
    rows = _parquet_rows(path, label) if is_parquet else _text_rows(path, label, suffix, columns, quoted, torn)
    found = False
    for row in rows:
        found = True
        yield row
    if not found:
        raise InputError(f"{label} has no rows")


def _text_rows(
    path: Path, label: str, suffix: str, columns: Sequence[str], quoted: bool = True, torn: list[str] | None = None
) -> Iterator[Row]:
    # of JSON a line ends at \n alone; of .csv the csv module decides
    is_plain = suffix == ".tsv" and (bool(columns) or not quoted)
    newline = "" if suffix in (".csv", ".tsv") and not is_plain else "\n"
    if suffix == ".json":
        with _open_text(path, label, newline) as file:
            suffix = ".jsonl" if is_lines(file) else suffix
    with _open_text(path, label, newline) as file:
        if suffix == ".json":
            text = file.read()
            yield from json_rows(label, text) if text.strip() else ()
        elif suffix == ".jsonl":
            yield from line_rows(label, file)
        elif is_plain:
            yield from _plain_tsv_rows(label, file, columns, torn)
        else:
            yield from _csv_rows(label, file, "," if suffix == ".csv" else "\t")


@contextmanager
def _open_text(path: Path, label: str, newline: str) -> Iterator[IO[str]]:
    """The file as text; what goes wrong while it is read is an InputError."""
    try:
        with _open_bytes(path, label) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(
            f"{label}, line {_undecodable_line(path, label)}: not UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{label}: damaged or cut off gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise InputError(f"{label}: cannot be read: {error.strerror or error}") from error


def _open_bytes(path: Path, label: str) -> IO[bytes]:
    raw = path.open("rb")
    # By content too: browsers and proxies unpack .gz files and keep the name.
    is_packed = label.lower().endswith(".gz") and raw.peek(2)[:2] == b"\x1f\x8b"
    return gzip.open(raw) if is_packed else raw  # type: ignore[return-value]


def _undecodable_line(path: Path, label: str) -> int:
    """The first line that is not UTF-8: decoding says which byte of a piece it was, not which line of the file."""
    number = 0
    try:
        with _open_bytes(path, label) as raw:
            for line in raw:
                number += 1
                line.decode()
    except UnicodeDecodeError:
        return number
    except (EOFError, zlib.error, OSError):  # a packed file that is damaged further on
        return number + 1
    raise AssertionError(f"{label} is UTF-8 line by line")


def _csv_rows(label: str, file: IO[str], delimiter: str) -> Iterator[Row]:
    """Rows under a header line; fields may be quoted and hold line breaks. A short or long row is an error."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    problems = Problems()
    header: list[str] | None = None
    begins = 1
    try:
        for values in reader:
            if values and header is None:
                header = _csv_header(label, begins, values)
            elif values and len(values) != len(header or ()):
                expected = len(header or ())
                problems.add(f"{label}, line {begins}: {len(values)} fields, expected {expected} as in the header")
            elif values:
                yield Row(label, begins, dict(zip(header or (), values, strict=True)))
            begins = reader.line_num + 1
    except csv.Error as error:
        problems.add(f"{label}, line {begins}: {error}")
    problems.raise_if_any()


def _plain_tsv_rows(
    label: str, file: IO[str], columns: Sequence[str], torn: list[str] | None = None
) -> Iterator[Row]:
    """Rows without quoting: a quotation mark is a letter. Without `columns` the first line is a header. Lines that are
    blank are passed over."""
    problems = Problems()
    for number, line in enumerate(file, 1):
        values = line.removesuffix("\n").removesuffix("\r").split("\t")
        if not columns:
            columns = _csv_header(label, number, values) if line.strip() else ()
        elif len(values) == len(columns):
            yield Row(label, number, dict(zip(columns, values, strict=True)))
        elif line.strip() and torn is not None:
            torn.append(f"{label}, line {number}")
        elif line.strip():
            names = ", ".join(columns)
            problems.add(f"{label}, line {number}: {len(values)} fields between tabs, expected {len(columns)}: {names}")
    problems.raise_if_any()


def _csv_header(label: str, line: int, names: list[str]) -> list[str]:
    names = [name.strip() for name in names]
    if len(set(names)) < len(names) or "" in names:
        raise InputError(f"{label}, line {line}: expected a header of distinct field names, found {', '.join(names)}")
    return names


def _parquet_rows(path: Path, label: str) -> Iterator[Row]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(label, number, fields, "row")
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # of values, too
        reason = str(error).split("\n")[0]
        raise InputError(f"{label}: not a readable Parquet file: {reason}") from error


def _near_names(path: Path) -> str:
    """What a missing path may have meant: near names of its folder, or the folder's data files."""
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder})"
    names = [entry.name for entry in folder.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(str(folder / name) for name in near)}?"
    return _listing(folder)


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.lower().endswith(SUFFIXES))
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"; data files in {folder}: {', '.join(names[:10])}{more}" if names else f"; {folder} has no data files"
