"""The relative protocol: a system's points over ChatGPT's, given by a judge that saw both answers.

    percent = 100 * sum of the system's points / sum of ChatGPT's points

over the system's games with ChatGPT, both orders pooled, unparsed ones dropped. The 95% interval is a bootstrap over
items: they are drawn with replacement, each with all its verdicts. Draws in which ChatGPT has no point are left out.
Source: QLoRA, section 5.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.evaluate.tournament.verdicts import UNPARSED, Verdict

CHATGPT = ("gpt-3.5", "gpt35", "gpt-3.5-turbo", "chatgpt")  # names that the released files and tables use
RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Relative:
    percent: float
    low: float  # 2.5 percentile
    high: float  # 97.5 percentile
    verdicts: int  # parsed
    unparsed: int
    orders: int  # 1 or 2: whether the system's answer was shown first, second, or both


def find_reference(verdicts: Sequence[Verdict], name: str | None = None) -> str:
    """The system that others are compared with: `name`, or ChatGPT under the name that it has.

    Raises InputError where it has no verdicts.
    """
    systems = sorted({system for verdict in verdicts for system in (verdict.first, verdict.second)})
    found = [system for system in systems if (system == name if name else system.lower() in CHATGPT)]
    if len(found) != 1:
        expected = name or f"ChatGPT as one of {', '.join(CHATGPT)}"
        raise InputError(f"expected {expected} among the systems {', '.join(systems)}; choose one with --reference")
    return found[0]


def relative(verdicts: Sequence[Verdict], reference: str, seed: int = 0) -> dict[str, Relative]:
    """Percent of the reference's points for each system that met it, the best first.

    Args:
      verdicts: of the relative protocol; those without the reference are not looked at.
      seed: of the bootstrap.
    Raises:
      InputError: a system without a parsed verdict, or a reference without a point.
    """
    systems = {name for v in verdicts for name in (v.first, v.second) if reference in (v.first, v.second)} - {reference}
    found = {name: _compare(verdicts, name, reference, seed) for name in sorted(systems)}
    return dict(sorted(found.items(), key=lambda item: -item[1].percent))


def _compare(verdicts: Sequence[Verdict], system: str, reference: str, seed: int) -> Relative:
    met = [verdict for verdict in verdicts if {verdict.first, verdict.second} == {system, reference}]
    points: dict[str, np.ndarray] = {}  # item -> [system's, reference's]
    for verdict in met:
        if isinstance(verdict.score, tuple):
            pair = verdict.score if verdict.first == system else verdict.score[::-1]
            points[verdict.item] = points.get(verdict.item, np.zeros(2)) + pair
    unparsed = sum(verdict.score == UNPARSED for verdict in met)
    if not points:
        raise InputError(f"{system} against {reference}: all {len(met)} verdicts are unparsed")
    table = np.stack(list(points.values()))  # [items, 2]
    if table[:, 1].sum() == 0:
        raise InputError(f"{system} against {reference}: {reference} has no point, so there is nothing to divide by")
    items = len(table)
    weights = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=RESAMPLES)
    sums = weights @ table  # [resamples, 2]
    sums = sums[sums[:, 1] > 0]
    low, high = np.percentile(100 * sums[:, 0] / sums[:, 1], [2.5, 97.5])
    percent = 100 * table[:, 0].sum() / table[:, 1].sum()
    orders = len({verdict.first for verdict in met})
    return Relative(float(percent), float(low), float(high), len(met) - unparsed, unparsed, orders)
