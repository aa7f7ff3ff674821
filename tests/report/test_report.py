"""The report's files: of a sweep under way and of a run; hostile texts; a thousand points; mistakes."""

import csv
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qlora_jax.errors import InputError
from qlora_jax.report.build import Report
from qlora_jax.report.page import page
from qlora_jax.report.source import read
from qlora_jax.sweep.ledger import FILE, Ledger, Outcome
from tests.report import synthetic

REPOSITORY = Path(__file__).resolve().parents[2]


class Tags(HTMLParser):
    """What an HTML parser finds: tags with attributes, and the text of scripts."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts.append(data)
        else:
            self.text += data


def build(workdir: Path, out: Path | None = None, metric: str = "final_eval_loss", **options) -> str:
    Report(workdir, out or workdir, metric).build(**options)
    return ((out or workdir) / "report.html").read_text()


def test_files_of_a_sweep_under_way(running):
    names = {path.name for path in (running / "figures").iterdir()}
    for name in (
        "data_types_means",
        "data_types_curves",
        "r_and_layers_r_layers",
        "amount_of_data_means",
        "sensitivity",
    ):
        assert {f"{name}.png", f"{name}.svg"} <= names
    assert (running / "figures" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    with (running / "tables" / "data_types_data_type_means.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["data type"] for row in rows] == ["16-bit", "NF4 + DQ", "NF4", "FP4", "Int4"]
    assert r"\toprule" in (running / "tables" / "sensitivity.tex").read_text()
    with (running / "tables" / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == 93 and {row["status"] for row in runs} == {"pending", "running", "done", "failed"}
    text = Tags((running / "report.html").read_text()).text
    assert "1 of 3 seeds" in text  # whose run failed
    assert "not comparable by held-out loss" in text and "The paper found NF4 better" in text
    assert not list(running.rglob("*.partial"))


def test_hostile_texts_stay_texts(running):
    parsed = Tags((running / "report.html").read_text())
    assert [tag for tag, _ in parsed.tags if tag == "script"] == ["script", "script"]
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert sum(tag == "b" and not attributes for tag, attributes in parsed.tags) < 60
    assert synthetic.HOSTILE in parsed.text and "grid & <b>" in parsed.text
    data = json.loads(parsed.scripts[0])
    assert any(synthetic.HOSTILE in detail.get("error", "") for detail in data["details"])
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    hostile = page(synthetic.HOSTILE, [synthetic.HOSTILE], {"done": 1}, [], {"x": synthetic.HOSTILE}, running)
    parsed = Tags(hostile)
    assert [tag for tag, _ in parsed.tags if tag in ("script", "img")] == ["script", "script"]
    assert json.loads(parsed.scripts[0]) == {"x": synthetic.HOSTILE}


def test_a_thousand_points(tmp_path):
    points = synthetic.grid(34)
    assert len(points) > 1000
    synthetic.write(tmp_path / "run", points, pack=64)
    text = build(tmp_path / "run", tmp_path / "out")
    assert len(text) < 3_000_000
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if "ledger" not in path.name) == [".lock"]


def test_read_while_a_driver_writes(tmp_path):
    points = synthetic.grid(1).points
    ledger = Ledger(tmp_path)
    ledger.add(points)
    ledger.start("p", [points[0].hash], "here")
    ledger._db.execute("BEGIN IMMEDIATE")  # in the middle of a write
    ledger._db.execute("UPDATE points SET status = 'failed'")
    assert read(tmp_path).counts() == {"pending": len(points) - 1, "running": 1, "done": 0, "failed": 0}
    assert "No result has held-out loss" in build(tmp_path, tmp_path / "out", reload_seconds=5)
    ledger._db.execute("ROLLBACK")
    ledger.finish([Outcome(points[0].hash, {"final_eval_loss": 1.0})])
    assert read(tmp_path).counts()["done"] == 1
    ledger.close()


def test_nothing_is_drawn_twice(report, running):
    before = {path: path.stat().st_mtime_ns for path in (running / "figures").iterdir()}
    report.build(reload_seconds=30)
    assert before and before == {path: path.stat().st_mtime_ns for path in (running / "figures").iterdir()}


def test_another_metric(running, tmp_path):
    text = Tags(build(running, tmp_path, "final_eval_accuracy")).text
    assert "Higher is better" in text and "held-out accuracy" in text
    with pytest.raises(InputError, match="--metric=typo: no result has it; results have final_eval_loss"):
        build(running, tmp_path, "typo")


def test_a_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"lora": {"rank": 8}, "data": {"path": "<i>x</i>"}}))
    assert "no summary.json yet" in build(tmp_path, tmp_path / "out", reload_seconds=7)
    rows = [{"step": step, "loss": 1 / step, "seconds": 0.5} for step in range(1, 300)]
    lines = [*map(json.dumps, rows), json.dumps({"step": 4, "eval_loss": 0.5}), "[]", '{"step": 300, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "summary.json").write_text(json.dumps({"final_eval_loss": 0.25, "steps": 300}))
    text = build(tmp_path, tmp_path / "out", reload_seconds=7)
    assert 'data-reload="0"' in text  # it has ended
    assert '<td>final_eval_loss</td><td class="n">0.25</td>' in text and "&lt;i&gt;x&lt;/i&gt;" in text
    assert (tmp_path / "out" / "figures" / "curves.svg").is_file() and 'id="runs"' not in text


def test_watching_ends_with_the_sweep(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add(synthetic.grid(1).points[:8])
    ledger.start("p", [point.hash for point in synthetic.grid(1).points[:3]], "here")
    ledger.close()
    command = [
        sys.executable,
        "-m",
        "experiments.report",
        f"--workdir={tmp_path}",
        f"--out={tmp_path}/out",
        "--watch=1",
    ]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    assert "3 running" in first
    assert 'data-reload="1"' in (tmp_path / "out" / "report.html").read_text()
    db = sqlite3.connect(tmp_path / FILE)
    db.execute("UPDATE points SET status = 'done' WHERE status IN ('pending', 'running')")
    db.commit()
    db.close()
    assert process.wait(timeout=60) == 0
    assert 'data-reload="0"' in (tmp_path / "out" / "report.html").read_text()


def test_mistakes_are_one_line(tmp_path, run_commands, assert_one_line_error):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / FILE).write_bytes(b"no database, but longer than a header of SQLite\n" * 40)
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / FILE).write_bytes(b"")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[1]")
    (tmp_path / "file").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    words = {
        ("nowhere",): ["no such folder"],
        ("empty",): ["neither ledger.sqlite", "nor config.json"],
        ("text",): ["not a ledger"],
        ("zero",): ["not a ledger"],
        ("list",): ["config.json", "expected an object"],
        ("run", f"--out={tmp_path}/file"): ["is a file; expected a folder"],
        ("run", f"--out={tmp_path}/file/below"): ["cannot be written"],
        ("run", "--watch=-1"): ["--watch=-1"],
        ("run", "--better=more"): ["--better=more"],
    }
    results = run_commands([["experiments.report", f"--workdir={tmp_path}/{name}", *more] for name, *more in words])
    for result, expected in zip(results, words.values(), strict=True):
        assert_one_line_error(result, expected)


def test_an_empty_ledger_has_a_page(tmp_path):
    Ledger(tmp_path).close()
    assert re.search(r"<b>0</b> in all", build(tmp_path))
    shutil.rmtree(tmp_path / "figures", ignore_errors=True)
