"""A picture of a data set as a run sees it: lengths, and padding by the way batches are made."""

from pathlib import Path

import numpy as np

_BINS = 40


def draw_data(path: Path, given: np.ndarray, learned: np.ndarray, waste: dict[str, float], title: str) -> None:
    """Writes a PNG.

    Args:
      path: of the file.
      given, learned: int [n], tokens of each example that are not learned (the source), and that are (the target).
      waste: share of padding by method, 0 to 1.
      title: of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    lengths, padding = figure.subplots(1, 2, width_ratios=(3, 2))
    edges = np.linspace(0, max(int(given.max()), int(learned.max())) + 1, _BINS + 1)
    for name, values in (("source: given", given), ("target: learned", learned)):
        lengths.hist(values, edges, alpha=0.6, label=f"{name} (mean {values.mean():.0f})")
    lengths.set_xlabel("tokens")
    lengths.set_ylabel("examples")
    lengths.legend()
    bars = padding.barh(list(waste), [100 * share for share in waste.values()])
    padding.bar_label(bars, fmt="%.1f%%", padding=3)
    padding.invert_yaxis()
    padding.margins(x=0.25)
    padding.set_xlabel("padding, % of an epoch's positions")
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=150)
