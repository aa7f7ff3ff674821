"""Shares with their intervals: what was hit, of how many."""

import dataclasses

import numpy as np

Z = 1.959964  # 97.5 percentile of a normal


@dataclasses.dataclass(frozen=True)
class Share:
    share: float | None  # None of nothing
    low: float | None
    high: float | None
    n: int


def share(hits: int, n: int) -> Share:
    """hits / n with Wilson's 95% interval."""
    if n == 0:
        return Share(None, None, None, 0)
    p = hits / n
    middle, half = p + Z**2 / (2 * n), Z * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    # rounding may pass the ends of 0..1, where the interval touches them
    low, high = (float(np.clip(end / (1 + Z**2 / n), 0, 1)) for end in (middle - half, middle + half))
    return Share(p, min(low, p), max(high, p), n)
