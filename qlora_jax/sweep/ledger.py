"""The ledger of a sweep: one SQLite file that says what is to do, what was done and what came out.

    points    one row a config: status pending | running | done | failed, config, result, axes and groups as JSON
    attempts  one row a point and attempt, with node and error
    metrics   values over time: (hash, step, name) -> value
    meta      the sweep's file, its groups, versions, code commit, host

Only the driver writes. A pack's end (results, statuses, last metrics) is one transaction, and every transaction is on
disk when it returns (synchronous = FULL; there are a few a second at most). So whatever ends the driver, a killed
process or a power cut, costs the packs that were running, which `open` puts back to pending. WAL lets others read while
the driver writes; SQLite's WAL needs a disk of the driver's own machine, not a network file system.
"""

import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.errors import InputError
from qlora_jax.files import hold_folder, loads
from qlora_jax.sweep.grid import Point

FILE = "ledger.sqlite"
STATUSES = ("pending", "running", "done", "failed")
# what is measured of a run, or of the pack it was in, and not computed by it: differs between runs of the same config
MEASURED = frozenset(
    {"seconds", "tokens_per_second", "peak_device_bytes", "peak_device_bytes_source", "peak_host_bytes", "members"}
)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS points(
  hash TEXT PRIMARY KEY, status TEXT NOT NULL CHECK(status IN ('pending', 'running', 'done', 'failed')),
  config TEXT NOT NULL, result TEXT, axes TEXT NOT NULL, "groups" TEXT NOT NULL, pack TEXT, error TEXT,
  position INTEGER, in_grid INTEGER NOT NULL DEFAULT 1, created REAL NOT NULL, updated REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempts(
  id INTEGER PRIMARY KEY, pack TEXT NOT NULL, hash TEXT NOT NULL, node TEXT, started REAL NOT NULL, ended REAL,
  status TEXT NOT NULL, error TEXT);
CREATE INDEX IF NOT EXISTS attempts_of ON attempts(hash);
CREATE INDEX IF NOT EXISTS attempts_open ON attempts(pack) WHERE ended IS NULL;
CREATE TABLE IF NOT EXISTS metrics(
  hash TEXT NOT NULL, step INTEGER NOT NULL, name TEXT NOT NULL, value REAL, PRIMARY KEY(hash, step, name))
  WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta(key TEXT PRIMARY KEY, value TEXT);
"""


class Outcome(NamedTuple):
    """What came out for one point of a pack."""

    hash: str
    result: dict[str, Any] | None
    error: str | None = None  # a point with an error is failed


class Row(NamedTuple):
    """One value of a run over time."""

    hash: str
    step: int
    name: str
    value: float | None


class Ledger:
    """Opens (or makes) the ledger of a workdir and holds it: a second driver is refused.

    Raises:
      InputError: in use by another driver, not a ledger, or a disk that is full or cannot be written.
    """

    def __init__(self, workdir: Path):
        self.path = workdir / FILE
        self._lock = hold_folder(workdir, "sweep")
        try:
            with self._errors():
                self._db = sqlite3.connect(self.path, isolation_level=None, timeout=30)
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.executescript(_SCHEMA)
            self._interrupted = self._put_back()
        except InputError:
            self._lock.close()
            raise

    def _put_back(self) -> int:
        """What was running when the last driver ended is pending again, as if it had never begun."""
        hashes = [row[0] for row in self._db.execute("SELECT hash FROM points WHERE status = 'running'")]
        if hashes:
            self.give_up(hashes, "lost", "the driver ended")
        return len(hashes)

    @property
    def interrupted(self) -> int:
        """Points that were running when the last driver ended."""
        return self._interrupted

    def add(self, points: Sequence[Point]) -> int:
        """Makes `points` the grid: new ones become pending, known ones keep what they have, others stay, out of it.

        Returns the number of new ones.
        """
        with self._transaction() as db:
            before = db.execute("SELECT count(*) FROM points").fetchone()[0]
            db.execute("UPDATE points SET in_grid = 0, position = NULL")
            _insert_points(db, points, 0)
            return db.execute("SELECT count(*) FROM points").fetchone()[0] - before

    def extend(self, points: Sequence[Point]) -> None:
        """Adds `points` to the grid, which keeps what it has."""
        with self._transaction() as db:
            _insert_points(db, points, db.execute("SELECT count(*) FROM points WHERE in_grid").fetchone()[0])

    def outcomes(self, group: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
        """(status, axes, result) of the points of a group that are done or failed, as they were made."""
        found = self._db.execute(
            "SELECT status, axes, result, \"groups\" FROM points WHERE status IN ('done', 'failed') ORDER BY created"
        )
        return [
            (status, json.loads(axes), json.loads(result or "{}"))
            for status, axes, result, groups in found
            if group in json.loads(groups)
        ]

    def statuses(self) -> dict[str, str]:
        """hash -> status, of all points."""
        return dict(self._db.execute("SELECT hash, status FROM points"))

    def counts(self) -> dict[str, int]:
        """Points of the grid by status."""
        found = dict(self._db.execute("SELECT status, count(*) FROM points WHERE in_grid GROUP BY status"))
        return {status: found.get(status, 0) for status in STATUSES}

    def failures(self, most: int) -> list[tuple[str, str]]:
        """(hash, error) of the first failed points of the grid."""
        found = "SELECT hash, error FROM points WHERE status = 'failed' AND in_grid ORDER BY position LIMIT ?"
        return self._db.execute(found, (most,)).fetchall()

    def best(self, metric: str, most: int) -> list[tuple[str, dict[str, Any], float]]:
        """(hash, axes, value) of the done points of the grid whose result has the least `metric`."""
        found = self._db.execute("SELECT hash, axes, result FROM points WHERE status = 'done' AND in_grid")
        values = [(digest, json.loads(axes), json.loads(result).get(metric)) for digest, axes, result in found]
        return sorted((row for row in values if row[2] is not None), key=lambda row: row[2])[:most]

    def retry_failed(self) -> int:
        """Failed points of the grid become pending; how many."""
        with self._transaction() as db:
            failed = [row[0] for row in db.execute("SELECT hash FROM points WHERE status = 'failed' AND in_grid")]
            self._forget(db, failed)
        return len(failed)

    def start(self, pack: str, hashes: Sequence[str], node: str) -> None:
        """The pack begins on `node`."""
        now = time.time()
        with self._transaction() as db:
            self._forget(db, hashes)
            db.executemany(
                "UPDATE points SET status = 'running', pack = ?, updated = ? WHERE hash = ?",
                ((pack, now, digest) for digest in hashes),
            )
            db.executemany(
                "INSERT INTO attempts(pack, hash, node, started, status) VALUES (?, ?, ?, ?, 'running')",
                ((pack, digest, node, now) for digest in hashes),
            )

    def log(self, rows: Iterable[Row]) -> None:
        """Metrics of running packs. A value that is not finite becomes NULL."""
        rows = list(rows)
        if rows:
            with self._transaction() as db:
                _insert_rows(db, rows)

    def finish(self, outcomes: Sequence[Outcome], rows: Iterable[Row] = ()) -> None:
        """A pack's end: the points with an error are failed, the others done; `rows` are all their metrics."""
        with self._transaction() as db:
            db.executemany("DELETE FROM metrics WHERE hash = ?", ((outcome.hash,) for outcome in outcomes))
            _insert_rows(db, list(rows))
            _end(db, outcomes)

    def end(self, outcomes: Sequence[Outcome]) -> None:
        """As `finish`, of points whose metrics are all logged."""
        with self._transaction() as db:
            _end(db, outcomes)

    def give_up(self, hashes: Sequence[str], status: str, error: str) -> None:
        """An attempt that came to nothing: its error is kept, its metrics go, its points are pending again.

        `status`, of the attempt: lost | memory | error | input (engine.Kind).
        """
        now = time.time()
        with self._transaction() as db:
            self._forget(db, hashes)
            for digest in hashes:
                _end_attempt(db, digest, status, error, now)

    def _forget(self, db: sqlite3.Connection, hashes: Sequence[str]) -> None:
        now = time.time()
        db.executemany("DELETE FROM metrics WHERE hash = ?", ((digest,) for digest in hashes))
        db.executemany(
            "UPDATE points SET status = 'pending', result = NULL, error = NULL, pack = NULL, updated = ? "
            "WHERE hash = ?",
            ((now, digest) for digest in hashes),
        )

    def set_meta(self, values: Mapping[str, Any]) -> None:
        with self._transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO meta(key, value) VALUES (?, ?)",
                ((key, value if isinstance(value, str) else _json(value)) for key, value in values.items()),
            )

    def meta(self, key: str) -> str | None:
        """What `set_meta` has put there."""
        found = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if found is None else found[0]

    def configs(self, status: str) -> list[dict[str, Any]]:
        """Of the points with a status, those that are not of the grid any more too."""
        return [json.loads(row[0]) for row in self._db.execute("SELECT config FROM points WHERE status = ?", (status,))]

    def contents(self) -> dict[str, Any]:
        """See `contents`."""
        return contents(self._db)

    def close(self) -> None:
        self._db.close()
        self._lock.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block or nothing."""
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            reason = str(error)
            if "full" in reason or "disk I/O" in reason:
                raise InputError(
                    f"{self.path}: {reason}. What was written before is whole: free some space and run again"
                ) from error
            if "not a database" in reason or "malformed" in reason:
                raise InputError(
                    f"{self.path} is not a ledger that SQLite can read ({reason}); choose another --workdir"
                ) from error
            raise InputError(f"{self.path}: {reason}") from error


def _end(db: sqlite3.Connection, outcomes: Sequence[Outcome]) -> None:
    now = time.time()
    for outcome in outcomes:
        status = "done" if outcome.error is None else "failed"
        result = None if outcome.result is None else _json(_finite(outcome.result))
        db.execute(
            "UPDATE points SET status = ?, result = ?, error = ?, updated = ? WHERE hash = ?",
            (status, result, outcome.error, now, outcome.hash),
        )
        _end_attempt(db, outcome.hash, status, outcome.error, now)


def _end_attempt(db: sqlite3.Connection, digest: str, status: str, error: str | None, now: float) -> None:
    db.execute(
        "UPDATE attempts SET ended = ?, status = ?, error = ? WHERE hash = ? AND ended IS NULL",
        (now, status, error, digest),
    )


def _insert_points(db: sqlite3.Connection, points: Sequence[Point], first: int) -> None:
    now = time.time()
    db.executemany(
        'INSERT INTO points(hash, status, config, axes, "groups", position, in_grid, created, updated) '
        "VALUES (?, 'pending', ?, ?, ?, ?, 1, ?, ?) ON CONFLICT(hash) DO UPDATE SET "
        'axes = excluded.axes, "groups" = excluded."groups", position = excluded.position, in_grid = 1',
        (
            (p.hash, _json(p.config), _json(p.axes), _json(p.groups), number, now, now)
            for number, p in enumerate(points, first)
        ),
    )


def _insert_rows(db: sqlite3.Connection, rows: Sequence[Row]) -> None:
    finite = (row if row.value is not None and math.isfinite(row.value) else row._replace(value=None) for row in rows)
    db.executemany("INSERT OR REPLACE INTO metrics(hash, step, name, value) VALUES (?, ?, ?, ?)", finite)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None instead."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """The ledger FILE `path` for reading, also while a driver writes it. Raises InputError when there is none."""
    if not path.is_file():
        raise InputError(f"{path}: no such ledger; a sweep writes it into its --workdir")
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=30)
    try:
        yield db
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path} is not a ledger that can be read: {error}") from error
    finally:
        db.close()


def parsed(text: str, kind: type, where: str) -> Any:
    """A ledger's JSON text, a dict or a list. Raises InputError, `where` in it, for what is neither."""
    try:
        value = loads(str(text).encode("utf-8", "replace"))
    except ValueError as error:
        raise InputError(f"{where} cannot be read as JSON: {error}") from error
    if not isinstance(value, kind):
        raise InputError(f"{where} holds a JSON {type(value).__name__}; expected a {kind.__name__}")
    return value


def contents(db: sqlite3.Connection, measured: Callable[[str], bool] = MEASURED.__contains__) -> dict[str, Any]:
    """What a sweep computed, without times, attempts and what is measured of a machine: equal for equal sweeps.

    Returns {"points": {hash: (status, config, result, axes, groups, error, in_grid)}, "metrics": [(hash, step, name,
    value)]}; JSON as values. `measured` says which names of results and metrics are left out.
    """
    points = {}
    columns = 'hash, status, config, result, axes, "groups", error, in_grid'
    for digest, status, config, result, axes, groups, error, in_grid in db.execute(
        f"SELECT {columns} FROM points ORDER BY hash"
    ):
        where = f"ledger: point {digest}"
        computed = result and {key: x for key, x in parsed(result, dict, where).items() if not measured(key)}
        points[digest] = (
            status, parsed(config, dict, where), computed, parsed(axes, dict, where), parsed(groups, list, where),
            error, bool(in_grid),
        )  # fmt: skip
    rows = db.execute("SELECT hash, step, name, value FROM metrics ORDER BY hash, step, name")
    return {"points": points, "metrics": [row for row in rows if not measured(row[2])]}
