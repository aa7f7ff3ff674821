"""The ledger: what a grid adds, what a killed driver leaves, a full disk, tables."""

import csv
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest

from qlora_jax.errors import InputError
from qlora_jax.sweep.engine import run_packs
from qlora_jax.sweep.grid import axis, chain, group
from qlora_jax.sweep.ledger import FILE, Ledger, Outcome, Row, reading
from qlora_jax.sweep.local import LocalExecutor
from qlora_jax.sweep.packs import make_packs, missing
from qlora_jax.sweep.tabulate import export
from tests.sweep import fake

REPOSITORY = Path(__file__).resolve().parents[2]
POINTS = fake.points(axis("train.seed", range(6))).points
HASHES = [point.hash for point in POINTS]
# a driver that runs a grid in packs of 2; argv: workdir, seconds a step
DRIVER = """
import sys
from pathlib import Path
from tests.sweep import fake, test_ledger
test_ledger.drive(Path(sys.argv[1]), float(sys.argv[2]))
"""


def drive(workdir: Path, seconds: float = 0.0) -> Ledger:
    ledger = Ledger(workdir)
    points = fake.points(axis("train.seed", range(20))).points
    ledger.add(points)
    left = missing(make_packs(points, fake.key, 2), ledger.statuses())
    run_packs(left, ledger, LocalExecutor(fake.runner(seconds, {"7": "nan"})), workdir)
    return ledger


def attempts(ledger: Path) -> int:
    try:
        with reading(ledger) as db:
            return db.execute("SELECT count(*) FROM attempts").fetchone()[0]
    except InputError:  # not there, or without tables yet
        return 0


@pytest.fixture
def ledger(tmp_path):
    found = Ledger(tmp_path)
    found.add(POINTS)
    yield found
    found.close()


def test_a_grid_adds_and_never_redoes(ledger):
    ledger.start("p", HASHES[:2], "here")
    ledger.finish([Outcome(HASHES[0], {"final_eval_loss": 1.0}), Outcome(HASHES[1], None, "bad")])
    grown = fake.points(chain(axis("train.seed", range(1, 8)), axis("lora.rank", [2]))).points
    assert ledger.add(grown) == 3
    assert ledger.counts() == {"pending": 7, "running": 0, "done": 0, "failed": 1}
    contents = ledger.contents()["points"]
    assert len(contents) == 9
    status, _, result, _, _, _, in_grid = contents[HASHES[0]]
    assert (status, result, in_grid) == ("done", {"final_eval_loss": 1.0}, False)
    assert contents[HASHES[2]][3] == {"train.seed": 2, "lora.rank": 16}  # axes are those of the grid now
    ledger.add(POINTS)
    assert ledger.counts()["done"] == 1


def test_running_is_pending_again(ledger, tmp_path):
    ledger.start("p", HASHES[:2], "here")
    ledger.log([Row(HASHES[0], 1, "loss", 2.0), Row(HASHES[0], 2, "loss", math.nan)])
    assert ledger.contents()["metrics"] == [(HASHES[0], 1, "loss", 2.0), (HASHES[0], 2, "loss", None)]
    ledger.close()
    again = Ledger(tmp_path)
    assert again.interrupted == 2 and again.counts()["pending"] == 6 and again.contents()["metrics"] == []
    with reading(again.path) as db:
        attempts = db.execute("SELECT status, error FROM attempts").fetchall()
    assert attempts == [("lost", "the driver ended")] * 2
    again.close()


def test_failed_points_stay_so_until_asked(ledger):
    ledger.start("p", HASHES[:1], "here")
    ledger.finish([Outcome(HASHES[0], {"loss": math.inf}, "loss is not finite")])
    assert ledger.failures(5) == [(HASHES[0], "loss is not finite")]
    assert ledger.contents()["points"][HASHES[0]][2] == {"loss": None}
    assert ledger.retry_failed() == 1 and ledger.counts()["pending"] == 6


def test_a_second_driver_is_refused(ledger, tmp_path):
    with pytest.raises(InputError, match="in use by another sweep"):
        Ledger(tmp_path)


@pytest.mark.parametrize("content", [b"no database, but longer than a header of SQLite\n" * 40, b"SQLite format 3\0"])
def test_another_file_in_its_place(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(InputError, match="choose another --workdir"):
        Ledger(tmp_path)
    assert (tmp_path / FILE).read_bytes() == content


def test_an_empty_file_is_an_empty_ledger(tmp_path):
    (tmp_path / FILE).write_bytes(b"")
    assert Ledger(tmp_path).counts()["done"] == 0


def test_a_workdir_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be used"):
        Ledger(tmp_path / "file" / "below")


def test_a_full_disk_loses_nothing_that_was_written(ledger, tmp_path):
    ledger.start("p", HASHES[:2], "here")
    ledger.finish([Outcome(HASHES[0], {"a": 1})])
    before = ledger.contents()
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite then answers as on a full disk: SQLITE_FULL
    rows = [Row(HASHES[1], step, "loss", 1.0) for step in range(20_000)]
    with pytest.raises(InputError, match="full.*was written before is whole.*run again"):
        ledger.finish([Outcome(HASHES[1], {"a": 2})], rows)
    assert ledger.contents() == before
    assert ledger._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_kills_change_nothing(tmp_path):
    undisturbed = drive(tmp_path / "a")
    begun = 0
    for seconds in (0.11, 0.2, 0.3):  # packs take 60 ms
        command = [sys.executable, "-c", DRIVER, str(tmp_path / "b"), "0.02"]
        process = subprocess.Popen(command, cwd=REPOSITORY)
        while attempts(tmp_path / "b" / FILE) == begun and process.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        begun = attempts(tmp_path / "b" / FILE)
    killed = Ledger(tmp_path / "b")
    done = killed.counts()["done"]
    assert 0 < done < 20 and killed.interrupted <= 2
    killed.close()
    killed = drive(tmp_path / "b")
    assert killed.contents() == undisturbed.contents()
    assert killed.counts() == {"pending": 0, "running": 0, "done": 19, "failed": 1}
    with reading(killed.path) as db:
        lost = db.execute("SELECT count(*) FROM attempts WHERE status = 'lost'").fetchone()[0]
        ended = db.execute("SELECT count(*) FROM attempts WHERE status IN ('done', 'failed')").fetchone()[0]
    assert 0 < lost <= 6 and ended == 20  # of each kill its running pack alone, and nothing ran twice to its end


def test_tables(tmp_path):
    ledger = Ledger(tmp_path / "run")
    points = fake.points(
        group("one; two", chain(axis("train.seed", [0, 1]), axis("lora.targets", [("q_proj",)])))
    ).points
    ledger.add(points)
    ledger.start("p", [points[0].hash], "here")
    ledger.finish([Outcome(points[0].hash, {"loss": 1, "note": [1]})], [Row(points[0].hash, 1, "loss", 0.5)])
    files = export(ledger.path, tmp_path / "out")  # while a driver holds it
    assert {file.name for file in files} == {
        f"{name}.{form}" for name in ("points", "metrics", "attempts") for form in ("csv", "parquet")
    }
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "points.parquet").to_pylist()
    assert [row["hash"] for row in rows] == [point.hash for point in points]
    assert rows[0]["status"] == "done" and rows[0]["result.loss"] == 1 and rows[1]["result.loss"] is None
    assert rows[0]["groups"] == "one; two" and json.loads(rows[2]["lora.targets"]) == ["q_proj"]
    with (tmp_path / "out" / "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"hash": points[0].hash, "step": "1", "name": "loss", "value": "0.5"}]
    with pytest.raises(InputError, match="no such ledger"):
        export(tmp_path / "nowhere" / FILE, tmp_path / "out")


def test_an_empty_ledger_has_tables(tmp_path):
    Ledger(tmp_path).close()
    assert len(export(tmp_path / FILE, tmp_path / "out")) == 6
    assert sqlite3.connect(tmp_path / FILE).execute("SELECT count(*) FROM points").fetchone() == (0,)
    assert os.path.getsize(tmp_path / "out" / "attempts.csv") > 0
