"""Elo ratings of a tournament, averaged over random orderings of its games.

    expected = 1 / (1 + 10 ** ((r_second - r_first) / 400))
    r_first += K * (outcome - expected),  r_second -= K * (outcome - expected)      outcome 1, 0.5 for a tie, 0

Every system starts at 1000. A rating depends on the order in which games are played, so all games are played in many
random orders; a system's Elo is the mean of its last ratings, and its 95% interval runs from the 2.5 to the 97.5
percentile of them. The interval says what the order does, not what other questions would do. Source: QLoRA, section 5.

Games of an ordering are played one after the other, orderings side by side: a step of the loop plays one game in each.
There are few kinds of games (first, second, outcome), so an ordering is a shuffled row of small kind numbers.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.evaluate.tournament.games import Games

SCALE = 400 / np.log(10)  # points of a rating that multiply the odds by e
TOGETHER = 2_000  # orderings played side by side: their ratings stay in the cache
SEQUENCE_BYTES = 2**27  # of their shuffled games, at most


@dataclasses.dataclass(frozen=True)
class Rating:
    elo: float  # mean over orderings
    low: float  # 2.5 percentile
    high: float  # 97.5 percentile
    games: int


def check_settings(k: float, orderings: int, start: float) -> None:
    """Raises InputError for a K that is not positive, fewer than one ordering, or a start that is not finite."""
    if not 0 < k < np.inf:
        raise InputError(f"--k={k}: expected a positive number of points")
    if orderings < 1:
        raise InputError(f"--orderings={orderings}: expected at least 1")
    if not np.isfinite(start):
        raise InputError(f"--start={start}: expected a finite rating")


def elo(
    games: Games,
    k: float = 32,
    orderings: int = 10_000,
    seed: int = 0,
    start: float = 1000,
    progress: Callable[[int], None] = lambda orderings: None,
) -> dict[str, Rating]:
    """Rating of each system, the best first.

    Args:
      k: points at stake in a game.
      orderings: random orders of the games.
      seed: of the orders.
      start: rating that every system begins with.
      progress: called with the number of orderings just played.
    Raises:
      InputError: by `check_settings`.
    """
    last = last_ratings(games, k, orderings, seed, start, progress)
    low, high = np.percentile(last, [2.5, 97.5], axis=0)
    rows = zip(games.systems, last.mean(0), low, high, games.played, strict=True)
    ratings = {name: Rating(float(mean), float(a), float(b), int(n)) for name, mean, a, b, n in rows}
    return dict(sorted(ratings.items(), key=lambda item: -item[1].elo))


def last_ratings(
    games: Games,
    k: float,
    orderings: int,
    seed: int,
    start: float,
    progress: Callable[[int], None] = lambda orderings: None,
) -> np.ndarray:
    """float64 [orderings, S]: ratings after all games of each ordering. Arguments and errors as in `elo`."""
    check_settings(k, orderings, start)
    table = np.stack([games.first, games.second, games.outcome], axis=1)
    kinds, sequence = np.unique(table, axis=0, return_inverse=True)
    sequence = sequence.ravel().astype(np.intp)  # NumPy shuffles no other size as fast
    small = np.min_scalar_type(len(kinds))
    together = max(1, min(TOGETHER, SEQUENCE_BYTES // (len(sequence) * small.itemsize)))
    generator = np.random.default_rng(seed)
    last = np.empty((orderings, len(games.systems)))
    for begin in range(0, orderings, together):
        n = min(together, orderings - begin)
        shuffled = np.empty((n, len(sequence)), small)
        for row in shuffled:
            row[:] = generator.permutation(sequence)
        last[begin : begin + n] = _play(kinds, np.ascontiguousarray(shuffled.T), len(games.systems), k, start)
        progress(n)
    return last


def _play(kinds: np.ndarray, sequences: np.ndarray, S: int, k: float, start: float) -> np.ndarray:
    """Ratings [n, S] after the games of n orderings; kinds [kinds, 3], sequences [G, n] of kind numbers."""
    n = sequences.shape[1]
    ratings = np.full(S * n, float(start))  # system s of ordering j at s * n + j
    lanes = np.arange(n)
    first, second = kinds[:, 0].astype(np.int64) * n, kinds[:, 1].astype(np.int64) * n
    won = k * kinds[:, 2]
    for kind in sequences:
        a, b = first.take(kind), second.take(kind)
        a += lanes
        b += lanes
        of_a, change = ratings.take(a), ratings.take(b)
        change -= of_a
        change /= SCALE
        # over 700 the odds are beyond float64, and the expected outcome is 0 in it either way
        np.exp(np.minimum(change, 700, out=change), out=change)
        change += 1
        np.divide(-k, change, out=change)
        change += won.take(kind)
        of_a += change
        ratings[a] = of_a
        ratings[b] -= change
    return ratings.reshape(S, n).T
