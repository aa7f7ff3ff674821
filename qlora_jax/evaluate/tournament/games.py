"""Three-class verdicts as arrays of games, and the win matrix.

Letters of this folder: S systems, G games. outcome [G] is what `first` gets: 1 for a win, 0 for a loss, 0.5 for a tie.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.evaluate.tournament.verdicts import FIRST, SECOND, TIE, Verdict

TIES = ("half", "drop")
OUTCOMES = {FIRST: 1.0, SECOND: 0.0, TIE: 0.5}


@dataclasses.dataclass(frozen=True)
class Games:
    systems: tuple[str, ...]  # sorted by name
    first: np.ndarray  # int [G], index of the system
    second: np.ndarray  # int [G]
    outcome: np.ndarray  # float64 [G]
    unparsed: int  # verdicts left out because the judge's text could not be parsed
    dropped: int  # ties left out

    @property
    def played(self) -> np.ndarray:
        """int [S]: games of each system."""
        return np.bincount(self.first, minlength=len(self.systems)) + np.bincount(
            self.second, minlength=len(self.systems)
        )

    @property
    def wins(self) -> np.ndarray:
        """float64 [S, S]: games that the row's system won against the column's, a tie being half of one to each."""
        wins = np.zeros((len(self.systems),) * 2)
        np.add.at(wins, (self.first, self.second), self.outcome)
        np.add.at(wins, (self.second, self.first), 1 - self.outcome)
        return wins


def games_of(verdicts: Sequence[Verdict], ties: str = "half") -> Games:
    """Games of three-class verdicts; unparsed ones are left out.

    Args:
      ties: "half" counts a tie as half a win of each, "drop" leaves it out.
    Raises:
      InputError: an unknown `ties`, or nothing left to play.
    """
    if ties not in TIES:
        raise InputError(f"--ties={ties}: expected one of {', '.join(TIES)}")
    parsed = [verdict for verdict in verdicts if verdict.score in OUTCOMES]
    kept = [verdict for verdict in parsed if ties == "half" or verdict.score != TIE]
    if not kept:
        unparsed, tied = len(verdicts) - len(parsed), len(parsed)
        raise InputError(
            f"no game to play: of {len(verdicts)} verdicts {unparsed} are unparsed and {tied} ties dropped"
        )
    systems = tuple(sorted({name for verdict in kept for name in (verdict.first, verdict.second)}))
    index = {name: place for place, name in enumerate(systems)}
    return Games(
        systems,
        np.array([index[verdict.first] for verdict in kept]),
        np.array([index[verdict.second] for verdict in kept]),
        np.array([OUTCOMES[verdict.score] for verdict in kept]),  # type: ignore[index]
        unparsed=len(verdicts) - len(parsed),
        dropped=len(parsed) - len(kept),
    )
