"""How far two sources of verdicts agree, and how steady a judge is.

    system level    Kendall tau-b and Spearman r between the Elo ratings that each source gives the systems of both
    example level   Fleiss kappa (1971). An example is one item and two systems; its categories are the two systems and
                    a tie. Each example counts once with either system as the first category: else chance agreement,
                    and with it kappa, would depend on how the systems are named. Within a source the raters are its
                    verdicts on the example; between sources each gives its majority, a tie where no category has more
                    votes than the others
    position bias   share of first answers among the winners of decided games; half, without bias, once both orders are
                    shown equally often
    both orders     share of examples whose verdict stays with the same system (or a tie) when the order is turned
    test-retest     share of equal scores where the same pair was judged again in the same order
    self-preference share of games that a judge gives to its own answers, less what the other source gives them on the
                    same examples

Shares have Wilson's 95% intervals, which take verdicts as independent; the difference of self-preference has one by
bootstrap over examples. Source: QLoRA, section 5.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.evaluate.shares import Share, share
from qlora_jax.evaluate.tournament.elo import elo
from qlora_jax.evaluate.tournament.games import games_of
from qlora_jax.evaluate.tournament.verdicts import FIRST, SECOND, TIE, UNPARSED, Verdict

Example = tuple[str, str, str]  # item, and the two systems by name
RESAMPLES = 10_000


def fleiss_kappa(votes: np.ndarray) -> float | None:
    """Agreement of raters beyond chance.

        P_i = (sum_c v_ic^2 - v_i) / (v_i (v_i - 1)),  p_c = share of all votes for c,  P_e = sum_c p_c^2
        kappa = (mean P_i - P_e) / (1 - P_e)

    Args:
      votes: [examples, categories], votes of an example for a category. Examples with one vote or none say nothing and
        are left out; examples may have different numbers of votes.
    Returns:
      None where no example has two votes, or all votes are of one category.
    """
    votes = np.asarray(votes, float)
    votes = votes[votes.sum(1) >= 2]
    if not len(votes):
        return None
    n = votes.sum(1)
    observed = ((votes**2).sum(1) - n) / (n * (n - 1))
    chance = float(((votes.sum(0) / votes.sum()) ** 2).sum())
    return None if chance == 1 else float((observed.mean() - chance) / (1 - chance))


def votes_of(verdicts: Sequence[Verdict]) -> dict[Example, np.ndarray]:
    """Votes [3] of each example: for the first system by name, for the second, for a tie. Unparsed ones do not vote."""
    votes: dict[Example, np.ndarray] = defaultdict(lambda: np.zeros(3, int))
    for verdict in verdicts:
        if verdict.score != UNPARSED:
            votes[_example(verdict)][_category(verdict)] += 1
    return dict(votes)


def preference_kappa(votes: np.ndarray) -> float | None:
    """Fleiss kappa of votes [examples, 3] as `votes_of` has them, with no system before the other."""
    return fleiss_kappa(np.concatenate([votes, votes[:, [1, 0, 2]]]))


def majority(votes: np.ndarray) -> int:
    """Category with the most votes; the tie where several have as many."""
    best = np.flatnonzero(votes == votes.max())
    return int(best[0]) if len(best) == 1 else 2


def system_level(first: Sequence[Verdict], second: Sequence[Verdict], orderings: int = 1000) -> dict:
    """Kendall tau-b and Spearman r between the Elo ratings (K = 32) of two sources, over the systems that both rate.

    Returns:
      {"kendall_tau", "spearman_r", "systems", "elo": {system: [first's, second's]}}; the figures are None under
      three systems, or where a source rates all of them the same.
    Raises:
      InputError: a source without a parsed verdict.
    """
    from scipy import stats  # a second of importing, which who reads a judge's files does without

    ratings = [elo(games_of(verdicts), orderings=orderings) for verdicts in (first, second)]
    systems = [name for name in ratings[0] if name in ratings[1]]
    values = [[rating[name].elo for name in systems] for rating in ratings]
    ranked = len(systems) > 2 and all(len(set(each)) > 1 for each in values)
    return {
        "kendall_tau": float(stats.kendalltau(*values).statistic) if ranked else None,
        "spearman_r": float(stats.spearmanr(*values).statistic) if ranked else None,
        "systems": len(systems),
        "elo": {name: list(pair) for name, *pair in zip(systems, *values, strict=True)},
    }


def example_level(first: Sequence[Verdict], second: Sequence[Verdict]) -> dict:
    """Fleiss kappa between the majorities of two sources, and within each where examples have several verdicts.

    Raises InputError where the sources share no example.
    """
    votes = votes_of(first), votes_of(second)
    shared = sorted(votes[0].keys() & votes[1].keys())
    if not shared:
        some = [next(iter(each), None) for each in votes]
        raise InputError(
            f"the two files share no example (an item and two systems): the first has {some[0]}, the second {some[1]}; "
            "both must name items and systems in the same way"
        )
    choices = np.array([[majority(each[example]) for each in votes] for example in shared])  # [examples, 2]
    return {
        "fleiss_kappa": preference_kappa(np.stack([(choices == category).sum(1) for category in range(3)], axis=1)),
        "equal": dataclasses.asdict(share(int((choices[:, 0] == choices[:, 1]).sum()), len(choices))),
        "examples": len(shared),
        "within_first": preference_kappa(np.stack(list(votes[0].values()))),
        "within_second": preference_kappa(np.stack(list(votes[1].values()))),
    }


def position_bias(verdicts: Sequence[Verdict]) -> Share:
    """Share of decided games that the answer shown first won."""
    scores = Counter(verdict.score for verdict in verdicts)
    return share(scores[FIRST], scores[FIRST] + scores[SECOND])


def both_orders(verdicts: Sequence[Verdict]) -> Share:
    """Share of (example, judge) with one verdict in each order whose two verdicts say the same."""
    found: dict[tuple, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for verdict in verdicts:
        if verdict.score != UNPARSED:
            found[(*_example(verdict), verdict.judge)][verdict.first].append(_category(verdict))
    pairs = [[c[0] for c in orders.values()] for orders in found.values() if len(orders) == 2]
    return share(sum(a == b for a, b in pairs), len(pairs))


def retest(verdicts: Sequence[Verdict]) -> Share:
    """Share of equal scores among all pairs of verdicts of one judge on one example in one order."""
    again: dict[tuple, list] = defaultdict(list)
    for v in verdicts:
        if v.score != UNPARSED:
            again[v.item, v.first, v.second, v.judge].append(v.score)
    pairs = [a == b for scores in again.values() for a, b in combinations(scores, 2)]
    return share(sum(pairs), len(pairs))


def same_order(first: Sequence[Verdict], second: Sequence[Verdict]) -> Share:
    """Share of equal scores of two sources on one example in one order: test-retest, for two runs of a judge."""
    scores: dict[tuple, list] = defaultdict(list)
    for v in second:
        if v.score != UNPARSED:
            scores[v.item, v.first, v.second].append(v.score)
    pairs = [v.score == other for v in first if v.score != UNPARSED for other in scores[v.item, v.first, v.second]]
    return share(sum(pairs), len(pairs))


def self_preference(first: Sequence[Verdict], second: Sequence[Verdict], system: str, seed: int = 0) -> dict:
    """What the first source's judge gives the answers of `system`, its own, less what the second gives them.

    Returns:
      {"system", "first", "second", "difference", "low", "high", "examples"}: mean share won of the examples of both,
      a tie being half.
    Raises:
      InputError: no shared example of that system.
    """
    votes = votes_of(first), votes_of(second)
    shared = [example for example in sorted(votes[0].keys() & votes[1].keys()) if system in example[1:]]
    if not shared:
        raise InputError(f"--self={system}: the two files share no example of that system")
    won = np.array([[_won(each[example], example.index(system, 1) - 1) for each in votes] for example in shared])
    differences, generator = won[:, 0] - won[:, 1], np.random.default_rng(seed)
    resampled = [differences[generator.integers(len(shared), size=len(shared))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    mine, other = won.mean(0)
    return {
        "system": system,
        "first": float(mine),
        "second": float(other),
        "difference": float(mine - other),
        "low": float(low),
        "high": float(high),
        "examples": len(shared),
    }


def _won(votes: np.ndarray, place: int) -> float:
    return float((votes[place] + votes[2] / 2) / votes.sum())


def _example(verdict: Verdict) -> Example:
    a, b = sorted((verdict.first, verdict.second))
    return verdict.item, a, b


def _category(verdict: Verdict) -> int:
    """0 and 1 for the two systems by name, 2 for a tie."""
    if verdict.score == TIE:
        return 2
    return int((verdict.score == SECOND) == (verdict.first < verdict.second))
