"""The loss of runs as a figure: of training by step, and of held-out examples as points."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure


class LossFigure(Figure):
    """A figure that shows itself in a notebook, whatever matplotlib is set to."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png", dpi=110)
        return out.getvalue()


def loss_figure(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """runs: name -> lines of its metrics.jsonl. An empty name is left out of the labels."""
    figure = LossFigure(figsize=(7, 4))
    axes = figure.subplots()
    for name, rows in runs.items():
        steps = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        held = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
        label = f"{name}, " if name else ""
        marker = "." if len(steps) < 30 else ""
        (line,) = axes.plot(
            [step for step, _ in steps], [loss for _, loss in steps], label=f"{label}training", linewidth=1, alpha=0.8,
            marker=marker,
        )  # fmt: skip
        if held:
            axes.plot(*zip(*held, strict=True), "o", color=line.get_color(), label=f"{label}held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a target token")
    axes.legend()
    figure.tight_layout()
    return figure
