"""The folder of a run: its config, metrics and summary, and the rule that one folder belongs to one config."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any, TextIO

from qlora_jax.errors import InputError
from qlora_jax.files import write_json
from qlora_jax.models.config import read_json
from qlora_jax.settings import differing_keys


def refuse_other_config(path: Path, config: dict[str, Any]) -> None:
    """Raises InputError, with the differing keys, when the folder holds a run of another config. Writes nothing."""
    saved = path / "config.json"
    differing = differing_keys(read_json(saved), config) if saved.exists() else []
    if differing:
        shown = "; ".join(differing)
        raise InputError(
            f"workdir {path} holds a run of another config ({shown}); choose another --workdir, or delete it"
        )


class Workdir:
    """Opens (or makes) the folder and holds it: a second process on the same folder is refused.

    Raises InputError when the folder holds a run of another config (the differing keys are named), is in use, or
    cannot be written.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock: TextIO = (path / ".lock").open("w")
        except OSError as error:
            raise InputError(f"workdir {path} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"workdir {path} is in use by another process; wait, or choose another --workdir"
            ) from error
        refuse_other_config(path, config)
        if not (path / "config.json").exists():
            write_json(path / "config.json", config)
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"
        self._metrics = path / "metrics.jsonl"

    def keep_metrics_until(self, step: int) -> None:
        """Drops the lines of steps after `step` (they will be run again) and a line that a kill cut short."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        partial = self.path / ".metrics.jsonl.partial"
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, self._metrics)

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl."""
        if not self._metrics.exists():
            return []
        rows = []
        for line in self._metrics.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return [row for row in rows if isinstance(row, dict) and "step" in row]

    def log(self, row: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl. Raises ValueError for NaN and infinity, which JSON has not."""
        line = json.dumps(row, allow_nan=False)
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.path / "summary.json", summary)

    def close(self) -> None:
        self._lock.close()
