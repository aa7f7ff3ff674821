"""Grids: what a config file's `sweep()` returns, and the points it stands for.

    def sweep():
        seeds = axis("train.seed", [0, 1, 2])
        return chain(
            group("Table 2: data types", product(axis("quant.format", ["nf4", "fp4"]), seeds)),
            group("Figure 4: rank", product(
                zipped(axis("lora.rank", [8, 64]), axis("lora.alpha", [2.0, 16.0])), seeds)),
        )

A grid is a list of choices, and a choice gives values to some keys of the config; the others keep what `get_config()`
(and the command line) says. Choices that come to the same config are one point, which then serves several groups.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from qlora_jax.errors import InputError
from qlora_jax.settings import config_hash, flatten, nearest, resolved

UNGROUPED = "grid"  # the group of choices that were given none


@dataclasses.dataclass(frozen=True)
class Choice:
    """Values by key ("lora.rank"), and the tables or figures they are for."""

    values: Mapping[str, Any]
    groups: tuple[str, ...] = ()


Grid = list[Choice]


def axis(key: str, values: Iterable[Any]) -> Grid:
    """One choice for each value of `key`."""
    return [Choice({key: value}) for value in values]


def fixed(values: Mapping[str, Any]) -> Grid:
    """One choice that sets several keys at once: fixed({"model.path": "huggyllama/llama-7b", "lora.dropout": 0.1})."""
    return [Choice(dict(values))]


def product(*grids: Grid) -> Grid:
    """Every combination, the last grid's choices changing fastest."""
    return [_joined(choices) for choices in itertools.product(*grids)]


def zipped(*grids: Grid) -> Grid:
    """The first choices of all grids together, then the second ones, and so on. InputError for unequal lengths."""
    lengths = [len(grid) for grid in grids]
    if len(set(lengths)) > 1:
        raise InputError(f"zipped: grids of {', '.join(map(str, lengths))} choices; expected equally many in each")
    return [_joined(choices) for choices in zip(*grids, strict=True)]


def chain(*grids: Grid) -> Grid:
    """All choices of the first grid, then all of the second, and so on."""
    return [choice for grid in grids for choice in grid]


def when(condition: Callable[[Mapping[str, Any]], bool], grid: Grid) -> Grid:
    """The choices whose values (by key) the condition holds for. It may ask only for keys that the grid sets."""
    kept = []
    for choice in grid:
        try:
            if condition(choice.values):
                kept.append(choice)
        except KeyError as error:
            known = ", ".join(choice.values)
            raise InputError(
                f"when: the condition asks for {error.args[0]!r}, which its grid does not set; it sets {known}"
            ) from error
    return kept


def group(name: str, grid: Grid) -> Grid:
    """The same choices, for the table or figure `name`."""
    return [dataclasses.replace(choice, groups=(*choice.groups, name)) for choice in grid]


def _joined(choices: Iterable[Choice]) -> Choice:
    values: dict[str, Any] = {}
    groups: tuple[str, ...] = ()
    for choice in choices:
        both = values.keys() & choice.values.keys()
        if both:
            raise InputError(f"{', '.join(sorted(both))} is set by two of the grids that are combined; set it in one")
        values |= choice.values
        groups += choice.groups
    return Choice(values, groups)


@dataclasses.dataclass(frozen=True)
class Point:
    """One config of a sweep."""

    hash: str  # settings.config_hash of `config`
    config: dict[str, Any]  # as settings.resolved gives it
    axes: dict[str, Any]  # the value here of each key that takes several values in the sweep
    groups: tuple[str, ...]

    def __hash__(self) -> int:
        return hash(self.hash)  # its config and its axes are dicts, which have none


@dataclasses.dataclass(frozen=True)
class Points:
    """A grid, resolved: its points in order of first appearance, and what it was made of."""

    points: list[Point]
    choices: int  # before those that come to the same config were merged
    groups: dict[str, dict[str, list[Any]]]  # group -> the keys that take several values in it, and the values

    def __len__(self) -> int:
        return len(self.points)

    def statement(self) -> list[str]:
        """Groups, axes with counts and the total, as lines."""
        lines = []
        for name, axes in self.groups.items():
            count = sum(name in point.groups for point in self.points)
            counts = ", ".join(f"{key} ({len(values)})" for key, values in axes.items()) or "one config"
            lines.append(f"{name}: {count:,} points; {counts}")
        merged = self.choices - len(self.points)
        total = f"in all {len(self.points):,} points"
        if merged:
            total += f" ({merged:,} of {self.choices:,} choices come to the same config as another)"
        return [*lines, total]


def expand(config: ConfigDict, grid: Grid) -> Points:
    """The points of a grid over `config`.

    Raises:
      InputError: an empty grid, a key that the config does not have (with the nearest one), or a value of another type.
    """
    if not isinstance(grid, list) or not all(isinstance(choice, Choice) for choice in grid):
        raise InputError("sweep() must return a grid: what axis, product, zipped, chain, when and group give")
    if not grid:
        raise InputError("sweep() returns an empty grid: a condition may leave nothing")
    base, known = resolved(config), flatten(config)
    configs: dict[str, dict[str, Any]] = {}
    groups_of: dict[str, dict[str, None]] = {}
    in_group: dict[str, list[dict[str, Any]]] = {}
    seen: dict[tuple, Any] = {}  # (key, value) -> the value as the config has it
    keys: dict[str, None] = {}
    for choice in grid:
        plain = {name: dict(section) if isinstance(section, dict) else section for name, section in base.items()}
        for key, value in choice.values.items():
            same = (key, type(value), str(value))
            if same not in seen:
                seen[same] = _fitting(key, value, known)
                keys[key] = None
            section, _, name = key.partition(".")
            plain[section][name] = seen[same]
        digest = config_hash(plain)
        configs.setdefault(digest, plain)
        for name in choice.groups or (UNGROUPED,):
            groups_of.setdefault(digest, {})[name] = None
            in_group.setdefault(name, []).append(plain)
    varying = _axes(keys, list(configs.values()))
    points = [
        Point(digest, plain, {key: _get(plain, key) for key in varying}, tuple(groups_of[digest]))
        for digest, plain in configs.items()
    ]
    return Points(points, len(grid), {name: _axes(keys, members) for name, members in in_group.items()})


def _axes(keys: Iterable[str], configs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The keys that take several values, with these in order of first appearance."""
    axes = {}
    for key in keys:
        values = {str(value): value for value in (_get(plain, key) for plain in configs)}
        if len(values) > 1:
            axes[key] = list(values.values())
    return axes


def _get(plain: dict[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return plain[section][name]


def _fitting(key: str, value: Any, known: dict[str, Any]) -> Any:
    """`value` as the config has it at `key`: an int for a float becomes one, a tuple a list (as in JSON)."""
    if key not in known:
        near = nearest(key, list(known))
        hint = f"did you mean {' or '.join(near)}?" if near else f"the keys are {', '.join(known)}"
        raise InputError(f"sweep(): no config key {key!r}; {hint}")
    old = known[key]
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if isinstance(old, tuple | list) and isinstance(value, tuple | list):
        kinds = (type(old[0]),) if old else (str, int, float)
        if all(type(item) in kinds for item in value):
            return list(value)
    elif type(value) is type(old):
        return value
    raise InputError(
        f"sweep(): {key} = {value!r} is a {type(value).__name__}; expected a {type(old).__name__}, as {old!r}"
    )
