"""Verdicts of one run in a table: who won in which order, and how steady the judge was."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_jax.evaluate.tournament.agreement import Share, both_orders, position_bias
from qlora_jax.evaluate.tournament.verdicts import FIRST, SECOND, TIE, UNPARSED, Verdict


def as_verdicts(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Rows as three-class verdicts: the answer with more points wins."""
    return [
        Verdict(row["benchmark"], row["first"], row["second"], str(row["item_id"]), _class(row["score"]), "threeclass")
        for row in rows
    ]


def order_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a line for each order of each pair; mean points where there are points."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["first"], row["second"]].append(row)
    relative = any(isinstance(row["score"], list) for row in rows)
    header = ["shown first", "shown second", "first wins", "second wins", "ties", "unparsed"]
    header += ["points first", "points second"] * relative
    cells = []
    for (first, second), judged in sorted(found.items(), key=lambda each: (sorted(each[0]), each[0])):
        classes = [_class(row["score"]) for row in judged]
        line = [first, second, *(str(classes.count(kind)) for kind in (FIRST, SECOND, TIE, UNPARSED))]
        points = [row["score"] for row in judged if isinstance(row["score"], list) and row["score"][0] != UNPARSED]
        means = [f"{mean:.2f}" for mean in np.mean(points, axis=0)] if points else ["-", "-"]
        cells.append(line + means * relative)
    return header, cells


def steadiness(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Position bias, agreement of the two orders and unparsed verdicts, a line each."""
    verdicts = as_verdicts(rows)
    unparsed = sum(verdict.score == UNPARSED for verdict in verdicts)
    lines = [f"first answer preferred: {_text(position_bias(verdicts))} decided verdicts (50% without bias)"]
    if len({verdict.first for verdict in verdicts}) > 1:
        lines.append(f"same verdict in both orders: {_text(both_orders(verdicts))} pairs of answers")
    return [*lines, f"unparsed: {unparsed} of {len(verdicts)} verdicts (score -1, kept with the judge's text)"]


def _class(score: Any) -> int:
    if not isinstance(score, list):
        return score
    a, b = score
    return UNPARSED if UNPARSED in score else FIRST if a > b else SECOND if b > a else TIE


def _text(found: Share) -> str:
    if found.share is None:
        return "- of 0"
    return f"{found.share:.1%} ({found.low:.1%} to {found.high:.1%}) of {found.n}"
