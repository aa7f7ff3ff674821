"""The nucleus is exact, draws follow the renormalised distribution, and settings outside their ranges are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.errors import InputError
from qlora_jax.generate.sampling import Sampling, in_nucleus, next_tokens

P = np.array([0.05, 0.4, 0.1, 0.25, 0.15, 0.05])


def draw(probabilities: np.ndarray, count: int, temperature: float, top_p: float) -> np.ndarray:
    """Shares of `count` draws, [V]."""
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (count, len(probabilities)))
    keys = jax.random.split(jax.random.key(7), count)
    tokens = jax.jit(next_tokens)(logits, keys, jnp.float32(temperature), jnp.float32(top_p))
    assert tokens.dtype == jnp.int32
    return np.bincount(np.asarray(tokens), minlength=len(probabilities)) / count


def support(probabilities: list[float], top_p: float) -> list[int]:
    kept = in_nucleus(jnp.log(jnp.asarray([probabilities], jnp.float32)), jnp.float32(top_p))
    return np.flatnonzero(np.isfinite(np.asarray(kept)[0])).tolist()


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-6, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.64, [1, 3]),
        (0.66, [1, 3, 4]),
        (0.79, [1, 3, 4]),
        (0.89, [1, 2, 3, 4]),
        (0.94, [0, 1, 2, 3, 4]),  # of two equal ones the lower id
        (0.96, [0, 1, 2, 3, 4, 5]),
        (1.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, expected) -> None:
    assert support(P.tolist(), top_p) == expected


def test_ties_rank_by_id() -> None:
    assert support([0.25, 0.25, 0.25, 0.25], 0.3) == [0, 1]
    assert support([0.2, 0.3, 0.3, 0.2], 0.5) == [1, 2]
    assert support([0.2, 0.3, 0.3, 0.2], 0.65) == [0, 1, 2]


def test_top_p_1_keeps_the_longest_tail() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32000)) * 8, jnp.float32)
    assert np.isfinite(np.asarray(in_nucleus(logits, jnp.float32(1.0)))).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.0, 0.7), (0.5, 0.7), (2.0, 0.9)])
def test_draws_follow_the_distribution(temperature, top_p) -> None:
    tempered = P ** (1 / temperature)
    tempered /= tempered.sum()
    order = np.argsort(-tempered, kind="stable")
    count = int(np.searchsorted(np.cumsum(tempered[order]), top_p - 1e-6)) + 1
    expected = np.zeros(len(P))
    expected[order[:count]] = tempered[order[:count]] / tempered[order[:count]].sum()
    n = 20_000
    found = draw(P, n, temperature, top_p)
    assert (found[expected == 0] == 0).all()
    inside = expected > 0
    chi_square = n * np.sum((found[inside] - expected[inside]) ** 2 / expected[inside])
    assert chi_square < 25  # 5 degrees of freedom at most: exceeded by chance once in 7,000


def test_greedy_is_the_most_probable_the_lower_id_among_equals() -> None:
    assert draw(P, 10, 0.0, 0.9)[1] == 1
    assert draw(np.array([0.2, 0.3, 0.3, 0.2]), 10, 0.0, 0.9)[1] == 1
    assert draw(P, 100, 1.0, 1e-9)[1] == 1
    assert draw(P, 100, 1e-30, 1.0)[1] == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named) -> None:
    with pytest.raises(InputError, match=named):
        Sampling(**settings)
