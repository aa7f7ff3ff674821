"""Packs: points that train in one program over one frozen base, as many at a time as memory takes."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.sweep.grid import Point


@dataclasses.dataclass(frozen=True)
class Pack:
    key: str  # equal for points that can share a program: packs/pack.pack_key
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        """Of its points: the same points are the same pack in every run of a sweep."""
        return hashlib.sha256("".join(self.hashes).encode()).hexdigest()[:12]

    @property
    def hashes(self) -> list[str]:
        return [point.hash for point in self.points]

    @property
    def configs(self) -> list[dict[str, Any]]:
        return [point.config for point in self.points]

    def halves(self) -> list["Pack"]:
        """The pack in two."""
        middle = -(-len(self.points) // 2)
        return [Pack(self.key, part) for part in (self.points[:middle], self.points[middle:]) if part]


def make_packs(
    points: Sequence[Point],
    key: Callable[[dict[str, Any]], str],
    pack_size: int,
    takes: Callable[[Sequence[Point]], int] | None = None,
    limit: int | None = None,
) -> list[Pack]:
    """Groups points into packs: a pure function of its arguments, so a resumed sweep has the packs it had.

    Args:
      key: packs/pack.pack_key.
      pack_size: points a pack at most.
      takes: predicts bytes on the device of a pack of these points; `limit` is what there is. A point that does not fit
        alone is a pack of its own: predictions are upper bounds, and the run says what is true.
    Returns:
      Packs in the order of their first points. Within a key, points of like length and rank stand together: members
      that are done, and ranks below the largest, are computed for nothing.
    """
    if pack_size < 1:
        raise InputError(f"--pack_size={pack_size}; expected at least 1")
    by_key: dict[str, list[tuple[int, Point]]] = {}
    for number, point in enumerate(points):
        by_key.setdefault(key(point.config), []).append((number, point))
    packs: list[tuple[int, Pack]] = []
    for name, members in by_key.items():
        members.sort(key=lambda member: (_length(member[1].config), member[0]))
        while members:
            size = pack_size
            if takes is not None and limit is not None:
                size = _largest([point for _, point in members[:pack_size]], takes, limit)
            taken, members = members[:size], members[size:]
            packs.append((min(n for n, _ in taken), Pack(name, tuple(point for _, point in taken))))
    return [pack for _, pack in sorted(packs, key=lambda numbered: numbered[0])]


def missing(packs: Iterable[Pack], statuses: dict[str, str]) -> list[Pack]:
    """The packs with what is pending of each."""
    left = []
    for pack in packs:
        points = tuple(point for point in pack.points if statuses.get(point.hash, "pending") == "pending")
        if points:
            left.append(Pack(pack.key, points))
    return left


def _length(config: dict[str, Any]) -> tuple[int, int]:
    return config["train"]["steps"], config["lora"]["rank"]


def _largest(points: Sequence[Point], takes: Callable[[Sequence[Point]], int], limit: int) -> int:
    """How many of `points`, from the first on, fit; at least 1. Memory grows with every point."""
    if takes(points) <= limit:
        return len(points)
    low, high = 1, len(points)  # low fits or is 1, high does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if takes(points[:middle]) <= limit else (low, middle)
    return low
