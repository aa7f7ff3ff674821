"""The section of a group: what it varies, what its results come to, figures and tables of every axis."""

from collections.abc import Sequence
from functools import partial

from qlora_jax.report import draw, findings
from qlora_jax.report.compare import Block, means, pairs
from qlora_jax.report.factors import Design, Factor, is_comparable
from qlora_jax.report.names import key_name
from qlora_jax.report.parts import Canvas, Figure, Metric, Section, Table, Text, curve_data, curves_of, interval, slug
from qlora_jax.report.source import Run, number


def group_section(
    name: str, prefix: str, runs: list[Run], of: Design, results: Block | None, metric: Metric, canvas: Canvas
) -> Section:
    axes = [f"{factor.name} ({len(factor.levels)}{_following(factor)})" for factor in of.factors]
    axes += [f"{len(of.seeds.levels)} seeds"] if of.seeds else []
    axes += [f"{key_name(key)} (chosen by a search)" for key in of.searched]
    done = [run for run in runs if run.status == "done"]
    text = f"{len(runs):,} runs: {' × '.join(axes) if axes else 'one config'}. {len(done):,} are done"
    failed = sum(run.status == "failed" for run in runs)
    text += f", {failed:,} failed." if failed else "."
    parts: list[Figure | Table] = []
    if of.searched:
        parts += _searched(prefix, done, of, metric, canvas)
    if results is None:
        return Section(name, prefix, [text, f"No result has {metric.label} yet."], parts)
    if not of.searched:
        text += f" {_used(results, len(done))}"
    sentences: list[Text] = [text]
    for place, factor in enumerate(of.factors):
        if is_comparable(factor, runs, metric.name):
            said = findings.measured(results, place, metric.higher)
            sentences += [(said[0], said[1:])] if said else []
        else:
            sentences.append(
                f"{factor.name}: every level is scored on targets of its own, so levels are not comparable by "
                f"{metric.short}; no differences are stated."
            )
        if factor_said := findings.paper(factor):
            sentences.append(" ".join(factor_said))
    if of.factors:
        parts += _compared(prefix, runs, results, metric, canvas)
    parts += _curves(prefix, results, canvas)
    return Section(name, prefix, sentences, parts)


def _following(factor: Factor) -> str:
    return f"; {', '.join(factor.followers)} with it" if factor.followers else ""


def _used(results: Block, done: int) -> str:
    used = len(results.runs)
    if not results.left_out:
        return "All of their results are compared." if used == done else f"{used:,} results are compared."
    left = "; ".join(results.left_out[:8]) + ("; …" if len(results.left_out) > 8 else "")
    return (
        f"{used:,} results are compared: a block in which every level of every axis is there at all settings of the "
        f"others. Left out, for results are missing: {left}."
    )


def _how(results: Block, *shown: int) -> str:
    """The method behind means and intervals of the levels of these axes; of each axis on its own without them."""
    over = [
        f"{factor.name} ({len(kept)})"
        for place, (factor, kept) in enumerate(zip(results.factors, results.kept, strict=True))
        if place not in shown and len(kept) > 1
    ]
    if not shown:
        over = ["the other axes"] if len(over) > 1 else []
    text = f"n = {results.seeds} seeds" if results.seeds > 1 else "n = 1 seed, so no intervals"
    if over:
        text += f"; a seed's value is the mean over {' × '.join(over)}"
    if results.seeds > 1:
        text += "; bars are 95% intervals of the mean over seeds (Student's t)"
    return text + f". {len(results.runs):,} runs."


def _compared(prefix: str, runs: list[Run], results: Block, metric: Metric, canvas: Canvas) -> list[Figure | Table]:
    shown = (results.values.tobytes(), [results.labels(place) for place in range(len(results.factors))], metric)
    parts: list[Figure | Table] = []
    name = f"{prefix}_means"
    canvas.draw(name, shown, lambda: draw.draw_means(canvas.folder, name, results, metric.short))
    title = f"{metric.label.capitalize()} by {_and([factor.name for factor in results.factors])}"
    alike = (
        " They hold what a seed changes at all levels alike; differences are judged seed by seed, in the table below."
    )
    caption = f"{metric.direction.capitalize()}. {_how(results)}{alike if results.seeds > 1 else ''}"
    parts.append(Figure(name, title, caption))
    for along, series in _two(results):
        both = f"{prefix}_{slug(results.factors[along].name)}_{slug(results.factors[series].name)}"
        call = partial(draw.draw_two, canvas.folder, both, results, along, series, metric.short)
        canvas.draw(both, shown, call)
        title = f"{metric.short.capitalize()} against {results.factors[along].name}, by {results.factors[series].name}"
        caption = f"{metric.direction.capitalize()}. Levels are equally spaced. {_how(results, along, series)}"
        parts.append(Figure(both, title, caption))
    for place, factor in enumerate(results.factors):
        parts += _tables(prefix, runs, results, place, factor, metric)
    return parts


def _two(results: Block) -> list[tuple[int, int]]:
    """Pairs of axes to show together: (along, series), the longer one along; of the first three axes."""
    axes = [place for place in range(len(results.factors)) if len(results.kept[place]) > 1][:3]
    found = []
    for number_, a in enumerate(axes):
        for b in axes[number_ + 1 :]:
            along, series = (a, b) if len(results.kept[a]) >= len(results.kept[b]) else (b, a)
            if len(results.kept[series]) <= draw.MOST_SERIES:
                found.append((along, series))
    return found


def _tables(prefix: str, runs: list[Run], results: Block, place: int, factor: Factor, metric: Metric) -> list[Table]:
    name, labels = f"{prefix}_{slug(factor.name)}", results.labels(place)
    rows = [[label, *interval(mean), str(mean.n)] for label, mean in zip(labels, means(results, place), strict=True)]
    header = [factor.name, metric.short, "2.5%", "97.5%", "seeds"]
    found = [
        Table(
            f"{name}_means", f"{metric.short.capitalize()} by {factor.name}", header, rows, _how(results, place), False
        )
    ]
    if len(labels) < 2 or results.seeds < 2 or not is_comparable(factor, runs, metric.name):
        return found
    rows = [
        [f"{labels[pair.a]} − {labels[pair.b]}", *interval(pair.difference)]
        + [f"{pair.a_better} of {pair.difference.n}"]
        for pair in pairs(results, place, metric.higher)
    ]
    header = ["difference", f"of {metric.short}", "2.5%", "97.5%", "first is better in"]
    note = (
        f"Paired by seed: n = {results.seeds} differences, 95% t-intervals of their mean. The order of the levels was "
        "chosen from the same results, and intervals are not corrected for the number of comparisons."
    )
    return [
        *found,
        Table(f"{name}_differences", f"Differences between levels of {factor.name}", header, rows, note, False),
    ]


def _curves(prefix: str, results: Block, canvas: Canvas) -> list[Figure | Table]:
    """Of the runs that are compared, by every axis with few levels."""
    by: dict[str, dict[str, list[Run]]] = {}
    for place, factor in enumerate(results.factors):
        if 1 < len(results.kept[place]) <= draw.MOST_SERIES:
            by[factor.name] = {label: [] for label in results.labels(place)}
            for run in results.runs:
                by[factor.name][factor.labels[factor.level(run)]].append(run)
    by = by or {"": {"all runs": results.runs}}
    found = curves_of(by)
    if not found:
        return []
    name = f"{prefix}_curves"
    canvas.draw(name, curve_data(found), partial(draw.draw_curves, canvas.folder, name, found))
    each = " and ".join(
        f"{len(next(iter(levels.values())))} runs for each level of {axis}" if axis else f"{len(results.runs)} runs"
        for axis, levels in by.items()
    )
    caption = f"Means over runs at each logged step ({each}); bands hold the middle 80% of the runs."
    return [Figure(name, f"Loss curves{f' by {_and(list(by))}' if '' not in by else ''}", caption)]


def _searched(prefix: str, done: list[Run], of: Design, metric: Metric, canvas: Canvas) -> list[Figure | Table]:
    columns = {}
    for key in of.searched[:4]:
        pairs_ = [(number(run.config.get(key)), number(run.result.get(metric.name))) for run in done]
        points = [(x, y) for x, y in pairs_ if x is not None and y is not None]
        if points:
            columns[key_name(key)] = ([x for x, _ in points], [y for _, y in points])
    if not columns:
        return []
    name = f"{prefix}_search"
    canvas.draw(name, [columns], lambda: draw.draw_scatter(canvas.folder, name, columns, metric.short))
    caption = (
        f"A point a finished run; {metric.direction}. A search chose these values by earlier results: no intervals."
    )
    return [Figure(name, f"{metric.short.capitalize()} against what the search chose", caption)]


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
