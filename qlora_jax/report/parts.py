"""What a report is made of: sections of sentences, figures and tables; and what is compared in them."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qlora_jax.report.compare import Mean
from qlora_jax.report.names import figure_number, metric_name, with_decimals
from qlora_jax.report.source import Curve, Run

_CURVES = {"loss": "training loss (nats a target token)", "eval_loss": "held-out loss (nats a target token)"}

Text = str | tuple[str, list[str]]  # a paragraph, or a list with a line above


@dataclasses.dataclass(frozen=True)
class Figure:
    name: str  # of the files NAME.png and NAME.svg
    title: str
    caption: str  # what was measured


@dataclasses.dataclass(frozen=True)
class Table:
    name: str  # of the files NAME.csv, NAME.tex and NAME.md
    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    is_open: bool = True  # on the page


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    id: str  # in the page's address
    paragraphs: list[Text]
    parts: list[Figure | Table]


class Canvas:
    """Draws into a folder what it has not drawn before from the same numbers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._drawn: dict[str, str] = {}  # name -> hash of what it shows

    def draw(self, name: str, shown: Iterable[object], call: Callable[[], None]) -> None:
        digest = hashlib.sha256()
        for value in shown:
            digest.update(value if isinstance(value, bytes) else repr(value).encode())
        if self._drawn.get(name) != digest.hexdigest():
            self.folder.mkdir(parents=True, exist_ok=True)
            call()
            self._drawn[name] = digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Metric:
    """What is compared."""

    name: str  # a key of results
    higher: bool  # higher is better

    @property
    def label(self) -> str:
        return metric_name(self.name)

    @property
    def short(self) -> str:
        return self.label.partition(" (")[0]

    @property
    def direction(self) -> str:
        return f"{'higher' if self.higher else 'lower'} is better"


def slug(text: str) -> str:
    """For names of files and addresses."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:60] or "group"


def interval(mean: Mean) -> list[str]:
    """Three cells: the mean and the ends of its interval."""
    if mean.half is None:
        return [figure_number(mean.mean), "–", "–"]
    return with_decimals([mean.mean, mean.low, mean.high], mean.half)


Curves = dict[str, dict[str, dict[str, list[Curve]]]]  # metric -> axis -> level -> of its runs


def curves_of(by: dict[str, dict[str, list[Run]]]) -> Curves:
    """Curves of runs by axis and level, of the metrics that have one."""
    found: Curves = {}
    for name, label in _CURVES.items():
        axes = {
            axis: {level: [run.curves[name] for run in runs if name in run.curves] for level, runs in levels.items()}
            for axis, levels in by.items()
        }
        axes = {axis: {level: curves for level, curves in levels.items() if curves} for axis, levels in axes.items()}
        if any(len(curve.steps) > 1 for levels in axes.values() for curves in levels.values() for curve in curves):
            found[label] = axes
    return found


def curve_data(found: Curves) -> Iterator[object]:
    """All that a figure of these shows."""
    for metric, axes in found.items():
        for axis, levels in axes.items():
            for level, curves in levels.items():
                yield metric, axis, level
                yield from (array.tobytes() for curve in curves for array in curve)
