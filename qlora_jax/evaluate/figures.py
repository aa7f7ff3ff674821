"""Figures of a comparison of systems, each as PNG and SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def draw_intervals(
    folder: Path, name: str, systems: Sequence[str], values: Sequence[tuple[float, float, float]], label: str
) -> None:
    """A point and its interval for each system, the first on top. values: (middle, low, high)."""
    middle, low, high = np.array(values).T
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 1 + 0.4 * len(systems)))
    places = np.arange(len(systems))
    # a mean may lie outside the percentiles where nearly all orderings agree
    ends = [np.maximum(middle - low, 0), np.maximum(high - middle, 0)]
    axes.errorbar(middle, places, xerr=ends, fmt="o", capsize=3, color="tab:blue")
    axes.set_yticks(places, systems)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    _save(figure, folder, name)


def draw_matrix(folder: Path, name: str, systems: Sequence[str], shares: np.ndarray, label: str) -> None:
    """Heat map of shares [S, S] in 0..1, NaN where two systems never met."""
    plt = _pyplot()
    side = 2.5 + 0.6 * len(systems)
    figure, axes = plt.subplots(figsize=(side + 1, side))
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdBu")
    axes.set_xticks(range(len(systems)), systems, rotation=45, ha="right")
    axes.set_yticks(range(len(systems)), systems)
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share):
            dark = abs(share - 0.5) > 0.3
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color="white" if dark else "black")
    figure.colorbar(image, label=label)
    _save(figure, folder, name)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    # the same figure is the same file
    matplotlib.rcParams["svg.hashsalt"] = "qlora_jax"
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, folder: Path, name: str) -> None:
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=150)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    _pyplot().close(figure)
