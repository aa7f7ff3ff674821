"""The figures of a report, each as PNG and SVG."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.evaluate.tournament.figures import plain, pyplot, save
from qlora_jax.report.compare import Block, Share, means, over_seeds
from qlora_jax.report.source import Curve

# Okabe and Ito's colours, which differ for the colour-blind too
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6BB1")
MOST_SERIES = len(COLORS)
_BINS = 60  # of a curve's steps
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
}


@contextmanager
def _figure(
    folder: Path, name: str, panels: int, width: float, height: float, rows: int = 1
) -> Iterator[tuple[Any, Any]]:
    """The figure and its panels, row by row."""
    plt = pyplot()
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(rows, panels // rows, figsize=(width, height), squeeze=False)
        yield figure, axes.ravel()
        save(figure, folder, name)


def draw_means(folder: Path, name: str, block: Block, label: str) -> None:
    """For every factor its levels' means and intervals, the first level on top."""
    count = len(block.factors)
    tallest = max(map(len, block.kept), default=1)
    with _figure(folder, name, count, max(5.5, 3.9 * count), 1.1 + 0.3 * tallest) as (_, panels):
        for index, (axes, factor) in enumerate(zip(panels, block.factors, strict=True)):
            found = means(block, index)
            places = np.arange(len(found))
            ends = [mean.half or 0.0 for mean in found]
            axes.errorbar([mean.mean for mean in found], places, xerr=ends, fmt="o", ms=4.5, capsize=3, color=COLORS[0])
            axes.set_yticks(places, [_cut(text) for text in block.labels(index)])
            axes.set_ylim(max(tallest, len(found)) - 0.5 if count > 1 else len(found) - 0.5, -0.5)
            axes.set_title(plain(factor.name))
            axes.set_xlabel(plain(label))
            axes.grid(axis="y", visible=False)
            axes.locator_params(axis="x", nbins=5)


def draw_two(folder: Path, name: str, block: Block, along: int, series: int, label: str) -> None:
    """Means and intervals of pairs of levels: `along` on the x axis, equally spaced, a line for each of `series`."""
    values = block.over_seeds(along, series)  # in the order of the table
    if series < along:
        values = values.swapaxes(0, 1)
    labels = [_cut(text) for text in block.labels(along)]
    x = np.arange(len(labels), dtype=float)
    lines = values.shape[1]
    with _figure(folder, name, 1, max(6.2, 1.0 * len(labels) + 2.6), 3.6) as (figure, panels):
        axes = panels[0]
        style = "o-" if block.factors[along].is_numeric else "o"  # no lines between names
        for place in range(lines):
            found = [over_seeds(values[level, place]) for level in range(len(labels))]
            step = 0.04 if block.factors[along].is_numeric else 0.6 / max(lines, 4)
            shift = step * (place - (lines - 1) / 2)  # so that intervals do not lie on each other
            axes.errorbar(
                x + shift, [mean.mean for mean in found], yerr=[mean.half or 0.0 for mean in found], fmt=style, ms=4,
                lw=1.3, capsize=2.5, color=COLORS[place % len(COLORS)], label=_cut(block.labels(series)[place]),
            )  # fmt: skip
        crowded = len(labels) * max(map(len, labels)) > 13 * (len(labels) + 1)
        axes.set_xticks(x, labels, rotation=30 if crowded else 0, ha="right" if crowded else "center")
        axes.set_xlabel(plain(block.factors[along].name))
        axes.set_ylabel(plain(label))
        title = plain(block.factors[series].name)
        axes.legend(title=title, loc="center left", bbox_to_anchor=(1.01, 0.5), alignment="left")
        axes.grid(axis="x", visible=False)


def draw_curves(folder: Path, name: str, metrics: dict[str, dict[str, dict[str, list[Curve]]]]) -> None:
    """Mean over runs, and the band of their middle 80%, by step.

    metrics: metric -> axis -> its level -> curves of the runs; a row of panels for each metric, a column for each axis.
    """
    columns = max(map(len, metrics.values()))
    width, height = max(5.5, 3.9 * columns), 0.3 + 2.9 * len(metrics)
    with _figure(folder, name, columns * len(metrics), width, height, len(metrics)) as (_, panels):
        cells = [(metric, axis, levels) for metric, axes in metrics.items() for axis, levels in axes.items()]
        for axes, (metric, axis, levels) in zip(panels, cells, strict=True):
            for place, (label, curves) in enumerate(levels.items()):
                color = COLORS[place % len(COLORS)]
                steps, middle, low, high = band(curves)
                axes.plot(steps, middle, lw=1.5, color=color, label=_cut(label))
                if len(curves) > 1:
                    axes.fill_between(steps, low, high, color=color, alpha=0.13, lw=0)
            axes.set_title(plain(axis))
            axes.set_xlabel("optimizer steps")
            axes.set_ylabel(plain(metric))
            axes.margins(x=0.01)
            if len(levels) > 1:
                axes.legend(loc="upper right", fontsize=8)


def band(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps; mean, 10th and 90th percentile over curves, [n]; runs of different steps meet in bins."""
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    few = len(steps) <= _BINS
    edges = np.append(steps, steps[-1] + 1) if few else np.linspace(steps[0], steps[-1], _BINS + 1)
    bins = len(edges) - 1
    table = np.full((len(curves), bins), np.nan)
    centers = np.zeros((2, bins))
    for row, (x, y) in enumerate(curves):
        places = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, bins - 1)
        counts = np.bincount(places, minlength=bins)
        centers += np.bincount(places, x, bins), counts
        with np.errstate(invalid="ignore"):
            table[row] = np.bincount(places, y, bins) / counts
    filled = centers[1] > 0
    table = table[:, filled]
    low, high = np.nanpercentile(table, (10, 90), axis=0)
    return centers[0, filled] / centers[1, filled], np.nanmean(table, axis=0), low, high


def draw_shares(folder: Path, name: str, rows: Sequence[tuple[str, Share]]) -> None:
    """Bars of the share of variance, a row a group and axis; a tick where chance alone is expected to come."""
    places = np.arange(len(rows))
    groups = list(dict.fromkeys(group for group, _ in rows))
    with _figure(folder, name, 1, 8.2, 0.9 + 0.27 * len(rows)) as (_, panels):
        axes = panels[0]
        colors = [COLORS[groups.index(group) % len(COLORS)] for group, _ in rows]
        axes.barh(places, [100 * share.variance for _, share in rows], color=colors, height=0.66, alpha=0.85)
        axes.plot([100 * share.by_chance for _, share in rows], places, "|", color="black", ms=9, mew=1.5)
        axes.set_yticks(places, [f"{_cut(group, 34)}: {_cut(share.name, 26)}" for group, share in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the variance, % (black tick: expected of chance alone)")
        axes.grid(axis="y", visible=False)


def draw_scatter(folder: Path, name: str, columns: dict[str, tuple[list[float], list[float]]], label: str) -> None:
    """Results against the keys that a search chose: a point a run. columns: key's name -> (x, y)."""
    with _figure(folder, name, len(columns), 3.9 * len(columns) + 0.6, 3.2) as (_, panels):
        for axes, (key, (x, y)) in zip(panels, columns.items(), strict=True):
            axes.plot(x, y, "o", ms=3.5, alpha=0.5, color=COLORS[0], mew=0)
            axes.set_xlabel(plain(key))
            axes.set_ylabel(plain(label))
            if min(x) > 0 and max(x) > 30 * min(x):
                axes.set_xscale("log")


def _cut(text: str, most: int = 32) -> str:
    return plain(text if len(text) <= most else text[: most - 1] + "…")
