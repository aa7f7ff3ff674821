"""Answers written down as they come, so that a killed evaluation goes on where it was.

The first line has the settings that made them, each further line one question's answer. A line that a kill cut short
is dropped and asked again.
"""

import json
from pathlib import Path
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.files import take_lock
from qlora_jax.settings import differing_keys


class AnswerRecord:
    """Opens (or makes) the file and holds it; `lines` has the whole lines that were there.

    Raises InputError when the file was made with other settings (they are named), is something else, is in use, or
    cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from error
        if not take_lock(self._file.fileno(), path):
            self._file.close()
            raise InputError(f"{path} is in use by another process; wait, or choose another --out")
        self.lines = self._read(settings)

    def _read(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        self._file.seek(0)
        whole, _, rest = self._file.read().rpartition(b"\n")
        begin = b'{"settings": '
        try:
            rows = [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            rows = [{}]
        ours = (
            all(isinstance(row, dict) for row in rows) and isinstance(rows[0].get("settings"), dict)
            if rows
            else (rest[: len(begin)] == begin[: len(rest)])
        )
        if not ours:
            raise InputError(f"{self.path} is no record of answers; choose another --out, or move it away")
        self._file.truncate(len(whole) + 1 if whole else 0)
        if not rows:
            self.add([{"settings": settings}])
        elif differing := differing_keys({"eval": rows[0]["settings"]}, {"eval": settings}):
            shown = "; ".join(line.removeprefix("eval.") for line in differing)
            raise InputError(
                f"{self.path} holds answers made with other settings ({shown}); choose another --out, or delete it"
            )
        return rows[1:]

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Appends lines, which a kill from then on cannot take back."""
        try:
            self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()
