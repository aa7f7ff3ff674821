"""Bradley-Terry strengths of a tournament: what Elo estimates, without an order of games and without K.

    P(i beats j) = p_i / (p_i + p_j)

Maximum likelihood by the minorize-maximize iteration (Hunter, 2004, Annals of Statistics 32):

    p_i <- W_i / sum_j n_ij / (p_i + p_j)       W_i wins of i, n_ij games of i and j; a tie is half a win of each

and on Elo's scale, with the mean of all systems at `start`: start + 400 log10(p_i / geometric mean of p).
"""

import numpy as np
from scipy.sparse.csgraph import connected_components

ITERATIONS = 100_000
TOLERANCE = 1e-10  # of log p


def bradley_terry(wins: np.ndarray, start: float = 1000) -> np.ndarray | None:
    """Strengths on Elo's scale.

    Args:
      wins: [S, S], games that the row's system won against the column's; the diagonal is zero.
    Returns:
      float64 [S]; None where no finite maximum exists: some systems never lost to, or never met, the others.
    Raises:
      ArithmeticError: the iteration did not come to rest.
    """
    if connected_components(wins > 0, directed=True, connection="strong", return_labels=False) > 1:
        return None
    played, won = wins + wins.T, wins.sum(1)
    logs = np.zeros(len(wins))
    for _ in range(ITERATIONS):
        strength = np.exp(logs)
        new = np.log(won / (played / (strength[:, None] + strength)).sum(1))
        new -= new.mean()
        moved, logs = np.abs(new - logs).max(), new
        if moved < TOLERANCE:
            return start + 400 / np.log(10) * logs
    raise ArithmeticError(f"Bradley-Terry still moves by {moved:.1e} after {ITERATIONS:,} iterations")
