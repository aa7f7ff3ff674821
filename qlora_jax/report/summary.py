"""The sections on all runs: which axis moves results most, the best configs, failures, cost; that of a single run."""

import re
from collections.abc import Sequence
from functools import partial

from qlora_jax.report import draw
from qlora_jax.report.compare import Setting, Share, best
from qlora_jax.report.factors import describe, is_seed, varying
from qlora_jax.report.names import NAMED, figure_number, key_name
from qlora_jax.report.parts import Canvas, Figure, Metric, Section, Table, curve_data, curves_of, interval
from qlora_jax.report.source import Run, Source, number

_MOST_BEST = 10  # settings a table
_MOST_TARGETS = 6  # tables of best settings


def sensitivity_section(measured: list[tuple[str, Share]], metric: Metric, canvas: Canvas) -> Section:
    name = "sensitivity"
    canvas.draw(name, [measured], lambda: draw.draw_shares(canvas.folder, name, measured))
    rows = [
        [group, share.name, str(share.levels), figure_number(share.spread)]
        + [f"{100 * share.variance:.1f}", f"{100 * share.by_chance:.1f}"]
        for group, share in measured
    ]
    header = ["group", "axis", "levels", "spread of the means", "share of variance, %", "by chance, %"]
    how = (
        f"How much each axis moves {metric.short} within its group. Spread: the largest less the smallest mean of its "
        "levels. Share: eta squared, the sum of squares between the means of its levels over the whole sum of squares "
        "of the group's block of results; what axes and seeds leave is their interaction. An axis without any effect "
        "is expected to have (levels − 1) / (runs − 1), the tick. Axes that change what runs are scored on "
        "are left out, and the rest is measured within their levels. A share depends on the range that the grid gives "
        "an axis."
    )
    figure = Figure(name, f"Share of the variance of {metric.short}", "Bars of one colour are the axes of one group.")
    return Section("Sensitivity", "sensitivity", [how], [figure, Table(name, "Sensitivity of each axis", header, rows)])


def best_section(runs: list[Run], metric: Metric) -> Section:
    found = best(runs, metric.name, metric.higher)
    keys = [key for key in varying(runs) if not is_seed(key)]
    keys.sort(key=lambda key: NAMED.index(key) if key in NAMED else len(NAMED))
    text = (
        f"Settings are configs without their seeds, ranked by the mean of {metric.short} over seeds "
        f"({metric.direction}); apart where what they are scored on differs. The first of many is partly lucky: its "
        "interval does not know that it was chosen."
    )
    if not found:
        return Section("Best configs", "best_configs", [f"No run has {metric.label} yet."], [])
    tables = []
    for place, (_, settings) in enumerate(list(found.items())[:_MOST_TARGETS]):
        differing = varying([row.runs[0] for row in settings])
        shared = [key for key in keys if key in differing]
        name = "best" if place == 0 else f"best_{place + 1}"
        first = settings[0].runs[0].config
        of = f": {describe(first, ('data.path', 'data.train_on_source'))}" if len(found) > 1 else ""
        tables.append(
            Table(
                name, f"Best of {len(settings):,} settings{of}",
                [*map(key_name, shared), metric.short, "2.5%", "97.5%", "seeds", "hash of one"],
                [_setting(row, shared) for row in settings[:_MOST_BEST]],
            )
        )  # fmt: skip
    if len(found) > _MOST_TARGETS:
        text += f" The {_MOST_TARGETS} of {len(found)} sets of targets with the most runs are shown."
    return Section("Best configs", "best_configs", [text], list(tables))


def _setting(row: Setting, keys: Sequence[str]) -> list[str]:
    run = row.runs[0]
    values = [describe(run.config, [key]).partition(" = ")[2] for key in keys]
    return [*values, *interval(row.score), str(row.score.n), run.hash[:12]]


def failures_section(source: Source) -> Section:
    failed = [run for run in source.runs if run.status == "failed"]
    parts: list[Figure | Table] = []
    if failed:
        alike: dict[str, list[Run]] = {}
        for run in failed:
            alike.setdefault(re.sub(r"[0-9][0-9.,e+-]*", "#", run.error or ""), []).append(run)
        rows = [
            [str(len(runs)), (runs[0].error or "no error was kept")[:400], ", ".join(run.hash[:12] for run in runs[:3])]
            for runs in sorted(alike.values(), key=len, reverse=True)
        ]
        note = "Errors that differ in their numbers alone are one row, with the first one's text."
        parts.append(Table("failures", "Failed runs", ["runs", "error", "hashes"], rows[:50], note))
    lost = [attempt for attempt in source.attempts if attempt.status not in ("running", "done", "failed")]
    if lost:
        counts: dict[tuple[str, str, str], int] = {}
        for attempt in lost:
            what = (attempt.status, attempt.node, " ".join((attempt.error or "").split())[:300])
            counts[what] = counts.get(what, 0) + 1
        rows = [[str(count), *what] for what, count in sorted(counts.items(), key=lambda item: -item[1])]
        note = "Attempts of whole packs; their points were run again, or failed above."
        parts.append(
            Table("attempts", "Attempts that came to nothing", ["packs", "kind", "node", "error"], rows[:50], note)
        )
    text = f"{len(failed):,} of {len(source.runs):,} runs failed." if failed else "No run failed."
    return Section("Failures", "failures", [text], parts)


def cost_section(source: Source) -> Section:
    done = [run for run in source.runs if run.status == "done"]
    busy = _union([(attempt.started, attempt.ended) for attempt in source.attempts])
    total = sum(attempt.ended - attempt.started for attempt in source.attempts)
    wasted = sum(
        attempt.ended - attempt.started for attempt in source.attempts if attempt.status not in ("running", "done")
    )
    rows = [
        ["runs done", f"{len(done):,}"],
        ["packs begun", f"{len(source.attempts):,}"],
        ["hours in which a pack ran", f"{busy / 3600:.3g}"],
        ["models an hour", f"{3600 * len(done) / busy:,.0f}" if busy else "–"],
        ["device-hours (GPU-hours where workers are GPUs)", f"{total / 3600:.3g}"],
        ["of them in attempts that came to nothing", f"{wasted / 3600:.3g}"],
        ["device-seconds a model", f"{total / len(done):.3g}" if done else "–"],
    ]
    nodes: dict[str, list[float]] = {}
    for attempt in source.attempts:
        nodes.setdefault(attempt.node or "(unnamed)", []).append(attempt.ended - attempt.started)
    by_node = [[node, f"{len(spans):,}", f"{sum(spans) / 3600:.3g}"] for node, spans in nodes.items()]
    text = (
        "From the ledger's times of attempts: a pack takes one device (a GPU, or a worker of CPUs) from its start to "
        "its end, loading and compiling included. A running one counts up to the newest entry."
    )
    tables: list[Figure | Table] = [Table("cost", "Cost", ["what", "value"], rows)]
    if len(by_node) > 1:
        tables.append(Table("nodes", "By node", ["node", "packs", "device-hours"], by_node[:100]))
    return Section("Cost", "cost", [text], tables)


def _union(spans: list[tuple[float, float]]) -> float:
    """Seconds that at least one of the spans covers."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def run_section(source: Source, canvas: Canvas) -> Section:
    run = source.runs[0]
    parts: list[Figure | Table] = []
    found = curves_of({"": {"this run": [run]}})
    if found:
        canvas.draw("curves", curve_data(found), partial(draw.draw_curves, canvas.folder, "curves", found))
        parts.append(
            Figure("curves", "Loss curves", "One run, as logged; long curves as means over stretches of steps.")
        )
    if run.result:
        rows = [
            [key, figure_number(number(value)) if isinstance(value, float) else str(value)]
            for key, value in run.result.items()
            if key != "config_hash"
        ]
        parts.append(Table("summary", "Summary", ["what", "value"], rows))
    parts.append(
        Table("config", "Config", ["key", "value"], [[key, str(value)] for key, value in run.config.items()], "", False)
    )
    text = f"Run {run.hash[:12]}: {'done' if run.status == 'done' else 'no summary.json yet'}"
    if run.seconds:
        text += f", {run.seconds:,.0f} seconds of steps"
    return Section("Run", "run", [text + "."], parts)
