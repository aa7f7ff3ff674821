"""A report in a folder: report.html, figures/*.png and .svg, tables/*.csv, .tex and .md."""

import os
import time
from pathlib import Path

from qlora_jax.errors import InputError
from qlora_jax.evaluate.tables import as_csv, write_tables
from qlora_jax.report.names import higher_is_better
from qlora_jax.report.page import page
from qlora_jax.report.parts import Canvas, Metric, Table
from qlora_jax.report.run_list import run_list
from qlora_jax.report.sections import sections
from qlora_jax.report.source import Source, number, read

PAGE = "report.html"
_SILENT_SECONDS = 600.0


class Report:
    """Of one workdir; `build` again draws only figures whose numbers have changed.

    Raises InputError (also `build`): nothing to report on, a metric that no result has, a folder that cannot be
    written.
    """

    def __init__(self, workdir: Path, out: Path, metric: str, better: str = "auto"):
        self.workdir, self.out = workdir, out
        self.metric = Metric(metric, higher_is_better(metric) if better == "auto" else better == "higher")
        if out.exists() and not out.is_dir():
            raise InputError(f"--out={out} is a file; expected a folder")
        self._canvas = Canvas(out / "figures")

    def build(self, reload_seconds: int = 0, is_served: bool = False) -> Source:
        """Writes the report of what is there now. `reload_seconds` and `is_served`: see page.page; neither once all
        runs have ended."""
        source = read(self.workdir)
        _check_metric(source, self.metric.name)
        try:
            return self._write(source, reload_seconds, is_served)
        except OSError as error:
            raise InputError(f"--out={self.out} cannot be written: {error.strerror or error}") from error

    def _write(self, source: Source, reload_seconds: int, is_served: bool) -> Source:
        tables = self.out / "tables"
        tables.mkdir(parents=True, exist_ok=True)
        found = sections(source, self.metric, self._canvas)
        for table in (part for section in found for part in section.parts if isinstance(part, Table)):
            write_tables(tables, table.name, table.header, table.rows)
        runs = None
        if source.is_grid:
            runs = run_list(source, self.metric.name)
            header = [column["key"] for column in runs["columns"]]
            _write(tables / "runs.csv", as_csv(header, [_texts(row, runs["columns"]) for row in runs["rows"]]))
        reload_seconds = 0 if source.is_finished else reload_seconds
        kind = "Sweep" if source.is_grid else "Run"
        title = f"{kind} {source.path.resolve().name}"
        is_served = is_served and not source.is_finished
        text = page(title, _head(source), source.counts(), found, runs, self._canvas.folder, reload_seconds, is_served)
        _write(self.out / PAGE, text)
        return source


def _check_metric(source: Source, metric: str) -> None:
    results = [run.result for run in source.runs if run.result]
    known = dict.fromkeys(key for result in results for key, value in result.items() if number(value) is not None)
    if known and metric not in known and metric != "final_eval_loss":
        raise InputError(f"--metric={metric}: no result has it; results have {', '.join(known)}")


def _head(source: Source) -> list[str]:
    stamp = lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))  # noqa: E731
    lines = [f"Newest entry {stamp(source.written)}; page written {stamp(time.time())}."]
    silent = time.time() - source.written
    if source.counts()["running"] and silent > _SILENT_SECONDS:
        lines[0] += f" Nothing was written for {silent / 60:,.0f} minutes: what is called running may have been killed."
    facts = [source.meta.get("config_path", "")]
    facts += [
        f"code {commit[:12]}{'+changes' if '+' in commit else ''}"
        for commit in [source.meta.get("commit", "")]
        if commit
    ]
    facts += [f"host {source.meta['hostname']}"] if source.meta.get("hostname") else []
    if any(facts):
        lines.append("; ".join(fact for fact in facts if fact) + ".")
    if source.left_out:
        lines.append(f"{source.left_out:,} points of the ledger are not of the grid any more and are not shown.")
    return lines


def _texts(row: list, columns: list[dict]) -> list[str]:
    return [
        "" if value is None else column["values"][value] if column["kind"] == "choice" else str(value)
        for value, column in zip(row, columns, strict=True)
    ]


def _write(path: Path, text: str) -> None:
    """Whole or not at all: who reads meanwhile sees the old file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8", errors="replace")
    os.replace(partial, path)
