"""A JSONL file of answers that grows batch by batch and survives whatever ends its writer.

A batch is appended whole and flushed to the disk before the next begins. A killed writer leaves whole lines and perhaps
the beginning of one, which the next writer cuts off; it goes on after the last whole line. The settings that made the
answers stand beside the file, in FILE.settings.json: answers of two settings never share a file.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.files import take_lock, write_json
from qlora_jax.settings import differing_keys

MEND = "choose another --out, or begin anew with --overwrite"


@contextmanager
def _mistakes(path: Path) -> Iterator[None]:
    """What the disk refuses, in one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


class AnswerFile:
    """An open file of answers, locked against other writers.

    Args:
      settings: plain values by name, of everything that the answers depend on, prompts aside.
      overwrite: what the file has is thrown away.
      say: takes notes for the user.
    Attributes:
      rows: the answers in it.
    Raises:
      InputError: the file has answers by other settings, is no file of answers, or cannot be written.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], overwrite: bool = False, say: Callable[[str], None] = print
    ):
        self.path = path
        if path.exists() and not path.is_file():
            raise InputError(f"--out={path} is no plain file; expected a file to write JSONL to")
        with _mistakes(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            with _mistakes(path):
                self._begin(settings, overwrite, say)
        except BaseException:
            self.close()
            raise

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds answers; they are on the disk on return. Raises InputError when the disk does not take them."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        try:
            while data:
                data = data[os.write(self._handle, data) :]
            os.fsync(self._handle)
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written: {error.strerror or error}; the {len(self.rows)} answers in it are "
                "kept: mend that and run the same command again"
            ) from error
        self.rows += rows

    def close(self) -> None:
        """Lets the file and its lock go; a file that is empty is taken away."""
        if os.fstat(self._handle).st_size == 0 and take_lock(self._handle, self.path):
            self._settings_file.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        os.close(self._handle)

    def _begin(self, settings: dict[str, Any], overwrite: bool, say: Callable[[str], None]) -> None:
        if not take_lock(self._handle, self.path):
            raise InputError(f"{self.path} is being written by another process: wait for it, or choose another --out")
        if overwrite:
            os.ftruncate(self._handle, 0)
        content = self.path.read_bytes()
        if content:
            self._check_settings(settings)
        self.rows = self._whole_rows(content, say)
        if not content:
            write_json(self._settings_file, settings)

    @property
    def _settings_file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.settings.json")

    def _check_settings(self, settings: dict[str, Any]) -> None:
        try:
            there = json.loads(self._settings_file.read_bytes())
        except FileNotFoundError:
            raise InputError(
                f"{self.path} exists and no {self._settings_file.name} says what made it: {MEND}"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{self._settings_file} cannot be read ({error}): {MEND}") from error
        if not isinstance(there, dict):
            raise InputError(f"{self._settings_file} holds no settings: {MEND}")
        differing = differing_keys(there, json.loads(json.dumps(settings)))
        if differing:
            raise InputError(f"{self.path} has answers by other settings ({'; '.join(differing)}): {MEND}")

    def _whole_rows(self, content: bytes, say: Callable[[str], None]) -> list[dict[str, Any]]:
        """The rows of all whole lines; what stands after the last is cut off."""
        whole = content[: content.rfind(b"\n") + 1]
        rows = []
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{self.path}, line {number}: no answer ({error}): {MEND}") from error
            if not isinstance(row, dict):
                raise InputError(f"{self.path}, line {number}: no answer but {line[:20]!r}: {MEND}")
            rows.append(row)
        if len(whole) < len(content):
            say(f"{self.path}: a half-written line at its end is cut off")
            os.ftruncate(self._handle, len(whole))
        return rows
