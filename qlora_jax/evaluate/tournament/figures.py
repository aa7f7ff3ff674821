"""Figures of a comparison of systems, each as PNG and SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.errors import one_line


def draw_intervals(
    folder: Path, name: str, systems: Sequence[str], values: Sequence[tuple[float, float, float]], label: str
) -> None:
    """A point and its interval for each system, the first on top. values: (middle, low, high)."""
    middle, low, high = np.array(values).T
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 1 + 0.4 * len(systems)))
    places = np.arange(len(systems))
    # a mean may lie outside the percentiles where nearly all orderings agree
    ends = [np.maximum(middle - low, 0), np.maximum(high - middle, 0)]
    axes.errorbar(middle, places, xerr=ends, fmt="o", capsize=3, color="tab:blue")
    axes.set_yticks(places, [plain(system) for system in systems])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    save(figure, folder, name)


def draw_matrix(
    folder: Path,
    name: str,
    rows: Sequence[str],
    columns: Sequence[str],
    percents: np.ndarray,
    label: str,
    limits: tuple[float, float] = (0, 100),
) -> None:
    """Heat map of percents [rows, columns], white at the middle of the limits; NaN stays empty."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(3.5 + 0.6 * len(columns), 2.5 + 0.6 * len(rows)))
    image = axes.imshow(percents, vmin=limits[0], vmax=limits[1], cmap="RdBu", aspect="auto")
    axes.set_xticks(range(len(columns)), [plain(name) for name in columns], rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), [plain(name) for name in rows])
    for (row, column), percent in np.ndenumerate(percents):
        if np.isfinite(percent):
            dark = abs(percent - np.mean(limits)) > 0.3 * (limits[1] - limits[0])
            axes.text(column, row, f"{percent:.0f}", ha="center", va="center", color="white" if dark else "black")
    figure.colorbar(image, label=label)
    save(figure, folder, name)


def plain(text: str) -> str:
    """A name as matplotlib shows it: on one line, and no mathematics between two dollars, which may be broken."""
    return one_line(text).replace("$", r"\$")


def pyplot() -> Any:
    """matplotlib without a screen; the same figure is the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "qlora_jax"
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, folder: Path, name: str) -> None:
    """NAME.png and NAME.svg in the folder; the figure is closed."""
    figure.tight_layout()
    figure.set_layout_engine(None)  # what tight_layout leaves has each file drawn once more, for nothing
    figure.savefig(folder / f"{name}.png", dpi=150)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    pyplot().close(figure)
