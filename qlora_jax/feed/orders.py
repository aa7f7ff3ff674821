"""In which order examples come, as a pure function of seed and epoch, and shares of several data sets in it."""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from qlora_jax.errors import InputError

_CACHED_EPOCHS = 2


class Orders:
    """An endless line of n places, epoch after epoch, each epoch a permutation; the last few used are kept."""

    def __init__(self, make: Callable[[int], np.ndarray]):
        """`make`: the permutation of an epoch, int [n]."""
        self._make = make
        self._kept: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()  # batches are made in threads

    def places(self, first: int, last: int, n: int) -> np.ndarray:
        """What stands at the places from `first` to before `last` of the line."""
        epochs = range(first // n, (last - 1) // n + 1)
        return np.concatenate(
            [self._epoch(epoch)[max(first - epoch * n, 0) : min(last - epoch * n, n)] for epoch in epochs]
        )

    def _epoch(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._kept:
                if len(self._kept) >= _CACHED_EPOCHS:
                    del self._kept[min(self._kept)]
                self._kept[epoch] = self._make(epoch)
            return self._kept[epoch]


class Shares(NamedTuple):
    """Which data set each example is of, int [n], and the share of the drawn examples that each set has, names beside.

    The shares are positive and need not add up to 1: what counts is their ratio.
    """

    sets: np.ndarray
    weights: tuple[float, ...]
    names: tuple[str, ...]

    def groups(self) -> list[np.ndarray]:
        """The examples of each set, int [m] each. Raises InputError where a set has none."""
        found = [np.flatnonzero(self.sets == number) for number in range(len(self.weights))]
        for name, group in zip(self.names, found, strict=True):
            if not len(group):
                raise InputError(f"data.weights: {name} has no example to train on: all are held out; hold out fewer")
        return found


class Mixture:
    """Draws items of several groups in given numbers an epoch, for ever.

    Each group is an endless line of its own: all its items are drawn once, in a random order, before any is drawn
    again, and an epoch goes on where the one before stopped. So of a large group an epoch has a part, another the next
    time, and of a small one copies.
    """

    def __init__(
        self, groups: Sequence[np.ndarray], weights: Sequence[float], total: int, shares: Shares, seed: int, what: str
    ):
        """
        Args:
          groups: items of each group, int [m]; the first of each comes in the first epoch.
          weights: how many of `total` are drawn of each, in ratio.
          shares: names the groups in errors. what: the items.

        Raises:
          InputError: a group has no item in an epoch.
        """
        self.counts = _rounded(np.array(weights, np.float64) / np.sum(weights) * total)
        for name, count in zip(shares.names, self.counts, strict=True):
            if not count:
                raise InputError(
                    f"data.weights: {name} would have none of the {total:,} {what} of an epoch; make its weight larger"
                )
        self._groups, self._seed = groups, seed
        self._lines = [Orders(lambda epoch, k=k: self._order(k, epoch)) for k in range(len(groups))]  # type: ignore[misc]

    def drawn(self, epoch: int) -> np.ndarray:
        """The items of an epoch, group after group: int [total]."""
        lines = zip(self._lines, self.counts, self._groups, strict=True)
        return np.concatenate([line.places(epoch * n, (epoch + 1) * n, len(group)) for line, n, group in lines])

    def _order(self, number: int, epoch: int) -> np.ndarray:
        group = self._groups[number]
        random = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(3, number, epoch)))
        order = random.permutation(len(group))
        if epoch == 0:
            first = int(np.flatnonzero(order == 0)[0])
            order[[0, first]] = order[[first, 0]]
        return group[order]


def _rounded(numbers: np.ndarray) -> list[int]:
    """Whole numbers with the same sum, those with the largest remainders rounded up."""
    down = np.floor(numbers).astype(np.int64)
    missing = round(float(numbers.sum())) - int(down.sum())
    down[np.argsort(-(numbers - down), kind="stable")[:missing]] += 1
    return [int(n) for n in down]
