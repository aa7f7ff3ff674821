"""Like with like: a full block of a group's results; means, paired differences and shares of variance in it.

A group is a table of results: an axis for every factor, and one for the seeds. Runs may be missing (not yet done,
failed). What is compared is a full block of that table, so that every level is measured at the same settings of all
others, with the same seeds. Left out for it are, one by one, levels and seeds with most of their results missing; then
the seeds with any missing, where these are at most half of them; else the level that misses the largest share.

    mean        over the other factors for each seed, then over the S seeds
    interval    Student's t over the S seeds: mean +- t(0.975, S - 1) * s / sqrt(S)
    difference  of two levels: the same of the S differences, seed by seed
    share       of variance, eta squared: sum of squares between an axis's means over the whole sum of squares
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax.report.factors import Design, Factor, is_seed, targets
from qlora_jax.report.names import freeze
from qlora_jax.report.source import Run, number

_MOST_CELLS = 4_000_000


class Mean(NamedTuple):
    mean: float
    half: float | None  # of the 95% interval; None with one seed
    n: int  # seeds

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)

    @property
    def is_clear(self) -> bool:
        """The interval does not contain 0."""
        return self.half is not None and (self.low > 0 or self.high < 0)


class Pair(NamedTuple):
    """Level `a` against level `b` of a factor: places in its kept levels."""

    a: int
    b: int
    difference: Mean  # a - b
    a_better: int  # seeds for which a is better


class Share(NamedTuple):
    name: str
    levels: int
    spread: float  # largest less smallest mean
    variance: float  # share, eta squared
    by_chance: float  # what levels without any effect are expected to have


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A full block of results."""

    factors: tuple[Factor, ...]
    kept: tuple[tuple[int, ...], ...]  # levels of each factor
    seeds: int
    values: np.ndarray  # float64 [levels of the first factor, ..., of the last, seeds]
    runs: list[Run]  # whose results these are
    left_out: tuple[str, ...]  # levels without all results, in words

    def labels(self, factor: int) -> list[str]:
        return [self.factors[factor].labels[level] for level in self.kept[factor]]

    def over_seeds(self, *factors: int) -> np.ndarray:
        """[levels of these factors, in order of the table, seeds]: means over the others."""
        others = tuple(axis for axis in range(len(self.factors)) if axis not in factors)
        return self.values.mean(axis=others)


def block(design: Design, runs: Sequence[Run], metric: str) -> Block | None:
    """The block of a group; None where no result is there."""
    axes = list(design.factors)
    sizes = [len(factor.levels) for factor in axes] + [len(design.seeds.levels) if design.seeds else 1]
    found = [
        (run, value) for run in runs if run.status == "done" and (value := number(run.result.get(metric))) is not None
    ]
    if not found or math.prod(sizes) > _MOST_CELLS:
        return None
    table = np.full(sizes, np.nan)
    of_cell: dict[tuple[int, ...], Run] = {}
    for run, value in found:
        cell = (*(factor.level(run) for factor in axes), design.seeds.level(run) if design.seeds else 0)
        table[cell] = value
        of_cell[cell] = run
    kept = _full(~np.isnan(table))
    if not all(kept):
        return None
    values = table[np.ix_(*kept)]
    inside = [set(places) for places in kept]
    used = [run for cell, run in of_cell.items() if all(p in places for p, places in zip(cell, inside, strict=True))]
    left_out = [
        f"{factor.name} {factor.labels[level]}"
        for factor, places in zip(axes, inside, strict=False)
        for level in range(len(factor.levels))
        if level not in places
    ]
    seedless = sizes[-1] - len(kept[-1])
    if seedless:
        left_out.append(f"{seedless} of {sizes[-1]} seeds")
    return Block(tuple(axes), tuple(map(tuple, kept[:-1])), len(kept[-1]), values, used, tuple(left_out))


def _full(present: np.ndarray) -> list[list[int]]:
    """Places along each axis (the last is that of the seeds) of a block that is all present: see the module's text."""
    kept = [list(range(size)) for size in present.shape]

    def drop(axis: int, places: np.ndarray) -> None:
        nonlocal present
        kept[axis] = [place for at, place in enumerate(kept[axis]) if at not in set(places.tolist())]
        present = np.delete(present, places, axis)

    while present.size and not present.all():
        lacking = np.nonzero(~present.all(axis=tuple(range(present.ndim - 1))))[0]  # seeds
        worst = [
            (share, axis, place) for axis in range(present.ndim) for place, share in enumerate(_missing(present, axis))
        ]
        share, axis, place = max(worst)  # of equal ones the last: what a sweep has not come to yet
        if share <= 0.5 and 2 * len(lacking) <= present.shape[-1]:
            drop(present.ndim - 1, lacking)
            continue
        if share <= 0.5 and present.ndim > 1:
            share, axis, place = max(level for level in worst if level[1] < present.ndim - 1)
        drop(axis, np.array([place]))
    return kept


def _missing(present: np.ndarray, axis: int) -> list[float]:
    """Share of what is missing at each place of the axis."""
    others = tuple(other for other in range(present.ndim) if other != axis)
    return (1 - present.mean(axis=others)).tolist()


def over_seeds(values: np.ndarray) -> Mean:
    """Of one value a seed, [S]."""
    from scipy import stats

    n = len(values)
    half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return Mean(float(values.mean()), half, n)


def means(of: Block, factor: int) -> list[Mean]:
    """Of each kept level."""
    return [over_seeds(row) for row in of.over_seeds(factor)]


def pairs(of: Block, factor: int, higher: bool) -> list[Pair]:
    """The best level against each other one, and all others against each other where levels are few (6)."""
    rows = of.over_seeds(factor)
    order = sorted(range(len(rows)), key=lambda level: rows[level].mean(), reverse=higher)
    several = len(order) if len(order) <= 6 else 1
    found = []
    for place, a in enumerate(order[:several]):
        for b in order[place + 1 :]:
            difference = rows[a] - rows[b]
            found.append(Pair(a, b, over_seeds(difference), int((difference > 0 if higher else difference < 0).sum())))
    return found


def shares(of: Block, incomparable: Sequence[int]) -> list[Share]:
    """Of every factor but the incomparable ones, and of the seeds.

    Incomparable factors change what is measured: variance is that within each of their levels.
    """
    values = of.values
    if incomparable:
        rest = tuple(axis for axis in range(values.ndim) if axis not in incomparable)
        values = values - values.mean(axis=rest, keepdims=True)
    whole = float(((values - values.mean()) ** 2).sum())
    names = [factor.name for factor in of.factors] + ["seed"]
    found = []
    for axis, name in enumerate(names):
        levels = values.shape[axis]
        if axis in incomparable or levels < 2:
            continue
        row = values.mean(axis=tuple(other for other in range(values.ndim) if other != axis))
        between = float(((row - row.mean()) ** 2).sum()) * values.size / levels
        chance = (levels - 1) / (values.size - 1)
        found.append(Share(name, levels, float(np.ptp(row)), between / whole if whole else 0.0, chance))
    return found


class Setting(NamedTuple):
    """Runs that differ in their seeds alone."""

    runs: list[Run]
    score: Mean


def best(runs: Sequence[Run], metric: str, higher: bool) -> dict[tuple, list[Setting]]:
    """Settings, the best first, apart for each set of targets that runs are scored on.

    Those with few seeds would win by luck: settings need half as many as the one with the most, up to 3.
    """
    settings: dict[tuple, dict[tuple, list[Run]]] = {}
    for run in runs:
        if run.status == "done" and number(run.result.get(metric)) is not None:
            setting = tuple(freeze(value) for key, value in run.config.items() if not is_seed(key))
            settings.setdefault(targets(run, metric), {}).setdefault(setting, []).append(run)
    found = {}
    for of, members in settings.items():
        needed = min(3, -(-max(map(len, members.values())) // 2))
        rows = [
            Setting(same, over_seeds(np.array([float(run.result[metric]) for run in same])))
            for same in members.values()
            if len(same) >= needed
        ]
        found[of] = sorted(rows, key=lambda row: row.score.mean, reverse=higher)
    return dict(sorted(found.items(), key=lambda item: -sum(len(row.runs) for row in item[1])))
