"""How scores are made of products q k^T."""

import math
from typing import NamedTuple


class Scoring(NamedTuple):
    """Scores are cap * tanh(scale * q k^T / cap) - slope * distance.

    scale: None is 1 / sqrt(H). softcap: 0 is none. slopes: one for each query head (ALiBi; Press et al., 2022), or ().
    """

    scale: float | None = None
    softcap: float = 0.0
    slopes: tuple[float, ...] = ()

    @property
    def is_a_scale(self) -> bool:
        return not self.softcap and not self.slopes

    def scale_of(self, H: int) -> float:
        return 1 / math.sqrt(H) if self.scale is None else self.scale


PLAIN = Scoring()
