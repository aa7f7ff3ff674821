"""Agreement statistics against figures of the literature and against cases that can be counted by hand."""

import numpy as np
import pytest

from qlora_jax.errors import InputError
from qlora_jax.evaluate.tournament import agreement
from qlora_jax.evaluate.tournament.verdicts import Verdict


def verdict(item: int, first: str, second: str, score: int, judge: str = "") -> Verdict:
    return Verdict("oa", first, second, str(item), score, "threeclass", judge)


def test_fleiss_kappa_of_the_textbook_example() -> None:
    """Ten subjects, fourteen raters, five categories: kappa 0.210 (the usual worked example)."""
    votes = [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
    assert agreement.fleiss_kappa(np.array(votes)) == pytest.approx(0.210, abs=5e-4)


def test_fleiss_kappa_at_its_ends() -> None:
    assert agreement.fleiss_kappa(np.array([[2, 0], [0, 2], [1, 0]])) == pytest.approx(1)
    assert agreement.fleiss_kappa(np.array([[1, 1], [1, 1]])) == pytest.approx(-1)
    assert agreement.fleiss_kappa(np.array([[2, 0], [3, 0]])) is None
    assert agreement.fleiss_kappa(np.array([[1, 0], [0, 1]])) is None


def test_fleiss_kappa_of_chance_is_nothing() -> None:
    votes = np.random.default_rng(0).multinomial(5, [0.5, 0.3, 0.2], size=20_000)
    assert agreement.fleiss_kappa(votes) == pytest.approx(0, abs=0.01)


def test_wilson_interval() -> None:
    """Newcombe (1998), table I: 81 of 263 has 0.2553 to 0.3662, 0 of 20 has 0 to 0.1611."""
    found = agreement.share(81, 263)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    none = agreement.share(0, 20)
    assert (none.share, none.low, none.high) == pytest.approx((0, 0, 0.1611), abs=5e-5)
    assert agreement.share(0, 0).share is None


def test_position_bias_counts_decided_games() -> None:
    scores = [1, 1, 1, 2, 3, 3, -1]
    found = agreement.position_bias([verdict(item, "a", "b", score) for item, score in enumerate(scores)])
    assert (found.share, found.n) == (0.75, 4)


def test_orders_are_turned_back() -> None:
    """Item 1 keeps its winner, item 2 its tie, item 3 keeps the place instead; item 4 has one order only."""
    pairs = [(1, 1, 2), (2, 3, 3), (3, 1, 1)]
    verdicts = [v for item, p, q in pairs for v in (verdict(item, "b", "a", p), verdict(item, "a", "b", q))]
    verdicts += [verdict(4, "a", "b", 1), verdict(4, "b", "a", -1)]
    found = agreement.both_orders(verdicts)
    assert (found.share, found.n) == (pytest.approx(2 / 3), 3)
    votes = agreement.votes_of(verdicts)
    assert {item: list(votes[item, "a", "b"]) for item in "1234"} == {
        "1": [0, 2, 0],
        "2": [0, 0, 2],
        "3": [1, 1, 0],
        "4": [1, 0, 0],
    }
    assert [agreement.majority(np.array(v)) for v in ([2, 1, 0], [0, 2, 1], [1, 1, 0], [0, 1, 3])] == [0, 1, 2, 2]


def test_retest_compares_the_same_order_and_judge() -> None:
    verdicts = [
        verdict(1, "a", "b", 1, "j"),
        verdict(1, "a", "b", 1, "j"),
        verdict(1, "a", "b", 2, "j"),
        verdict(1, "a", "b", 1, "other"),
        verdict(1, "b", "a", 1, "j"),
    ]
    found = agreement.retest(verdicts)
    assert (found.share, found.n) == (pytest.approx(1 / 3), 3)
    between = agreement.same_order(verdicts[:3], [verdict(1, "a", "b", 1), verdict(1, "b", "a", 1)])
    assert (between.share, between.n) == (pytest.approx(2 / 3), 3)


def test_systems_ranked_alike_and_backwards() -> None:
    def ranked(order: str) -> list[Verdict]:
        return [verdict(i, a, b, 1) for i in range(4) for n, a in enumerate(order) for b in order[n + 1 :]]

    same = agreement.system_level(ranked("abcd"), ranked("abcde"))
    assert (same["kendall_tau"], same["spearman_r"], same["systems"]) == (pytest.approx(1), pytest.approx(1), 4)
    turned = agreement.system_level(ranked("abcd"), ranked("dcba"))
    assert (turned["kendall_tau"], turned["spearman_r"]) == (pytest.approx(-1), pytest.approx(-1))
    # one neighbouring pair exchanged: tau = (5 - 1) / 6, r = 1 - 6 * 2 / (4 * 15)
    swapped = agreement.system_level(ranked("abcd"), ranked("bacd"))
    assert (swapped["kendall_tau"], swapped["spearman_r"]) == (pytest.approx(2 / 3), pytest.approx(0.8))
    assert agreement.system_level(ranked("ab"), ranked("ab"))["kendall_tau"] is None


def test_examples_are_compared_by_majority() -> None:
    people = [verdict(1, "a", "b", s, j) for s, j in ((1, "p"), (1, "q"), (2, "r"))]
    people += [verdict(2, "a", "b", s, j) for s, j in ((1, "p"), (2, "q"))]  # as many for each: a tie
    people += [verdict(3, "a", "b", 2, "p")]
    judge = [verdict(1, "b", "a", 2), verdict(2, "a", "b", 3), verdict(3, "a", "b", 1), verdict(9, "a", "b", 1)]
    found = agreement.example_level(people, judge)
    assert found["examples"] == 3 and found["equal"]["share"] == pytest.approx(2 / 3)
    # votes of both: a a, tie tie, b a; P = 2/3, and each category has a third of the votes with either naming
    assert found["fleiss_kappa"] == pytest.approx((2 / 3 - 1 / 3) / (1 - 1 / 3))
    # of three and of two people: P = (1/3 + 0) / 2, P_e = 1/2, for nobody said tie
    assert found["within_first"] == pytest.approx((1 / 6 - 1 / 2) / (1 - 1 / 2))
    assert found["within_second"] is None
    with pytest.raises(InputError, match="share no example"):
        agreement.example_level(people, [verdict(1, "a", "c", 1)])


def test_self_preference_is_over_the_same_examples() -> None:
    judge = [verdict(1, "me", "b", 1), verdict(2, "b", "me", 2), verdict(3, "me", "b", 3), verdict(4, "me", "b", 1)]
    people = [verdict(1, "me", "b", 2), verdict(2, "b", "me", 2), verdict(3, "me", "b", 2)]
    found = agreement.self_preference(judge, people, "me")
    assert (found["first"], found["second"], found["examples"]) == (pytest.approx(5 / 6), pytest.approx(1 / 3), 3)
    assert found["difference"] == pytest.approx(0.5) and found["low"] == 0 and found["high"] == 1
    with pytest.raises(InputError, match="--self=you"):
        agreement.self_preference(judge, people, "you")


def test_names_of_systems_do_not_matter() -> None:
    """A judge and people who prefer one system alike, whatever it is called."""
    generator = np.random.default_rng(0)
    scores = generator.choice([1, 2, 3], size=(200, 2), p=[0.8, 0.1, 0.1])

    def kappa(good: str) -> float:
        source = [[verdict(i, good, "m", score) for i, score in enumerate(column)] for column in scores.T.tolist()]
        return agreement.example_level(*source)["fleiss_kappa"]

    assert kappa("a") == pytest.approx(kappa("z"))
    mixed = [[verdict(i, "az"[i % 2], "m", score) for i, score in enumerate(column)] for column in scores.T.tolist()]
    assert agreement.example_level(*mixed)["fleiss_kappa"] == pytest.approx(kappa("a"))
