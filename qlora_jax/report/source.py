"""The runs to report on: those of a sweep's ledger, or the one of a folder. Reads only, also while they are written."""

import dataclasses
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.files import loads
from qlora_jax.models.config import read_json
from qlora_jax.settings import config_hash, flatten
from qlora_jax.sweep.ledger import FILE, STATUSES, parsed, reading

CURVES = ("loss", "eval_loss")  # metrics over time that a report draws
_RUN_FILES = ("config.json", "metrics.jsonl", "summary.json")
_LARGEST = float(np.finfo(np.float32).max)
_CURVE_POINTS = 64  # of a run; longer curves are means over equal stretches of steps


class Curve(NamedTuple):
    steps: np.ndarray  # float32 [n]
    values: np.ndarray  # float32 [n], finite


class Attempt(NamedTuple):
    """A pack on a worker."""

    pack: str
    node: str
    started: float  # seconds since 1970
    ended: float
    status: str  # running | done | failed | lost | memory | error | input
    members: int
    error: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    hash: str
    status: str  # pending | running | done | failed
    config: dict[str, Any]  # flat: {"lora.rank": 64}
    groups: tuple[str, ...] = ()
    result: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None
    seconds: float | None = None  # of its last attempt: the pack's time over its members
    attempts: int = 0
    curves: dict[str, Curve] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    path: Path  # the workdir
    runs: list[Run]  # in the order of the grid
    written: float  # when the newest data was written, seconds since 1970
    is_grid: bool = True
    groups: tuple[str, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    meta: dict[str, str] = dataclasses.field(default_factory=dict)
    left_out: int = 0  # points of the ledger that are not of the grid any more

    def counts(self) -> dict[str, int]:
        counts = dict.fromkeys(STATUSES, 0)
        for run in self.runs:
            counts[run.status] += 1
        return counts

    @property
    def is_finished(self) -> bool:
        return all(run.status in ("done", "failed") for run in self.runs)


def read(workdir: Path) -> Source:
    """Raises InputError where the folder has neither a ledger nor a run, or they cannot be read."""
    if not workdir.is_dir():
        raise InputError(f"--workdir={workdir}: no such folder")
    if (workdir / FILE).exists():
        return _read_ledger(workdir)
    if (workdir / "config.json").exists():
        return _read_run(workdir)
    raise InputError(f"--workdir={workdir} has neither {FILE} (a sweep) nor config.json (a run)")


def watched_files(workdir: Path) -> list[Path]:
    """The files that a report is made from, also those that are not there yet."""
    return [workdir / name for name in (FILE, f"{FILE}-wal", *_RUN_FILES)]


def _read_ledger(workdir: Path) -> Source:
    path = workdir / FILE
    written = max(file.stat().st_mtime for file in (path, workdir / f"{FILE}-wal") if file.exists())
    with reading(path) as db:
        db.execute("BEGIN")  # one moment of the ledger for all that follows
        points = db.execute(
            'SELECT hash, status, config, result, error, "groups" FROM points WHERE in_grid ORDER BY position, hash'
        ).fetchall()
        left_out = db.execute("SELECT count(*) FROM points WHERE NOT in_grid").fetchone()[0]
        meta = dict(db.execute("SELECT key, value FROM meta"))
        attempts, seconds, tries = _attempts(db, written)
        curves = _curves(db)
    runs = []
    for digest, status, config, result, error, groups in points:
        where = f"{path}: point {digest}"
        if status not in STATUSES:
            raise InputError(f"{where} is {status!r}; expected one of {', '.join(STATUSES)}")
        measured, settings = parsed(result or "{}", dict, where), parsed(config, dict, where)
        names = parsed(groups, list, where)
        runs.append(
            Run(
                digest, status, flatten(settings), tuple(map(str, names)), measured, error,
                seconds.get(digest), tries.get(digest, 0), _ended(curves.get(digest, {}), measured),
            )
        )  # fmt: skip
    in_all = tuple(dict.fromkeys(name for run in runs for name in run.groups))
    return Source(workdir, runs, written, True, in_all, attempts, meta, left_out)


def _attempts(db: sqlite3.Connection, now: float) -> tuple[tuple[Attempt, ...], dict[str, float], dict[str, int]]:
    """Attempts of packs; by point: seconds of its last finished attempt, and the number of its attempts."""
    packs: dict[tuple, Attempt] = {}
    rows = db.execute("SELECT pack, hash, node, started, ended, status, error FROM attempts ORDER BY id").fetchall()
    key = lambda row: (row[0], row[3])  # noqa: E731 (pack, started)
    for row in rows:
        pack, _, node, started, ended, status, error = row
        before = packs.get(key(row))
        ended = max(now, started) if ended is None else ended
        if before is None:
            packs[key(row)] = Attempt(pack, node or "", started, ended, status, 1, error)
        else:  # of its members one may be done, another failed
            packs[key(row)] = before._replace(
                members=before.members + 1,
                ended=max(before.ended, ended),
                status="done" if "done" in (before.status, status) else status,
                error=before.error or error,
            )
    seconds: dict[str, float] = {}
    tries: dict[str, int] = {}
    for row in rows:
        tries[row[1]] = tries.get(row[1], 0) + 1
        if row[4] is not None:
            seconds[row[1]] = (row[4] - row[3]) / packs[key(row)].members
    return tuple(packs.values()), seconds, tries


def _curves(db: sqlite3.Connection) -> dict[str, dict[str, Curve]]:
    names = ", ".join("?" * len(CURVES))
    rows = db.execute(f"SELECT hash, name, step, value FROM metrics WHERE name IN ({names})", CURVES)
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for digest, name, step, value in rows:  # by hash and step: the table's own order
        if value is not None:
            steps, values = found.setdefault(digest, {}).setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return {digest: {name: _short(*pair) for name, pair in curves.items()} for digest, curves in found.items()}


def _short(steps: Iterable[float], values: Iterable[float]) -> Curve:
    """At most _CURVE_POINTS: longer ones as means over equal stretches."""
    x, y = np.asarray(steps, np.float32), np.asarray(values, np.float32)
    if len(x) > _CURVE_POINTS:
        edges = np.linspace(0, len(x), _CURVE_POINTS + 1).astype(int)
        lengths = np.diff(edges)
        x, y = ((np.add.reduceat(column, edges[:-1]) / lengths).astype(np.float32) for column in (x, y))
    return Curve(x, y)


def _ended(curves: dict[str, Curve], result: dict[str, Any]) -> dict[str, Curve]:
    """With the evaluation at the end, which only the result has, where there were others before."""
    steps, value, before = number(result.get("steps")), number(result.get("final_eval_loss")), curves.get("eval_loss")
    if before is None or steps is None or value is None or before.steps[-1] >= steps:
        return curves
    end = Curve(np.append(before.steps, np.float32(steps)), np.append(before.values, np.float32(value)))
    return curves | {"eval_loss": end}


def _read_run(workdir: Path) -> Source:
    config = read_json(workdir / "config.json")
    files = [workdir / name for name in _RUN_FILES]
    written = max(file.stat().st_mtime for file in files if file.exists())
    result = read_json(files[2]) if files[2].exists() else {}
    rows = list(_rows(files[1])) if files[1].exists() else []
    curves = {}
    for name in CURVES:
        of_metric = [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]
        if of_metric:
            curves[name] = _short(*zip(*of_metric, strict=True))
    seconds = sum(row["seconds"] for row in rows if _is_number(row.get("seconds"))) or None
    status = "done" if result else "running"
    run = Run(config_hash(config), status, flatten(config), (), result, None, seconds, 1, _ended(curves, result))
    return Source(workdir, [run], written, is_grid=False)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a metrics.jsonl; the last one may still be being written."""
    for line in path.read_bytes().splitlines():
        try:
            row = loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and _is_number(row["step"]):
            yield row


def _is_number(value: Any) -> bool:
    """A number that float32 holds, which is what curves are kept in."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if _is_number(value) else None
