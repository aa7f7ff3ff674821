"""Rows of a data set: a local file (.json, .jsonl, .csv, .tsv, .parquet, the text ones also .gz) or a hub data set.

Everything is read and checked before anything is trained: the files of this field fit in memory, and a bad line
found at step 900 is dearer than the seconds of reading them all.
"""

import csv
import difflib
import gzip
import io
import zlib
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.data import hub
from qlora_jax.data.json_text import json_rows, jsonl_rows
from qlora_jax.data.known import KNOWN_SETS
from qlora_jax.data.rows import Problems, Row
from qlora_jax.errors import InputError

TEXT_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", *(suffix + ".gz" for suffix in TEXT_SUFFIXES))


def read_rows(path: str, revision: str = "main", columns: Sequence[str] = ()) -> list[Row]:
    """All rows of a data set, in file order, each with its place.

    Args:
      path: a local file, a hub data set as `owner/name` (its train split) or `owner/name:file` (that file), or a name
        of KNOWN_SETS.
      revision: branch, tag or commit of a hub data set; without meaning for a local file.
      columns: names of the columns of .tsv files that have neither header nor quoting; () where they have a header.

    Raises:
      InputError: the file is missing, empty, of an unknown kind, cut off, not UTF-8, or has a bad line.
    """
    if not str(path).strip():
        raise InputError("no data set given: set data.path to a file or a hub data set's name (owner/name)")
    local = Path(path).expanduser()
    if local.is_file():
        return _file_rows(local, str(path), columns)
    if local.is_dir():
        raise InputError(f"{path} is a folder, expected a file{_listing(local)}")
    if path in KNOWN_SETS:
        return [row for name in KNOWN_SETS[path].names(path) for row in read_rows(name, revision, columns)]
    if hub.looks_like_dataset(path) and not (path.lower().endswith(SUFFIXES) and ":" not in path):
        files = hub.dataset_files(path, revision, SUFFIXES)
        return [row for label, file in files for row in _file_rows(file, label, columns)]
    known = f"; data sets known by name: {', '.join(KNOWN_SETS)}" if "/" not in path and "." not in path else ""
    raise InputError(f"{path}: no such file{_near_names(local)}{known}")


def _file_rows(path: Path, label: str, columns: Sequence[str] = ()) -> list[Row]:
    """Rows of one file; `label` is its name in errors (a hub file's path in the cache would say nothing)."""
    name = label.lower().removesuffix(".gz")
    suffix = next((s for s in SUFFIXES if name.endswith(s)), "")
    if not suffix or not label.lower().endswith(SUFFIXES):
        raise InputError(f"{label}: unknown kind of file, expected one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise InputError(f"{label} is empty (0 bytes)")
    if suffix == ".parquet":
        rows = _parquet_rows(path, label)
    else:
        text = _decode(_file_bytes(path, label), label)
        if suffix == ".tsv" and columns:
            rows = _plain_tsv_rows(label, text, columns)
        elif suffix in (".csv", ".tsv"):
            rows = _csv_rows(label, text, "," if suffix == ".csv" else "\t")
        elif text.strip():
            rows = (json_rows if suffix == ".json" else jsonl_rows)(label, text)
        else:
            rows = []
    if not rows:
        raise InputError(f"{label} has no rows")
    return rows


def _file_bytes(path: Path, label: str) -> bytes:
    try:
        data = path.read_bytes()
        # By content too: browsers and proxies unpack .gz files and keep the name.
        return gzip.decompress(data) if label.lower().endswith(".gz") and data[:2] == b"\x1f\x8b" else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{label}: damaged or cut off gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise InputError(f"{label}: cannot be read: {error.strerror or error}") from error


def _decode(data: bytes, label: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise InputError(f"{label}, line {line}: not UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8") from error


def _csv_rows(label: str, text: str, delimiter: str) -> list[Row]:
    """Rows under a header line; fields may be quoted and hold line breaks. A short or long row is an error."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
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
                rows.append(Row(label, begins, dict(zip(header or (), values, strict=True))))
            begins = reader.line_num + 1
    except csv.Error as error:
        problems.add(f"{label}, line {begins}: {error}")
    problems.raise_if_any()
    return rows


def _plain_tsv_rows(label: str, text: str, columns: Sequence[str]) -> list[Row]:
    """Rows without header or quoting: a quotation mark is a letter. Lines that are blank are passed over."""
    rows: list[Row] = []
    problems = Problems()
    for number, line in enumerate(text.split("\n"), 1):
        values = line.removesuffix("\r").split("\t")
        if len(values) == len(columns):
            rows.append(Row(label, number, dict(zip(columns, values, strict=True))))
        elif line.strip():
            names = ", ".join(columns)
            problems.add(f"{label}, line {number}: {len(values)} fields between tabs, expected {len(columns)}: {names}")
    problems.raise_if_any()
    return rows


def _csv_header(label: str, line: int, names: list[str]) -> list[str]:
    names = [name.strip() for name in names]
    if len(set(names)) < len(names) or "" in names:
        raise InputError(f"{label}, line {line}: expected a header of distinct field names, found {', '.join(names)}")
    return names


def _parquet_rows(path: Path, label: str) -> list[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{label}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{label}: not a readable Parquet file: {reason}") from error
    return [Row(label, number, fields, "row") for number, fields in enumerate(table.to_pylist(), 1)]


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
