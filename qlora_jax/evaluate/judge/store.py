"""The file of verdicts: JSONL to which each verdict is appended at once, and what of it a later run can use.

A row is a judge file's row (tournament/verdicts) and says how it came about: protocol, prompts (hash of the prompt's
words), temperature, max_tokens, request (hash of all that was sent), finish_reason and the tokens that were paid for.
"""

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from qlora_jax.data.json_text import jsonl_rows
from qlora_jax.errors import InputError

SETTINGS = ("benchmark", "judge", "protocol", "temperature", "max_tokens", "prompts")
BEGINNING = b'{"benchmark": '  # of every row


class VerdictFile:
    """`with VerdictFile(path) as file: file.append(row)`; `rows` are those that were there.

    An empty file does not stay.
    Raises InputError where the file is no file of verdicts of ours, a row is broken, or another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.repaired = 0  # bytes of a half-written last line that were cut off
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            self._lock()
            data = path.read_bytes()
            self.rows, keep, ending = read_back(path, data)
            if keep < len(data):
                self.repaired = len(data) - keep
                os.ftruncate(self._file, keep)
            if ending:
                self._write(ending)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "VerdictFile":
        return self

    def __exit__(self, *_: object) -> None:
        if os.fstat(self._file).st_size == 0:
            self.path.unlink(missing_ok=True)
        os.close(self._file)

    def append(self, row: dict[str, Any]) -> None:
        """The row is on the disk when this returns. Raises InputError where it cannot be; no part of it stays then."""
        self._write(json.dumps(row).encode() + b"\n")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{self.path} is being written by another process: wait for it") from error
        except OSError:
            pass  # a file system without locks

    def _write(self, data: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            raise InputError(f"{self.path}: cannot be written: {error.strerror}; run again to go on") from error


def read_back(path: Path, data: bytes) -> tuple[list[dict[str, Any]], int, bytes]:
    """Rows of a file, how many of its bytes are whole rows, and what these need as an ending.

    Raises InputError for a row that no run of this command wrote.
    """
    whole, last = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
    ending = b""
    if last:
        if _is_row(last):
            whole, ending = data, b"\n"
        elif not whole and not (last.startswith(BEGINNING) or BEGINNING.startswith(last)):
            raise InputError(f"{path} is no file of verdicts; choose another --out")
    try:
        text = whole.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no file of verdicts (not UTF-8); choose another --out") from error
    rows = jsonl_rows(str(path), text)
    for row in rows:
        missing = [
            name for name in (*SETTINGS, "first", "second", "item_id", "score", "request") if name not in row.fields
        ]
        if missing:
            raise InputError(f"{row.where}: no {missing[0]}: not written by this command; choose another --out")
    return [row.fields for row in rows], len(whole), ending


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
