"""Elo over random orderings, and Bradley-Terry, against what a few lines or a closed form give."""

from itertools import permutations

import numpy as np
import pytest

from qlora_jax.errors import InputError
from qlora_jax.evaluate.tournament.bradley_terry import bradley_terry
from qlora_jax.evaluate.tournament.elo import elo, last_ratings
from qlora_jax.evaluate.tournament.games import Games, games_of
from qlora_jax.evaluate.tournament.verdicts import Verdict


def made(rows: list[tuple[str, str, int]]) -> list[Verdict]:
    return [Verdict("oa", a, b, str(item), score, "threeclass") for item, (a, b, score) in enumerate(rows)]


@pytest.fixture(scope="module")
def games() -> Games:
    generator = np.random.default_rng(0)
    pairs = [generator.permutation(4)[:2] for _ in range(300)]
    return games_of(made([("abcd"[i], "abcd"[j], int(generator.choice([1, 2, 3, -1]))) for i, j in pairs]))


def in_order(games: Games, order: np.ndarray, k: float, start: float) -> np.ndarray:
    """One game after the other."""
    ratings = np.full(len(games.systems), float(start))
    for game in order:
        a, b = games.first[game], games.second[game]
        change = k * (games.outcome[game] - 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400)))
        ratings[a] += change
        ratings[b] -= change
    return ratings


def test_mean_over_orderings_is_that_of_games_played_one_by_one(games) -> None:
    generator = np.random.default_rng(1)
    orders = [generator.permutation(len(games.outcome)) for _ in range(3000)]
    expected = np.array([in_order(games, order, 32, 1000) for order in orders])
    found = last_ratings(games, 32, 20_000, 0, 1000)
    error = 4 * np.sqrt(expected.var(0) * (1 / len(expected) + 1 / len(found)))
    np.testing.assert_array_less(np.abs(found.mean(0) - expected.mean(0)), error)
    np.testing.assert_allclose(found.std(0), expected.std(0), rtol=0.1)


def test_every_order_of_a_few_games_is_found() -> None:
    games = games_of(made([("a", "b", 1), ("b", "c", 3), ("c", "a", 1)]))
    expected = {tuple(in_order(games, np.array(order), 16, 1500).round(6)) for order in permutations(range(3))}
    found = {tuple(row.round(6)) for row in last_ratings(games, 16, 500, 3, 1500)}
    assert found == expected and len(expected) > 1


def test_two_players_have_a_closed_form() -> None:
    ratings = elo(games_of(made([("a", "b", 1)])), k=32, orderings=5)
    assert [(name, r.elo, r.low, r.high, r.games) for name, r in ratings.items()] == [
        ("a", 1016, 1016, 1016, 1),
        ("b", 984, 984, 984, 1),
    ]
    # at equal wins of equals K falls out: a small K rests where the expected share is the share that was won
    wins = made([("a", "b", 1)] * 750 + [("b", "a", 1)] * 250)
    ratings = elo(games_of(wins * 4), k=4, orderings=200)
    assert ratings["a"].elo - ratings["b"].elo == pytest.approx(400 * np.log10(3), abs=10)


def test_points_are_conserved_and_shift_with_the_start(games) -> None:
    ratings = last_ratings(games, 32, 100, 0, 1000)
    np.testing.assert_allclose(ratings.sum(1), 4000)
    np.testing.assert_allclose(last_ratings(games, 32, 100, 0, 0), ratings - 1000, atol=1e-9)


def test_the_seed_alone_decides(games, monkeypatch) -> None:
    first = last_ratings(games, 32, 100, 0, 1000)
    assert not np.array_equal(first, last_ratings(games, 32, 100, 1, 1000))
    monkeypatch.setattr("qlora_jax.evaluate.tournament.elo.TOGETHER", 7)
    np.testing.assert_array_equal(first, last_ratings(games, 32, 100, 0, 1000))


def test_the_order_of_answers_does_not_matter() -> None:
    rows = [("a", "b", 1), ("a", "c", 3), ("b", "c", 2), ("c", "a", 1)] * 5
    turned = [(b, a, {1: 2, 2: 1, 3: 3}[score]) for a, b, score in rows]
    plain, mirrored = (games_of(made(each)) for each in (rows, turned))
    np.testing.assert_array_equal(plain.wins, mirrored.wins)
    found, other = elo(plain, orderings=5000), elo(mirrored, orderings=5000)
    assert {n: r.elo for n, r in found.items()} == pytest.approx({n: r.elo for n, r in other.items()}, abs=2)


def test_ratings_far_apart_stay_finite() -> None:
    games = games_of(made([("a", "b", 1)] * 3))
    assert np.isfinite(last_ratings(games, 1e6, 2, 0, 1000)).all()


def test_ties_and_unparsed_verdicts_are_counted() -> None:
    verdicts = made([("a", "b", 1), ("a", "b", 3), ("b", "a", -1)])
    half, drop = games_of(verdicts), games_of(verdicts, "drop")
    assert (len(half.outcome), half.unparsed, half.dropped) == (2, 1, 0)
    assert (len(drop.outcome), drop.unparsed, drop.dropped) == (1, 1, 1)
    np.testing.assert_array_equal(half.wins, [[0, 1.5], [0.5, 0]])
    np.testing.assert_array_equal(half.played, [2, 2])
    with pytest.raises(InputError, match="1 are unparsed and 0 ties"):
        games_of(verdicts[2:])
    with pytest.raises(InputError, match="expected one of half, drop"):
        games_of(verdicts, "whole")


@pytest.mark.parametrize("wrong", [{"k": 0.0}, {"k": float("nan")}, {"orderings": 0}, {"start": float("inf")}])
def test_wrong_settings_are_named(games, wrong) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(wrong))}="):
        elo(games, **{"orderings": 1} | wrong)


def test_bradley_terry_of_two_is_the_log_odds() -> None:
    found = bradley_terry(np.array([[0, 30.0], [10, 0]]))
    assert found is not None
    np.testing.assert_allclose(found, 1000 + 200 * np.log10(3) * np.array([1, -1]))


def test_bradley_terry_finds_the_strengths_that_made_the_wins() -> None:
    """Expected wins of known strengths have their maximum of likelihood at these strengths."""
    strength = np.array([1.0, 2.0, 4.0, 0.5])
    played = np.array([[0, 10, 20, 0], [10, 0, 30, 5], [20, 30, 0, 7], [0, 5, 7, 0]])
    wins = played * strength[:, None] / (strength[:, None] + strength)
    logs = np.log10(strength)
    found = bradley_terry(wins, start=0)
    assert found is not None
    np.testing.assert_allclose(found, 400 * (logs - logs.mean()), atol=1e-5)


@pytest.mark.parametrize(
    "wins", [[[0, 3], [0, 0]], [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]], ids=["unbeaten", "never met"]
)
def test_no_finite_bradley_terry_is_said(wins) -> None:
    assert bradley_terry(np.array(wins, float)) is None
