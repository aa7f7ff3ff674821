"""The folder of a run: its config, what it was made from, metrics and summary. One folder belongs to one run.

config.json says what was asked for, cut.json how its batches are cut into micro-batches where that was left open, and
inputs.json what the names in it stood for: checksums of what was read. A run that
goes on is refused where that is not what it was, for it would become another run without a word. What counts is the
content, of data the examples that came of it, of a model the values of its tensors: files may have moved.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qlora_jax.checksums import Input
from qlora_jax.errors import InputError
from qlora_jax.files import hold_folder, loads, read_whole, write_json
from qlora_jax.models.config import read_json
from qlora_jax.settings import differing_keys, flatten
from qlora_jax.train.cut import Choice, Cut, ToCut, cuts

# Keys that name files and folders: another name with the same content is the same run.
_PATHS = ("model.path", "data.path", "data.eval_path", "data.batches", "lora.init_from", "eval.mmlu_data")
INPUTS, CUT = "inputs.json", "cut.json"
_KEPT = "kept: the run began with it"  # of a cut, why


def refuse_other_config(path: Path, config: dict[str, Any]) -> None:
    """Raises InputError, with the differing keys, when the folder holds a run of another config. Writes nothing.

    Names of files whose contents are known may differ: these are compared once they are read.
    """
    saved = path / "config.json"
    try:
        differing = differing_keys(read_json(saved), config) if saved.exists() else []
    except InputError as error:
        raise InputError(f"{error}; put it back, or choose another --workdir") from error
    if differing:
        moved = _moved(path, config)
        differing = [line for line in differing if line.partition(":")[0] not in moved]
    if differing:
        shown = "; ".join(differing)
        raise InputError(
            f"workdir {path} holds a run of another config ({shown}); choose another --workdir, or delete it"
        )


def _moved(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """Keys with other names of files than the folder's config has, where the contents of those are known -> the old
    names."""
    saved, known = path / "config.json", _recorded(path)
    if known is None or not saved.exists():
        return {}
    there, here = flatten(read_json(saved)), flatten(config)
    pairs = {key: (there.get(key), here.get(key)) for key in _PATHS if key in known}
    return {key: old for key, (old, new) in pairs.items() if old and new and old != new}


def _recorded(path: Path) -> dict[str, Input] | None:
    """What inputs.json says; None where it is not there or not whole."""
    try:
        return {
            key: Input(str(value["content"]), [(str(name), str(checksum)) for name, checksum in value["parts"]])
            for key, value in loads(read_whole(path / INPUTS)).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _changed(before: list[tuple[str, str]], now: list[tuple[str, str]]) -> list[str]:
    """Names of parts whose content is not among the others', those that are there first."""
    contents = [{checksum for _, checksum in parts} for parts in (before, now)]
    new = [name for name, checksum in now if checksum not in contents[0]]
    gone = [name for name, checksum in before if checksum not in contents[1]]
    return list(dict.fromkeys([*new, *gone]))


class Workdir:
    """Opens (or makes) the folder and holds it: a second process on the same folder is refused.

    Nothing is written into it before `begin`, and `close` takes away one that was made and never begun.

    Raises InputError when the folder holds a run of another config (the differing keys are named), is in use, or
    cannot be written.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path, self._config = path, config
        self._made = not path.exists()
        self._lock = hold_folder(path, "process")
        try:
            refuse_other_config(path, config)
        except InputError:
            self.close()
            raise
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"
        self._metrics = path / "metrics.jsonl"
        self._moved = _moved(path, config)
        self._before = {key: value for key, value in (_recorded(path) or {}).items() if key in self._moved}
        self._inputs: dict[str, Input] = {}
        self._goes_on = False  # from a checkpoint

    def go_on(self, say: Callable[[str], None]) -> None:
        """From here on what `check` takes must be what it was: there is a checkpoint."""
        recorded = _recorded(self.path)
        self._before, self._goes_on = recorded or {}, True
        if recorded is None:
            how = "is damaged" if (self.path / INPUTS).exists() else "is missing (an older version made this run)"
            say(f"run: {self.path / INPUTS} {how}: whether data and weights are what they were cannot be checked")

    def check(self, inputs: Mapping[str, Input], say: Callable[[str], None]) -> None:
        """Takes inputs, by the config's keys, as soon as they are known.

        Raises InputError where one is not what the run had until its checkpoint.
        """
        self._inputs |= inputs
        for key, now in inputs.items():
            if (before := self._before.get(key)) is None:
                continue
            changed = _changed(before.parts, now.parts)
            if now.content != before.content:
                what = " and ".join(changed) or "the program that reads it, or one of its libraries,"
                raise InputError(
                    f"{self.path} cannot go on: {what} changed since its checkpoint, and with it what {key} stands "
                    "for. Put it back as it was, or start anew in another --workdir"
                )
            if changed:
                say(f"run: {' and '.join(changed)} changed, and what the run takes from {key} did not: it goes on")

    def begin(self, say: Callable[[str], None] = print) -> None:
        """Writes down config and inputs, once all of these are checked."""
        lost = [key for key in self._before if key not in self._inputs]
        if lost:
            raise InputError(
                f"{self.path} cannot go on: until its checkpoint it was trained with {lost[0]}, which this version "
                "does not read. Go on with the version that began it, or start anew in another --workdir"
            )
        for key, old in self._moved.items():
            say(f"run: {key} is {flatten(self._config)[key]} now and was {old}; its content is the same")
        write_json(self.path / "config.json", self._config)
        write_json(self.path / INPUTS, {key: value._asdict() for key, value in self._inputs.items()})

    def kept_cut(self, wanted: ToCut, say: Callable[[str], None]) -> Choice | None:
        """The cut of the run's batches until its checkpoint; None where there is no checkpoint, or nothing is known.

        Raises InputError for a file that is damaged, or says what is no cut of these batches: another than that until
        the checkpoint would round otherwise.
        """
        file = self.path / CUT
        if not self._goes_on or not wanted.is_open:
            return None
        if not file.exists():
            say(f"run: {file} is missing: batches are cut anew, and sums may round otherwise than until the checkpoint")
            return None
        try:
            found = loads(read_whole(file))
            cut = Cut(found["micro_batch_rows"], found["remat"])
            if type(cut.rows) is not int:
                raise ValueError
            if cut not in cuts(wanted):
                if found.get("rows_of_a_device", wanted.rows) == wanted.rows:
                    raise ValueError
                say("run: its devices are others than until the checkpoint: batches are cut anew")
                return None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is damaged; put it back, or start anew in another --workdir") from error
        return Choice(cut, _KEPT)

    def keep_cut(self, wanted: ToCut, choice: Choice) -> None:
        """Writes down how a run's batches are cut, as a new one has chosen it."""
        if choice.reason != _KEPT:
            rows, remat = choice.cut
            said = {"micro_batch_rows": rows, "remat": remat, "reason": choice.reason}
            write_json(self.path / CUT, said | {"rows_of_a_device": wanted.rows})

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
        for line in self._metrics.read_bytes().splitlines():
            try:
                rows.append(loads(line))
            except ValueError:
                continue
        return [row for row in rows if isinstance(row, dict) and type(row.get("step")) is int]

    def log(self, row: dict[str, Any]) -> None:
        """Appends one line to metrics.jsonl. Raises ValueError for NaN and infinity, which JSON has not."""
        line = json.dumps(row, allow_nan=False)
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.path / "summary.json", summary)

    def close(self) -> None:
        if self._made and [entry.name for entry in self.path.iterdir()] == [".lock"]:
            (self.path / ".lock").unlink()
            self.path.rmdir()
        self._lock.close()
